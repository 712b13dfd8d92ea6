"""Matched random partners of a plan: another direction, the same geometry, an edit as large; what cannot be matched is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from families import FAMILIES, HEAD_DIM, HEADS, LAYERS, WIDTH
from features.feature_plans import autoencoder
from torch import Tensor

import steer
from steer.errors import ConfigError
from steer.experiment.matched import edit_norms, random_partner, sites_of, states_at
from steer.intervene import Intervention, Plan
from steer.intervene.operators.head_shift import HeadShift
from steer.model.tokens import Row

SITE = "layers.1.output"
ROWS = [Row(tuple(torch.randint(7, 96, (12,), generator=torch.Generator().manual_seed(i)).tolist()), 4) for i in range(12)]


def vectors(rows: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def varied(rows: int = 1, share: float = 0.5) -> Tensor:
    """Unit directions with some of the variance that activations have there: a mix of token states and noise."""
    states = states_at(FAMILIES["llama"](), [steer.Site.parse(SITE)], ROWS)[steer.Site.parse(SITE)]
    states = states - states.mean(0)
    of_tokens = torch.randn(rows, len(states), generator=torch.Generator().manual_seed(9)) @ states
    noise = vectors(rows, 8)
    mixed = share * of_tokens / of_tokens.norm(dim=-1, keepdim=True) + (1 - share) * noise / noise.norm(dim=-1, keepdim=True)
    return mixed / mixed.norm(dim=-1, keepdim=True)


def plan(operator: Any, site: Any = SITE, **options: Any) -> Plan:
    return Plan(Intervention(operator, site, **options))


def partner(original: Plan, seed: int = 0) -> tuple[Plan, dict[str, float], dict[str, float]]:
    """A random partner, with the sizes of both."""
    model = FAMILIES["llama"]()
    states = states_at(model, sites_of(original, model), ROWS)
    made = random_partner(original, model, states, seed)
    return made, edit_norms(original, model, states), edit_norms(made, model, states)


def tensors(of: Plan) -> dict[str, Tensor]:
    return {name: tensor.detach() for each in of.interventions for name, tensor in each.operator.tensors.items()}


# ---- edits that add a vector


def test_an_added_vector_keeps_its_length_and_nothing_else() -> None:
    original = plan(steer.Add(vectors(1)[0]), strength=-2.0, scope="response", phases=("train", "generate"), preserve_norm=True)
    made, before, after = partner(original)
    (old,), (new,) = original.interventions, made.interventions
    for field in dataclasses.fields(old):
        if field.name != "operator":
            assert getattr(new, field.name) == getattr(old, field.name), field.name
    v, w = tensors(original)["vector"][0], tensors(made)["vector"][0]
    assert float(w.norm()) == pytest.approx(float(v.norm()), rel=1e-5)
    # cos of two random directions in 32 dimensions: sd 0.18. The vector was made with the generator of seed 0, as a user's may be
    assert abs(float(v @ w) / float(v @ v)) < 0.6
    (name,) = before
    assert before == pytest.approx({name: 2 * float(v.norm())}, rel=1e-4) and after == pytest.approx(before, rel=1e-4)


def test_seeds_differ_and_each_gives_the_same_again() -> None:
    original = plan(steer.Add(vectors(1)[0]))
    first, again, other = (tensors(partner(original, seed)[0])["vector"] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_angles_between_row_slots_stay() -> None:
    base = vectors(1)
    slots = torch.cat([base, 2 * base + 0.1 * vectors(1, 5), torch.zeros(1, WIDTH), vectors(1, 6)])
    original = plan(steer.Add(slots), strength=[1.0, -2.0, 3.0, 0.5])
    made, before, after = partner(original)
    old, new = (tensors(each)["vector"].double() for each in (original, made))
    assert torch.allclose(old @ old.mT, new @ new.mT, atol=1e-4)
    assert after == pytest.approx(before, rel=1e-4)
    lengths = torch.tensor([1.0, 2.0, 3.0, 0.5]) * old.norm(dim=-1)
    assert list(before.values()) == pytest.approx([float(lengths.square().mean().sqrt())], rel=1e-4), "every slot counts, not the first"


def test_a_sparse_vector_is_not_matched_by_itself() -> None:
    """The one direction in the space of a single coordinate is that coordinate."""
    one_hot = torch.zeros(WIDTH)
    one_hot[5] = 3.0
    made, before, after = partner(plan(steer.Add(one_hot)))
    assert abs(float(tensors(made)["vector"][0, 5])) < 2.9 and after == pytest.approx(before, rel=1e-4)


def test_shifted_heads_stay_in_their_heads() -> None:
    directions = torch.randn(2, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    original = plan(HeadShift(directions, [0, 2], HEADS), "layers.1.attn.z")
    made, before, after = partner(original)
    assert isinstance(made.interventions[0].operator, HeadShift)
    by_head = tensors(made)["vector"].unflatten(-1, (HEADS, HEAD_DIM))[0]
    assert by_head[[1, 3]].abs().max() == 0 and by_head[[0, 2]].norm(dim=-1).min() > 0
    assert after == pytest.approx(before, rel=1e-4) and made.interventions[0].operator.heads == [0, 2]


def test_a_pattern_of_sites_stays_a_pattern() -> None:
    original = plan(steer.Add(vectors(1)[0]), "layers.*.output")
    made, before, after = partner(original)
    assert len(sites_of(made, FAMILIES["llama"]())) == LAYERS and made.interventions[0].site == original.interventions[0].site
    assert after == pytest.approx(before, rel=1e-4)


def test_a_vector_of_several_interventions_stays_one() -> None:
    shared = steer.Add(vectors(1)[0])
    original = Plan([Intervention(shared, "layers.0.output", name="a"), Intervention(shared, "layers.2.output", name="b", strength=2.0)])
    made, before, after = partner(original)
    assert original.interventions[0].tensors["vector"] is original.interventions[1].tensors["vector"]
    assert made.interventions[0].tensors["vector"] is made.interventions[1].tensors["vector"]
    assert before.keys() == {"a", "b"} and after == pytest.approx(before, rel=1e-4)


def test_learned_vectors_are_matched_as_they_stand_and_left_alone() -> None:
    operator = steer.Add(vectors(1)[0]).train()
    before = operator.tensors["vector"].detach().clone()
    made, *sizes = partner(plan(operator))
    assert torch.equal(operator.tensors["vector"], before) and operator.tensors["vector"].requires_grad
    assert tensors(made)["vector"].requires_grad is False and sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_a_partner_can_be_saved(tmp_path: Any) -> None:
    made, *_ = partner(plan(steer.Add(vectors(1)[0])))
    back = Plan.load(made.save(tmp_path / "partner"))
    assert torch.equal(tensors(back)["vector"], tensors(made)["vector"])


# ---- edits that read the activation


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: steer.Ablate(varied(1)), id="ablate one direction"),
        pytest.param(lambda: steer.Ablate(varied(3)), id="ablate three"),
        pytest.param(lambda: steer.Clamp(varied(1)[0], low=-0.2, high=0.2), id="clamp"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_edit_that_reads_is_matched_in_what_it_removes(make: Any, seed: int) -> None:
    original = plan(make())
    made, before, after = partner(original, seed)
    (name,) = before
    assert before[name] > 0 and after[name] == pytest.approx(before[name], rel=0.01)
    for key, old in tensors(original).items():
        new = tensors(made)[key]
        if old.shape[-1] == WIDTH:
            assert torch.allclose(old @ old.mT, new @ new.mT, atol=1e-4), "norms and angles within the operator"
            assert torch.linalg.matrix_rank(new).tolist() == torch.linalg.matrix_rank(old).tolist()
        else:
            assert torch.equal(old, new), "bounds and the like are those of the original"


def test_the_size_is_that_of_the_edit_in_the_model() -> None:
    """By hand: the root mean square of what an ablation takes away, on every token of the texts."""
    original, model = plan(steer.Ablate(varied(1))), FAMILIES["llama"]()
    states = states_at(model, sites_of(original, model), ROWS)
    (h,) = states.values()
    assert h.shape == (sum(len(row.ids) for row in ROWS), WIDTH)
    direction = varied(1)[0]
    expected = math.sqrt(float((h.double() @ direction.double()).square().mean()))
    assert list(edit_norms(original, model, states).values()) == pytest.approx([expected], rel=1e-4)


def test_an_edit_out_of_reach_is_refused() -> None:
    """No direction at random holds as much as the mean of all activations together."""
    model = FAMILIES["llama"]()
    states = states_at(model, [steer.Site.parse(SITE)], ROWS)[steer.Site.parse(SITE)]
    direction = torch.linalg.svd(states, full_matrices=False)[2][-1]  # along which nothing varies
    with pytest.raises(ConfigError, match=r"no random direction matches[\s\S]*E\|dh\|\^2") as caught:
        partner(plan(steer.Ablate(direction)))
    assert None not in (caught.value.expected, caught.value.found, caught.value.remedy)


def test_an_operator_without_a_partner_is_refused() -> None:
    class Halve(steer.Operator):
        """h / 2."""

        name = "halve"
        parts = ("factor",)

        def __init__(self) -> None:
            super().__init__({"factor": torch.full((1, WIDTH), 0.5)}, WIDTH)

        def delta(self, h: Tensor, strength: Tensor, per_row: Any) -> Tensor:
            return -strength * per_row["factor"][:, None] * h

    with pytest.raises(ConfigError, match=r"no matched random partner of 'halve@layers.1.output'"):
        partner(plan(Halve()))


def test_without_texts_nothing_is_measured() -> None:
    with pytest.raises(ConfigError, match="no texts on which the size"):
        states_at(FAMILIES["llama"](), [steer.Site.parse(SITE)], [])


def test_the_partner_of_decoder_rows_does_not_pass_for_them() -> None:
    edit = steer.AddDecoder(autoencoder("relu"), [3, 5], [1.0, 2.0])
    plan = Plan(Intervention(edit, SITE))
    partner = random_partner(plan, FAMILIES["llama"](), {}, 0).interventions[0].operator
    assert type(partner) is steer.Add and "decoder" not in partner.describe()
    assert float(partner.tensors["vector"].norm()) == pytest.approx(float(edit.tensors["vector"].norm()), rel=1e-5)
