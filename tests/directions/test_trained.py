"""Trained directions: they make the positive answers likelier on texts they have not seen, and leave the model as it was."""

import pytest
import torch
from directions.direction_helpers import SITE, controlled, pairs
from hand import hook_count

from steer.directions import OBJECTIVES, ContrastSet, Directions, train_direction
from steer.directions.objectives.reps import AddOrNull
from steer.directions.sweep import pair_gaps
from steer.directions.trained import Objective, Scores
from steer.directions.trained import objective as register
from steer.errors import ConfigError, ContrastError, NonFiniteError, SiteError
from steer.intervene import Add, ReftR1, Scale

ONE_RUN = (("positive", 1),)
QUICK = {"name": "t", "steps": 30, "batch_size": 4, "learning_rate": 0.05, "progress": False}


@pytest.mark.parametrize("method", sorted(OBJECTIVES))
def test_a_trained_vector_moves_texts_it_has_not_seen(method):
    model, _ = controlled()
    contrast, fresh = pairs(12), pairs(6, seed=5)
    directions = train_direction(model, contrast, SITE, method=method, **QUICK)
    direction = directions[SITE]
    assert direction.metrics["loss_last"] < direction.metrics["loss_first"]
    gaps = pair_gaps(model, direction, fresh, torch.tensor([0.0, 1.0])[:, None] * direction.vector)
    assert ((gaps[1] - gaps[0]) > 0.02).all()
    assert {"auc", "dprime", "sd", "gap", "n_train", "n_heldout", "activation_norm", "mean"} < set(direction.metrics)
    assert direction.relative_dose() > 0 and directions.provenance["method"] == method == direction.method
    assert direction.fitted_on == contrast.split(0.25, 0)[0].digests()


def test_the_same_seed_gives_the_same_vector_and_the_model_is_left_as_it_was(tmp_path):
    model, _ = controlled()
    model.train()
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():  # where many a measurement is made
        a, b = (train_direction(model, pairs(8), SITE, method="bipo", **{**QUICK, "steps": 3}) for _ in range(2))
    assert torch.equal(a[SITE].vector, b[SITE].vector) and torch.equal(random, torch.get_rng_state())
    reseeded = train_direction(model, pairs(8), SITE, method="bipo", **{**QUICK, "steps": 3, "seed": 1})
    assert not torch.equal(a[SITE].vector, reseeded[SITE].vector)
    assert model.training and not frozen.requires_grad and sum(not parameter.requires_grad for parameter in model.parameters()) == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and hook_count(model) == 0
    loaded = Directions.load(a.save(tmp_path / "trained"))
    assert torch.equal(loaded[SITE].vector, a[SITE].vector) and loaded[SITE].fitted_on == a[SITE].fitted_on


def test_held_out_texts_have_no_part_in_the_training():
    """Other held-out pairs leave the vector to the bit."""
    model, _ = controlled()
    contrast = pairs(8)
    _, held = contrast.split(0.25, 0)
    fresh = pairs(8, seed=9)
    sides = []
    for side in ("positive", "negative"):
        where = [getattr(contrast, side).index(row) for row in getattr(held, side)]
        sides.append(tuple(getattr(fresh if i in where else contrast, side)[i] for i in range(8)))
    a, b = (train_direction(model, c, SITE, method="reps", **{**QUICK, "steps": 3}) for c in (contrast, ContrastSet(*sides, True)))
    assert torch.equal(a[SITE].vector, b[SITE].vector) and a.provenance["data_sha256"] != b.provenance["data_sha256"]


def scores() -> Scores:
    steered = {("positive", 1): -4.0, ("negative", 1): -9.0, ("positive", -1): -8.0, ("negative", -1): -5.0}
    base = {"positive": -6.0, "negative": -3.0}
    return Scores(
        {run: torch.tensor([value]) for run, value in steered.items()},
        {side: torch.tensor([value]) for side, value in base.items()},
        {"positive": torch.tensor([2.0]), "negative": torch.tensor([4.0])},
    )


def test_losses_are_those_of_the_papers():
    def cost(x: float) -> float:
        return float(-torch.nn.functional.logsigmoid(torch.tensor(x)))

    # BiPO: beta 0.1; gains over the unsteered model (2, -6) added and (-2, -2) taken away
    assert float(OBJECTIVES.get("bipo").loss(scores())) == pytest.approx((cost(0.1 * 8) + cost(-0.1 * 0)) / 2)
    # RePS: the positive answer is 3 nat behind and so counts 3 times; the negative one is ahead and counts once; both per token
    assert float(OBJECTIVES.get("reps").loss(scores())) == pytest.approx(cost(3 * -2 - -9 / 4) + cost(-5 / 4 - -4))
    assert float(OBJECTIVES.get("reft_r1").loss(scores())) == pytest.approx(2.0)


def test_suppression_takes_away_what_is_there_and_no_more():
    v, h = torch.tensor([3.0, 4.0]), torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    operator = AddOrNull(v)
    added = operator.delta(h, torch.ones(1, 1, 1), operator.tensors)
    assert torch.equal(added.expand_as(h), v.expand_as(h))
    nulled = h + operator.delta(h, -torch.ones(1, 1, 1), operator.tensors)
    assert torch.allclose(nulled[0, 0] @ v, torch.tensor(0.0), atol=1e-6) and torch.equal(nulled[0, 1], h[0, 1])


