"""The state of an attachment: what a checkpoint of a training run has to hold of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.intervene.active import ActiveIntervention

if TYPE_CHECKING:
    from steer.intervene.attachment import Attachment


def state_dict(attachment: Attachment) -> dict[str, Any]:
    """Step, and for each intervention its strengths (`base`), switch (`enabled`), window and learned tensors."""
    return {
        "step": attachment.current_step,
        "interventions": {active.name: _state_of(active) for active in attachment.interventions},
    }


def load_state_dict(attachment: Attachment, state: Mapping[str, Any]) -> None:
    """Takes over a state. Raises ConfigError, before anything changes, when it belongs to a plan with other interventions."""
    saved = state["interventions"]
    names = [active.name for active in attachment.interventions]
    if set(saved) != set(names):
        raise _other_plan(names, list(saved))
    windows = {}
    for active in attachment.interventions:
        own = saved[active.name]
        _check_alike(active, _signature(_state_of(active)), _signature(own))
        if own["window"] is not None:
            active.scope_mask.scope.with_window(*own["window"])  # raises where it may not have these bounds
            windows[active] = tuple(own["window"])
    for active in attachment.interventions:
        own = saved[active.name]
        active.set_base(own["base"].reshape(-1).tolist())
        active.enabled = bool(own["enabled"])
        load_learned(active, own["learned"])
    attachment.move_windows(windows)
    attachment.step(int(state["step"]))


def load_learned(active: ActiveIntervention, tensors: Mapping[str, Tensor]) -> None:
    """Puts saved values into the parameters. Raises ConfigError when they are those of another intervention."""
    parameters = active.description.parameters
    _check_alike(active, _shapes(parameters), _shapes(tensors))
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _state_of(active: ActiveIntervention) -> dict[str, Any]:
    window = active.scope_mask.scope.window
    return {
        "base": torch.tensor(active.base),
        "enabled": active.enabled,
        "window": None if window is None else (window.start, window.stop),
        "learned": {name: parameter.detach().cpu().clone() for name, parameter in active.description.parameters.items()},
    }


def _signature(state: Mapping[str, Any]) -> dict[str, Any]:
    return {"strengths": len(state["base"]), "window": state["window"] is not None, "learned": _shapes(state["learned"])}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _check_alike(active: ActiveIntervention, here: dict[str, Any], saved: dict[str, Any]) -> None:
    if here != saved:
        raise _unfitting_state(active.name, here, saved)


# ---- errors


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
