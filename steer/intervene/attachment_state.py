"""The state of an attachment, or of a plan before its first attach: what a checkpoint of a training run has to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.checks import integer, whole_number
from steer.errors import ConfigError
from steer.intervene.intervention import Intervention
from steer.intervene.operator import check_finite
from steer.intervene.schedule import check_product, factor_at
from steer.intervene.scope import Scope

if TYPE_CHECKING:
    from steer.intervene.attachment import Attachment
    from steer.intervene.plan import Plan


def state_dict(attachment: Attachment) -> dict[str, Any]:
    """Step, and for each intervention its strengths (`base`), switch (`enabled`), window and learned tensors."""
    return {
        "step": attachment.current_step,
        "interventions": {
            intervention.name: _state_of(intervention, active.base, active.enabled, active.scope_mask.scope)
            for intervention in attachment.plan.interventions
            for active in (attachment[intervention.name],)
        },
    }


def initial_state(plan: Plan) -> dict[str, Any]:
    """The state that an attachment of this plan begins with."""
    return {"step": plan.step, "interventions": {intervention.name: _initial_state(intervention) for intervention in plan.interventions}}


def check_state(plan: Plan, state: Mapping[str, Any]) -> None:
    """Raises ConfigError for what is no state, and for one that belongs to a plan with other interventions; NonFiniteError for strengths
    that are not finite."""
    _check_keys("the state of a plan", state, ("step", "interventions"))
    whole_number(integer(state["step"]), "the optimiser step of a plan")
    saved = state["interventions"]
    if not isinstance(saved, Mapping):
        raise _no_state("the interventions in the state of a plan", "a state of each, by its name", saved)
    names = [intervention.name for intervention in plan.interventions]
    if set(saved) != set(names):
        raise _other_plan(names, list(saved))
    for intervention in plan.interventions:
        own = saved[intervention.name]
        _check_types(f"the state of '{intervention.name}'", own)
        _check_alike(intervention, _signature(_initial_state(intervention)), _signature(own))
        if own["window"] is not None:
            intervention.scope.with_window(*own["window"])  # raises where it may not have these bounds


def load_state_dict(attachment: Attachment, state: Mapping[str, Any]) -> None:
    """Takes over a state.

    Raises, before anything changes:
        ConfigError: it is no state, or belongs to a plan with other interventions; a schedule fails at its step. NonFiniteError.
    """
    check_state(attachment.plan, state)
    step = integer(state["step"])
    for name, own in state["interventions"].items():
        factor = factor_at(attachment[name].schedule, step)
        check_product(own["base"].reshape(-1).tolist(), factor if own["enabled"] else 0.0, name)
    windows = {}
    for intervention in attachment.plan.interventions:
        own = state["interventions"][intervention.name]
        load_learned(intervention, own["learned"])
        for active in attachment.at_sites(intervention.name):
            active.set_base(own["base"].reshape(-1).tolist())
            active.enabled = own["enabled"]
            if own["window"] is not None:
                windows[active] = tuple(own["window"])
    attachment.move_windows(windows)
    attachment.set_step(step)


def load_learned(intervention: Intervention, tensors: Mapping[str, Tensor]) -> None:
    """Puts saved values into the parameters. Raises ConfigError when they are those of another intervention."""
    parameters = intervention.parameters
    _check_alike(intervention, _shapes(parameters), _shapes(tensors))
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _initial_state(intervention: Intervention) -> dict[str, Any]:
    return _state_of(intervention, intervention.strength, intervention.enabled, intervention.scope)


def _state_of(intervention: Intervention, base: Sequence[float], enabled: bool, scope: Scope) -> dict[str, Any]:
    window = scope.window
    return {
        "base": torch.tensor(base),
        "enabled": enabled,
        "window": None if window is None else (window.start, window.stop),
        "learned": {name: parameter.detach().cpu().clone() for name, parameter in intervention.parameters.items()},
    }


def _signature(state: Mapping[str, Any]) -> dict[str, Any]:
    return {"strengths": len(state["base"]), "window": state["window"] is not None, "learned": _shapes(state["learned"])}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _check_keys(what: str, state: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(state, Mapping) or set(state) != set(keys):
        found = f"{type(state).__name__} with {', '.join(map(str, state)) or 'nothing'}" if isinstance(state, Mapping) else repr(state)
        raise _no_state(what, f"a mapping with {', '.join(keys)} and nothing else", found)


def _check_types(what: str, own: Any) -> None:
    _check_keys(what, own, ("base", "enabled", "window", "learned"))
    base, window, learned = own["base"], own["window"], own["learned"]
    if not isinstance(base, Tensor) or not base.is_floating_point() or not base.dim():
        raise _no_state(f"`base` in {what}", "a tensor with the strength of each row slot", base)
    check_finite(base, f"`base` in {what}")
    if not isinstance(own["enabled"], bool):
        raise _no_state(f"`enabled` in {what}", "True or False", own["enabled"])
    if window is not None and not (isinstance(window, tuple | list) and len(window) == 2 and all(map(_is_bound, window))):
        raise _no_state(f"`window` in {what}", "None, or its start and stop, each an integer or None", window)
    if not isinstance(learned, Mapping) or not all(isinstance(tensor, Tensor) for tensor in learned.values()):
        raise _no_state(f"`learned` in {what}", "a mapping with a tensor for each parameter", learned)


def _is_bound(bound: Any) -> bool:
    return bound is None or type(bound) is int


def _check_alike(intervention: Intervention, here: dict[str, Any], saved: dict[str, Any]) -> None:
    if here != saved:
        raise _unfitting_state(intervention.name, here, saved)


# ---- errors


def _no_state(what: str, expected: str, found: Any) -> ConfigError:
    remedy = "give what `state_dict()` of an attachment returned"
    return ConfigError(f"{what} is not what an attachment saves", expected=expected, found=str(found)[:200], remedy=remedy)


def _other_plan(names: list[str], saved: list[str]) -> ConfigError:
    return ConfigError(
        "this state belongs to another plan",
        expected=f"the interventions {', '.join(names)}",
        found=", ".join(saved) or "no interventions",
        remedy="load it into the plan that it was saved from, or one made in the same way",
    )


def _unfitting_state(name: str, here: dict[str, Any], saved: dict[str, Any]) -> ConfigError:
    remedy = "load it into the plan that it was saved from, or one made in the same way"
    return ConfigError(f"the state of '{name}' does not fit", expected=here or "none", found=saved or "none", remedy=remedy)