def test_bad_input_is_named(monkeypatch):
    model, _ = controlled()
    good = pairs(8)
    for contrast, options, error, message in [
        (good, {"method": "bpio"}, ConfigError, "did you mean 'bipo'"),
        (ContrastSet(good.positive, good.negative, False), {"method": "bipo"}, ContrastError, "two sets of unrelated texts"),
        (pairs(3), {"method": "bipo"}, ContrastError, "too few texts"),
        (good, {"method": "bipo", "steps": 0}, ConfigError, "number of training steps"),
    ]:
        with pytest.raises(error, match=message):
            train_direction(model, contrast, SITE, **{**QUICK, **options})

    with pytest.raises(SiteError, match=r"unknown site 'layers.\*.output'"):
        train_direction(model, good, "layers.*.output", method="bipo", **QUICK)

    def poisoned(scores: Scores) -> torch.Tensor:
        return scores.steered["positive", 1].sum() * float("nan")

    with pytest.raises(ConfigError, match=r"scope 'generated\[:4\]' means decoded tokens[\s\S]*'response'"):
        train_direction(model, good, SITE, method="bipo", scope="generated[:4]", **QUICK)

    monkeypatch.setitem(OBJECTIVES._entries, "poisoned", Objective(poisoned, (("positive", 1),), Add))
    with pytest.raises(NonFiniteError, match=r"diverged[\s\S]*nan at step 0"):
        train_direction(model, good, SITE, method="poisoned", **QUICK)
    assert hook_count(model) == 0 and all(parameter.requires_grad for parameter in model.parameters())


def test_a_vector_that_detects_nothing_is_not_made_a_direction(monkeypatch):
    """Every token reaches far along v, and the vector that is trained begins at -v."""
    model, planted = controlled()
    model.get_input_embeddings().weight.data.add_(20 * planted.vector)
    opposed = Objective(OBJECTIVES.get("reft_r1").loss, (("positive", 1),), lambda _: ReftR1(-planted.vector), detects=True)
    monkeypatch.setitem(OBJECTIVES._entries, "opposed", opposed)
    with pytest.raises(ConfigError, match=r"detects nothing[\s\S]*of the 12 training texts"):
        train_direction(model, pairs(8), SITE, method="opposed", **{**QUICK, "steps": 1})


@pytest.mark.parametrize(
    ("loss", "description"),
    [
        (lambda scores: scores.steered["positive", 1], r"a tensor of the shape \[4\]"),
        (lambda scores: scores.steered["positive", 1].sum().detach(), r"a tensor of the shape \[\], without a gradient"),
        (lambda scores: 1.0, "float '1.0'"),
    ],
)
def test_what_an_objective_gives_is_checked(loss, description, monkeypatch):
    model, _ = controlled()
    monkeypatch.setitem(OBJECTIVES._entries, "odd", Objective(loss, (("positive", 1),), Add))
    with pytest.raises(ConfigError, match=rf"the objective 'odd' gives no loss to train with[\s\S]*found: {description}"):
        train_direction(model, pairs(8), SITE, method="odd", **QUICK)
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Objective(lambda scores: 1 / 0, ONE_RUN, Add), r"the objective 'odd' failed[\s\S]*ZeroDivisionError"),
        (Objective(lambda scores: scores.steered["positive", -1].sum(), ONE_RUN, Add), r"the objective 'odd' failed[\s\S]*KeyError"),
        (Objective(lambda scores: scores.steered["positive", 1].sum() * 1j, ONE_RUN, Add), r"gives no loss[\s\S]*complex"),
        (Objective(lambda scores: None, ONE_RUN, lambda vector: 1 / 0), r"operator of the objective 'odd' failed"),
        (Objective(lambda scores: None, ONE_RUN, lambda vector: None), r"wrong type for the operator of the objective 'odd'"),
        (Objective(lambda scores: None, ONE_RUN, lambda vector: Scale(vector, 1.0)), r"'odd' has no vector to learn[\s\S]*factor"),
        (Objective(lambda scores: None, (("good", 1),), Add), "the objective 'odd' asks for runs"),
        (lambda scores: 1.0, r"objective 'odd'[\s\S]*@objective\('odd'"),
    ],
)
def test_an_objective_at_fault_is_named(objective, message, monkeypatch):
    model, _ = controlled()
    monkeypatch.setitem(OBJECTIVES._entries, "odd", objective)
    with pytest.raises(ConfigError, match=message):
        train_direction(model, pairs(8), SITE, method="odd", **QUICK)
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    "runs",
    [(), (("good", 1),), (("positive", 2),), (("positive", 1), ("positive", 1)), "positive", ("positive", 1), None, (["positive", 1],)],
)
def test_runs_that_there_are_not(runs):
    with pytest.raises(ConfigError, match="the objective 'odd' asks for runs that there are not"):
        register("odd", runs=runs)
