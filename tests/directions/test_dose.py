"""Doses: all of them in one batch measure what each would alone, and what is chosen does least damage, on texts the direction never saw."""

import dataclasses
import json

import pytest
import torch
from directions.direction_helpers import SITE, controlled, pairs, running_text
from hand import hook_count

from steer.directions import ContrastSet, DoseCurve, dose_curve, extract
from steer.directions.dose import DosePoint, side_effects
from steer.directions.sweep import pair_gaps, sweep, sweep_plan
from steer.errors import ConfigError, ContrastError, NonFiniteError
from steer.intervene import Add, Intervention, Plan
from steer.model.likelihood import response_logprobs
from steer.model.tokens import Row

DOSES = (0.25, 1.0, 4.0)


def test_a_curve_equals_one_strength_at_a_time():
    model, direction = controlled()
    contrast, neutral = pairs(), running_text()
    curve = dose_curve(model, direction, contrast, neutral, doses=DOSES, progress=False)

    def measured(strength: float) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Gap of each pair, next-token log-probabilities and loss of the neutral texts, one text at a time."""
        with Plan(Intervention(Add(direction.vector), SITE, scope="response", strength=strength)).attached(model):
            positive, negative = (response_logprobs(model, side, pad=0, max_tokens=1) for side in (contrast.positive, contrast.negative))
            tables, losses = [], []
            for row in neutral:
                labels = torch.tensor([[-100, *row.ids[1:]]])
                with torch.no_grad():
                    logits = model(torch.tensor([row.ids]), labels=labels, use_cache=False).logits[0, :-1].double().log_softmax(-1)
                tables.append(logits)
                losses.append(-logits[range(len(row.ids) - 1), list(row.ids[1:])])
        return positive - negative, torch.cat(tables), float(torch.cat(losses).mean())

    gap, table, loss = measured(0.0)
    assert curve.gap == pytest.approx(float(gap.mean()), abs=1e-5)
    assert torch.tensor(curve.perplexity).log() == pytest.approx(loss, abs=1e-5)
    for point, dose in zip(curve.points, DOSES, strict=True):
        strength = dose * direction.metrics["activation_norm"] / float(direction.vector.norm())
        assert (point.dose, point.strength) == (dose, pytest.approx(strength))
        steered_gap, steered_table, steered_loss = measured(strength)
        change = steered_gap - gap
        assert point.effect == pytest.approx(float(change.mean()), abs=1e-5)
        assert point.effect_se == pytest.approx(float(change.std() / len(change) ** 0.5), abs=1e-5)
        assert point.wrong_way == float((change < 0).double().mean())
        assert point.kl == pytest.approx(float((table.exp() * (table - steered_table)).sum(-1).mean()), abs=1e-5)
        assert point.perplexity_ratio == pytest.approx(torch.tensor(steered_loss - loss).exp().item(), rel=1e-4)
    assert (curve.n_pairs, curve.n_neutral) == (6, 4) and hook_count(model) == 0


def test_batches_do_not_change_the_measure():
    """Measures do not depend on which texts share a batch and its padding."""
    model, direction = controlled()
    vectors = torch.tensor([0.0, 1.0, 3.0])[:, None] * direction.vector
    contrast = pairs(8)
    together = pair_gaps(model, direction, contrast, vectors)
    single_pairs = [ContrastSet((p,), (q,), True) for p, q in zip(contrast.positive, contrast.negative, strict=True)]
    alone = torch.cat([pair_gaps(model, direction, pair, vectors) for pair in single_pairs], 1)
    assert torch.allclose(together, alone, atol=1e-5) and together.shape == (3, 8)
    assert (together[2] > together[1]).all() and (together[1] > together[0]).all()


def test_the_control_of_a_vector_runs_beside_it():
    """Vectors may differ from the direction: a zero vector leaves its rows unchanged, and a control vector has its own effect."""
    model, direction = controlled()
    control = torch.randn(32, generator=torch.Generator().manual_seed(3))
    vectors = torch.stack([torch.zeros(32), direction.vector, control / control.norm()])
    kl, loss = side_effects(model, direction, running_text(), vectors)
    assert kl[0] == 0 and kl[1] > 0 and kl[2] > 0 and len(set(loss.tolist())) == 3
    gaps = pair_gaps(model, direction, pairs(), vectors)
    assert (gaps[1] - gaps[0]).mean() > (gaps[2] - gaps[0]).abs().mean()


def curve(*points: tuple[float, float, float, float], max_kl: float = 0.1, share: float = 0.5) -> DoseCurve:
    """From (dose, effect, kl, perplexity ratio)."""
    dose_points = tuple(DosePoint(dose, dose * 3, effect, 0.01, 0.0, kl, ratio) for dose, effect, kl, ratio in points)
    return DoseCurve(SITE, "planted", "response", dose_points, max_kl, 1.1, share, 0.0, 10.0, 6, 4)


def test_what_is_chosen_is_not_the_largest_effect():
    measured = curve((0.1, 0.2, 0.01, 1.0), (0.2, 0.5, 0.03, 1.01), (0.3, 0.6, 0.05, 1.02), (0.5, 0.9, 0.09, 1.05), (0.7, 4.0, 2.0, 9.0))
    assert [point.dose for point in measured.working] == [0.2, 0.3, 0.5]  # at least half of 0.9; beyond, the budget is broken
    assert measured.chosen.dose == 0.2  # KL is lowest there
    assert dataclasses.replace(measured, share=0.9).chosen.dose == 0.5


def test_a_dose_beyond_a_broken_budget_is_not_in_the_range():
    measured = curve((0.1, 0.2, 0.01, 1.0), (0.2, 0.5, 0.3, 1.01), (0.3, 0.6, 0.05, 1.0))
    assert [point.dose for point in measured.working] == [0.1]
    broken = curve((0.1, 0.2, 0.01, 1.2))
    assert not broken.working  # by perplexity


@pytest.mark.parametrize("points", [[(0.1, 0.019, 0.01, 1.0)], [(0.1, -0.5, 0.01, 1.0)], [(0.1, 0.5, 0.2, 1.0)]])
def test_no_dose_that_works_is_an_error_with_the_curve_in_it(points):
    measured = curve(*points)
    with pytest.raises(ConfigError, match=rf"no dose at '{SITE}' works[\s\S]*dose 0.1: effect {points[0][1]:.3g}"):
        _ = measured.chosen
    assert json.loads(json.dumps(measured.to_dict()))["chosen"] is None


def test_a_curve_becomes_json():
    measured = curve((0.1, 0.2, 0.01, 1.0))
    content = json.loads(json.dumps(measured.to_dict()))
    assert content["chosen"]["dose"] == content["points"][0]["dose"] == 0.1 and content["max_kl"] == 0.1


def test_texts_that_made_the_direction_may_not_calibrate_it(tmp_path):
    """They may not serve as pairs or as neutral text, nor after a round trip through a file; held-out texts may."""
    model, _ = controlled()
    contrast = pairs(12)
    made_of, held = contrast.split(0.25, 0)
    directions = extract(model, contrast, [SITE], name="x", holdout=0.25, seed=0, progress=False)
    directions.save(tmp_path / "x")
    for direction in (directions[SITE], type(directions).load(tmp_path / "x")[SITE]):
        dose_curve(model, direction, held, running_text(), doses=(0.1,), progress=False)
        with pytest.raises(ContrastError, match=r"these pairs use texts that the direction was made from[\s\S]*found: 2 that it has"):
            overlapping = ContrastSet((*held.positive, made_of.positive[0]), (*held.negative, made_of.negative[0]), True)
            dose_curve(model, direction, overlapping, running_text(), doses=(0.1,), progress=False)
        with pytest.raises(ContrastError, match="the neutral texts"):
            dose_curve(model, direction, held, [made_of.positive[0]], doses=(0.1,), progress=False)


def test_bad_input_is_named():
    model, direction = controlled()
    unpaired = ContrastSet(pairs().positive, pairs().negative, paired=False)
    prompts = ContrastSet(*(tuple(Row(row.ids, len(row.ids)) for row in side) for side in (pairs().positive, pairs().negative)), True)
    for contrast, options, error, message in [
        (pairs(), {"doses": ()}, ConfigError, "doses must be above 0"),
        (pairs(), {"doses": (0.1, -0.5)}, ConfigError, "swap the two sides"),
        (unpaired, {}, ContrastError, "two sets of unrelated texts"),
        (prompts, {}, ContrastError, "texts without answers"),
        (pairs(1), {}, ContrastError, "one pair has no standard error"),
    ]:
        with pytest.raises(error, match=message):
            dose_curve(model, direction, contrast, running_text(), progress=False, **options)
    with pytest.raises(ContrastError, match="no neutral text"):
        dose_curve(model, direction, pairs(), [], progress=False)
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        with torch.no_grad():
            model.get_output_embeddings().weight[0, 0] = float("nan")
        sweep(model, sweep_plan(direction.site, torch.zeros(2, 32), "all"), running_text(), 2, lambda *_: None)
    assert hook_count(model) == 0


def test_the_model_is_left_as_it_was():
    model, direction = controlled()
    model.train()
    dose_curve(model, direction, pairs(), running_text(), doses=(0.1,), progress=False)
    assert model.training and all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert hook_count(model) == 0
