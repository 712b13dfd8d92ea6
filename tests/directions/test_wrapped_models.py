"""Choosing and training a direction works on a model in use: with adapters, compiled, in half precision, with another plan attached."""

from collections.abc import Callable

import pytest
import torch
from directions.direction_helpers import GOOD, SITE, controlled, pairs, running_text
from hand import hook_count
from peft import LoraConfig, get_peft_model
from torch import nn

from steer.directions import dose_curve, screen, select, train_direction
from steer.directions.sweep import pair_gaps
from steer.intervene import Add, Intervention, Plan
from steer.model.tokens import Row


def adapted(model: nn.Module) -> nn.Module:
    """LoRA that changes nothing yet, in training mode with checkpointing, as in the middle of a run."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.gradient_checkpointing_enable()
    return wrapped.train()


def in_module(model: nn.Module) -> nn.Module:
    wrapper = nn.ModuleDict({"net": model})
    wrapper.forward = lambda **batch: model(**batch)
    return wrapper


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"peft": adapted, "compiled": torch.compile, "module": in_module}


def measured(wrap: Callable[[nn.Module], nn.Module]) -> list[float]:
    raw, direction = controlled()
    model, contrast, neutral = wrap(raw), pairs(8), running_text()
    before, hooks = [(parameter, parameter.requires_grad) for parameter in model.parameters()], hook_count(raw)
    curve = dose_curve(model, direction, contrast, neutral, doses=(0.5, 2.0), progress=False)
    screening = screen(model, direction, contrast, progress=False)
    prompts = [Row(row.ids, len(row.ids)) for row in neutral]
    chosen = select(model, [direction], showing=prompts, lacking=prompts, tokens=[GOOD], max_kl=9.0, progress=False)
    trained = train_direction(model, contrast, SITE, name="x", method="reps", steps=3, progress=False)[SITE]
    assert all(parameter.requires_grad is learning and parameter.grad is None for parameter, learning in before)
    assert hook_count(raw) == hooks
    points = [value for point in curve.points for value in (point.effect, point.kl, point.perplexity_ratio)]
    return [*points, *screening.slopes, chosen.candidates[0].bypass, chosen.candidates[0].induce, *trained.vector.tolist()]


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_a_wrapped_model_gives_the_same(wrapper):
    assert measured(WRAPPERS[wrapper]) == pytest.approx(measured(lambda model: model), abs=2e-4)


def test_half_precision_gives_nearly_the_same():
    assert measured(lambda model: model.bfloat16()) == pytest.approx(measured(lambda model: model), abs=0.3, rel=0.2)


def test_a_plan_that_is_attached_stays_in_force():
    """The measure is the change to the model as it is already steered."""
    model, direction = controlled()
    vectors = torch.tensor([0.0, 1.0, 2.0])[:, None] * direction.vector
    plain = pair_gaps(model, direction, pairs(), vectors)
    with Plan(Intervention(Add(direction.vector), SITE, scope="response")).attached(model):
        steered = pair_gaps(model, direction, pairs(), vectors)
    assert torch.allclose(steered[:2], plain[1:], atol=1e-4) and hook_count(model) == 0
