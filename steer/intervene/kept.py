"""An intervention on its way into files, states of a run, and optimisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import ConfigError
from steer.intervene import schedule as schedules
from steer.intervene.gate import Gate
from steer.intervene.operator import Driven, Operator
from steer.intervene.scope import Scope
from steer.model.site import Site


class Kept:
    """What of an intervention is kept. Attributes: see `Intervention`."""

    name: str
    operator: Operator
    site: Site
    scope: Scope
    base: Tensor
    enabled: bool
    phases: tuple[str, ...]
    roles: tuple[str, ...]
    schedule: schedules.Schedule
    gate: Gate | None
    preserve_norm: bool

    @property
    def window(self) -> tuple[int | None, int | None] | None:
        """Bounds of the slice in its scope, None when it does not have just one."""
        slices = self.scope.slices
        return (slices[0].start, slices[0].stop) if len(slices) == 1 else None

    def state(self) -> dict[str, Any]:
        """What changes while it runs: strengths, switch, window, and tensors that are being learned."""
        learned = {name: tensor.detach().cpu().clone() for name, tensor in self.parameters.items()}
        return {"base": self.base.clone(), "enabled": self.enabled, "window": self.window, "learned": learned}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ConfigError when a state is that of another intervention."""
        here, there = (
            {"strengths": len(one["base"]), "window": one["window"] is not None, "learned": _shapes(one["learned"])}
            for one in (self.state(), state)
        )
        self._check_alike(here, there)

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over a state that fits, but for the window, which several may share."""
        self.base, self.enabled = state["base"].clone().cpu(), bool(state["enabled"])
        self.load_learned(state["learned"])

    def load_learned(self, tensors: dict[str, Tensor]) -> None:
        """Puts saved values into the parameters. Raises ConfigError when they are those of another intervention."""
        here = self.parameters
        self._check_alike(_shapes(here), _shapes(tensors))
        with torch.no_grad():
            for name, tensor in tensors.items():
                here[name].copy_(tensor)

    def _check_alike(self, here: dict[str, Any], there: dict[str, Any]) -> None:
        if here != there:
            remedy = "load it into the plan that it was saved from, or one made in the same way"
            raise ConfigError(f"the state of '{self.name}' does not fit", expected=here or "none", found=there or "none", remedy=remedy)

    def to_dict(self) -> dict[str, Any]:
        """JSON form without the tensors."""
        return {
            "name": self.name,
            "operator": self.operator.name,
            "options": self.operator.options(),
            "site": str(self.site),
            "scope": str(self.scope),
            "strength": self.base.tolist(),
            "phases": list(self.phases),
            "roles": list(self.roles),
            "schedule": schedules.to_dict(self.schedule),
            "enabled": self.enabled,
            "gate": None if self.gate is None else self.gate.to_dict(),
            "preserve_norm": self.preserve_norm,
            "learned": sorted(self.parameters),
            "frozen": sorted(name for name, one in self.parameters.items() if not one.requires_grad),
        }

    @property
    def driven(self) -> dict[str, Driven]:
        """Who holds its tensors, by the prefix of their names in a file: none for the operator, for the n-th leaf of its gate `gate<n>.`"""
        leaves = self.gate.leaves() if self.gate is not None else ()
        return {"": self.operator, **{f"gate{number}.": leaf for number, leaf in enumerate(leaves)}}

    def files(self) -> dict[str, Tensor]:
        """Its tensors by name, for a file."""
        return {prefix + name: tensor.detach().cpu() for prefix, one in self.driven.items() for name, tensor in one.tensors.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is being learned, by the names of `files`."""
        return {prefix + name: tensor for prefix, one in self.driven.items() for name, tensor in one.parameters.items()}

    def tie(self, name: str, parameter: nn.Parameter) -> None:
        """Puts the parameter of another intervention in the place of its own, so that one is learned for both."""
        prefix, dot, last = name.rpartition(".")
        self.driven[prefix + dot].tensors[last] = parameter


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
