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
        if self.when not in WHEN:
            raise _unknown_word(self, "when", WHEN)
        if self.direction not in DIRECTIONS:
            raise _unknown_word(self, "direction", DIRECTIONS)
        if (self.when == "never") != (self.direction == "none"):
            raise _contradiction(self, "direction", "a direction exactly when it is steered")
        if (self.when == "inference") != (self.uses is not None):
            raise _contradiction(self, "uses", "`uses` exactly with when=inference")
        if isinstance(self.strength, bool) or not isinstance(self.strength, int | float) or not math.isfinite(self.strength):
            raise _no_strength(self)

    def plan(self, direction: Direction, *, scope: str, seed: int, fingerprint: dict[str, object] | None) -> Plan | None:
        """The plan of this arm, None for an arm that is never steered."""
        if self.when == "never":
            return None
        vector = direction.vector if self.direction == "trait" else random_like(direction, seed)
        phases = ("train",) if self.when == "train" else ("validate", "generate")
        intervention = Intervention(Add(vector), direction.site, scope=scope, strength=self.strength, phases=phases, name=self.name)
        return Plan(intervention, fingerprint=fingerprint)


def read_arms(specs: Any) -> list[Arm]:
    """Arms from their configuration, name -> keys of `Arm`; a name that is set to null is left out.

    Raises:
        ConfigError: no arms, an unknown key, or an inference arm whose trained arm is missing.
    """
    known = [field.name for field in fields(Arm) if field.name != "name"]
    arms = []
    for name, spec in (specs or {}).items():
        if spec is None:
            continue
        if not isinstance(spec, dict) or set(spec) - set(known):
            raise _unknown_keys(name, spec, known)
        arms.append(Arm(str(name), **{"label": str(name), **spec}))
    trained = [arm.name for arm in arms if arm.when != "inference"]
    if not trained:
        raise _nothing_trained(arms)
    for arm in arms:
        if arm.uses is not None and arm.uses not in trained:
            raise _untrained(arm, trained)
    return arms


def random_like(direction: Direction, seed: int) -> torch.Tensor:
    """[width] isotropic random vector of the same length as the direction."""
    vector = torch.randn(direction.vector.shape, generator=torch.Generator().manual_seed(seed))
    return vector * (direction.vector.norm() / vector.norm())


# ---- errors


def _unknown_word(arm: Arm, key: str, known: tuple[str, ...]) -> ConfigError:
    word = getattr(arm, key)
    remedy = f"set experiment.arms.{arm.name}.{key} to one of these"
    return ConfigError(f"arm '{arm.name}': unknown {key} '{word}'", expected=", ".join(known), found=word, remedy=remedy)


def _contradiction(arm: Arm, key: str, expected: str) -> ConfigError:
    found = f"when={arm.when}, {key}={getattr(arm, key)}"
    remedy = f"set experiment.arms.{arm.name}.when or .{key}"
    return ConfigError(f"arm '{arm.name}' is contradictory", expected=expected, found=found, remedy=remedy)


def _no_strength(arm: Arm) -> ConfigError:
    remedy = f"set experiment.arms.{arm.name}.strength"
    return ConfigError(f"arm '{arm.name}': strength is no number", expected="a finite number", found=arm.strength, remedy=remedy)


def _unknown_keys(name: str, spec: Any, known: list[str]) -> ConfigError:
    found = sorted(set(spec) - set(known)) if isinstance(spec, dict) else spec
    return ConfigError(f"arm '{name}' has unknown keys", expected=known, found=found, remedy=f"correct experiment.arms.{name}")


def _nothing_trained(arms: list[Arm]) -> ConfigError:
    found = [arm.name for arm in arms] or "no arm"
    remedy = "leave an arm with when=never or when=train in experiment.arms"
    return ConfigError("an experiment needs a trained arm", expected="at least one", found=found, remedy=remedy)


def _untrained(arm: Arm, trained: list[str]) -> ConfigError:
    return ConfigError(
        f"arm '{arm.name}' uses '{arm.uses}', which is not trained",
        expected=f"one of {', '.join(trained)}",
        found=arm.uses,
        remedy=f"set experiment.arms.{arm.name}.uses, or leave the arm out with experiment.arms.{arm.name}=null",
    )
