"""Boundaries: ranges are those of harmless text, the loss on other text stays within the budget, and what lies outside is pulled in."""

import pytest
import torch
from families import WIDTH
from hand import hook_count, ids

import steer
from steer.directions import fit_boundary
from steer.errors import ConfigError, ContrastError
from steer.model.likelihood import response_logprobs
from steer.model.tokens import Row

SITE = "layers.1.output"


def texts(count: int, start: int) -> list[Row]:
    return [Row(tuple(ids(1, 8, seed)[0].tolist()), 1) for seed in range(start, start + count)]


def own_words(model, count: int) -> list[Row]:
    """Texts that the model goes on with by itself, whose loss any change of the model raises."""
    with torch.no_grad():
        said = [model.generate(ids(1, 4, 100 + i), max_new_tokens=6, do_sample=False, eos_token_id=None)[0] for i in range(count)]
    return [Row(tuple(text.tolist()), 4) for text in said]


def test_the_tightest_ranges_within_the_budget(tiny):
    model, harmless = tiny("llama"), texts(30, 0)
    neutral = own_words(model, 6)
    found = fit_boundary(model, harmless, neutral, ["layers.*.output"], max_nats=0.01, progress=False)
    plain = -float(response_logprobs(model, neutral, pad=0).mean())
    with found.plan.attached(model):
        bounded = -float(response_logprobs(model, neutral, pad=0).mean())
    assert found.loss == pytest.approx(plain) and found.bounded_loss == pytest.approx(bounded) and bounded - plain <= 0.01
    tighter = fit_boundary(model, harmless, neutral, ["layers.*.output"], max_nats=5.0, progress=False)
    assert set(tighter.widths.values()) == {0.6} and min(found.widths.values()) >= 0.6 and hook_count(model) == 0
    with pytest.raises(ConfigError, match="within the budget(.|\n)*at the largest width, 0.01"):
        fit_boundary(model, harmless, neutral, [SITE], max_nats=1e-6, widths=[0.01], progress=False)


def test_the_range_is_that_of_harmless_text_and_holds_what_leaves_it(tiny):
    model, harmless = tiny("llama"), texts(10, 0)
    found = fit_boundary(model, harmless, texts(4, 100), [SITE], max_nats=9.0, widths=[1.0], softness=0.0, progress=False)
    with torch.no_grad():
        states = torch.cat([model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[2][0] for row in harmless])
    operator = found.plan.interventions[0].operator
    assert torch.allclose(operator.tensors["low"][0], states.amin(0), atol=1e-5)
    assert torch.allclose(operator.tensors["high"][0], states.amax(0), atol=1e-5)
    push = steer.Intervention(steer.Add(50 * torch.ones(WIDTH)), SITE)
    with steer.Plan([push, *found.plan.interventions]).attached(model), torch.no_grad():
        reached = model(ids(), output_hidden_states=True).hidden_states[2]
    assert torch.allclose(reached, states.amax(0).expand_as(reached), atol=1e-3)


def test_a_soft_bound_has_the_gradient_of_its_edit():
    low, high = -torch.ones(3), torch.ones(3)
    h = torch.tensor([[[0.5, 1.3, -4.0]]], dtype=torch.float64, requires_grad=True)
    operator = steer.Bound(low, high, softness=0.25)

    def edited(h):
        return operator.apply(h, torch.ones(1, 1, 1), None, operator.tensors)

    assert torch.autograd.gradcheck(edited, h)
    (slope,) = torch.autograd.grad(edited(h).sum(), h)
    assert slope[0, 0, 0] == 1 and 0 < slope[0, 0, 1] < 1 and slope[0, 0, 2] < 1e-3
    assert torch.allclose(edited(h)[0, 0, 2], torch.tensor(-1.5, dtype=torch.float64), atol=1e-2)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda m: steer.Bound(torch.ones(3), torch.zeros(3)), ConfigError, "low above high in 3 of 3"),
        (lambda m: steer.Bound(torch.ones(3), torch.ones(4)), ConfigError, "range of 'bound'"),
        (lambda m: steer.Bound(torch.zeros(3), torch.ones(3), softness=-1), ConfigError, "softness"),
        (lambda m: fit_boundary(m, texts(3, 0), texts(3, 0), [SITE]), ContrastError, "3 both"),
        (lambda m: fit_boundary(m, [], texts(3, 0), [SITE]), ContrastError, "0 harmless"),
        (lambda m: fit_boundary(m, texts(3, 0), texts(3, 9), [SITE], max_nats=0), ConfigError, "budget"),
        (lambda m: fit_boundary(m, texts(3, 0), texts(3, 9), [SITE], widths=[]), ConfigError, "no widths"),
    ],
)
def test_bad_input_is_refused(make, error, match, tiny):
    with pytest.raises(error, match=match):
        make(tiny("llama"))
