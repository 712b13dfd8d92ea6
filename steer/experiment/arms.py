"""Arms of a steering experiment: the same training run with one thing changed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from steer.directions.direction import Direction
from steer.errors import ConfigError
from steer.intervene import Add, Intervention, Plan

WHEN = ("never", "train", "inference")
DIRECTIONS = ("none", "trait", "random")


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name, label: short name and a phrase for the report.
        when: `never`, during `train`ing only, or at `inference` only (then the weights are those of the arm `uses`).
        direction: `trait`, a `random` one of the same length at the same site, or `none`.
        strength: factor of the vector; 1 is one class gap.
    """

    name: str
    label: str
    when: str = "never"
    direction: str = "none"
    strength: float = 0.0
    uses: str | None = None

    def __post_init__(self) -> None:
        for value, known, what in ((self.when, WHEN, "when"), (self.direction, DIRECTIONS, "direction")):
            if value not in known:
                raise ConfigError(f"arm '{self.name}': unknown {what} '{value}'", expected=", ".join(known))
        if (self.when == "never") != (self.direction == "none"):
            raise ConfigError(f"arm '{self.name}' is contradictory", found=f"when={self.when}, direction={self.direction}")
        if (self.when == "inference") != (self.uses is not None):
            raise ConfigError(
                f"arm '{self.name}': `uses` names the trained arm of an inference arm", found=f"when={self.when}, uses={self.uses}"
            )

    def plan(self, direction: Direction, *, scope: str, seed: int, fingerprint: dict[str, object] | None) -> Plan | None:
        """The plan of this arm, None for an arm that is never steered."""
        if self.when == "never":
            return None
        vector = direction.vector if self.direction == "trait" else random_like(direction, seed)
        phases = ("train",) if self.when == "train" else ("validate", "generate")
        one = Intervention(Add(vector), direction.site, scope=scope, strength=self.strength, phases=phases, name=self.name)
        return Plan(one, fingerprint=fingerprint)


def read_arms(specs: Any) -> list[Arm]:
    """Arms from their configuration, name -> keys of `Arm`; a name that is set to null is left out.

    Raises:
        ConfigError: no arms, an unknown key, or an inference arm whose trained arm is missing.
    """
    arms = []
    for name, spec in (specs or {}).items():
        if spec is None:
            continue
        if unknown := set(spec) - {field.name for field in fields(Arm)}:
            raise ConfigError(f"arm '{name}' has unknown keys", expected=[f.name for f in fields(Arm)][1:], found=sorted(unknown))
        arms.append(Arm(**{"label": str(name), **spec, "name": str(name)}))
    trained = [arm.name for arm in arms if arm.when != "inference"]
    if not trained:
        raise ConfigError("an experiment needs at least one trained arm", found=[arm.name for arm in arms])
    for arm in arms:
        if arm.uses is not None and arm.uses not in trained:
            raise ConfigError(f"arm '{arm.name}' uses '{arm.uses}', which is not trained", expected=f"one of {', '.join(trained)}")
    return arms


def random_like(direction: Direction, seed: int) -> torch.Tensor:
    """[width] isotropic random vector of the same length as the direction."""
    vector = torch.randn(direction.vector.shape, generator=torch.Generator().manual_seed(seed))
    return vector * (direction.vector.norm() / vector.norm())
