"""Arms of a steering experiment: the same training run with one thing changed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from steer.directions.direction import Direction
from steer.errors import ConfigError
from steer.intervene import Intervention, Plan
from steer.intervene.operators.add import Add

WHEN = ("never", "train", "inference")
DIRECTIONS = ("none", "trait", "random")


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name, label: short name and a phrase for the report.
        when: `never`, during `train`ing only, or at `inference` only (then the weights are those of the arm `uses`).
        direction: `trait`, a `random` one whose vector is as long, at the same site, or `none`.
        strength: factor of the vector; 1 is one class gap, below 0 is against the direction.

    Raises:
        ConfigError: an unknown word, or keys that contradict each other.
    """

    name: str
    label: str
    when: str = "never"
    direction: str = "none"
    strength: float = 0.0
    uses: str | None = None

    def __post_init__(self) -> None:
        arm, keys = f"arm '{self.name}'", f"set experiment.arms.{self.name}"
        for value, known, what in ((self.when, WHEN, "when"), (self.direction, DIRECTIONS, "direction")):
            if value not in known:
                raise ConfigError(
                    f"{arm}: unknown {what} '{value}'", expected=", ".join(known), found=value, remedy=f"{keys}.{what} to one of these"
                )
        if (self.when == "never") != (self.direction == "none"):
            found = f"when={self.when}, direction={self.direction}"
            raise ConfigError(
                f"{arm} is contradictory",
                expected="a direction exactly when it is steered",
                found=found,
                remedy=f"{keys}.when or .direction",
            )
        if (self.when == "inference") != (self.uses is not None):
            found = f"when={self.when}, uses={self.uses}"
            raise ConfigError(
                f"{arm} is contradictory", expected="`uses` exactly with when=inference", found=found, remedy=f"{keys}.when or .uses"
            )
        if isinstance(self.strength, bool) or not isinstance(self.strength, int | float) or not math.isfinite(self.strength):
            raise ConfigError(f"{arm}: strength is no number", expected="a finite number", found=self.strength, remedy=f"{keys}.strength")

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
        known = [field.name for field in fields(Arm)][1:]
        if not isinstance(spec, dict) or (unknown := sorted(set(spec) - set(known))):
            found = unknown if isinstance(spec, dict) else spec
            raise ConfigError(f"arm '{name}' has unknown keys", expected=known, found=found, remedy=f"correct experiment.arms.{name}")
        arms.append(Arm(str(name), **{"label": str(name), **spec}))
    trained = [arm.name for arm in arms if arm.when != "inference"]
    if not trained:
        remedy = "leave an arm with when=never or when=train in experiment.arms"
        raise ConfigError(
            "an experiment needs a trained arm", expected="at least one", found=[arm.name for arm in arms] or "no arm", remedy=remedy
        )
    for arm in arms:
        if arm.uses is not None and arm.uses not in trained:
            raise ConfigError(
                f"arm '{arm.name}' uses '{arm.uses}', which is not trained",
                expected=f"one of {', '.join(trained)}",
                found=arm.uses,
                remedy=f"set experiment.arms.{arm.name}.uses, or leave the arm out with experiment.arms.{arm.name}=null",
            )
    return arms


def random_like(direction: Direction, seed: int) -> torch.Tensor:
    """[width] isotropic random vector of the same length as the direction."""
    vector = torch.randn(direction.vector.shape, generator=torch.Generator().manual_seed(seed))
    return vector * (direction.vector.norm() / vector.norm())
