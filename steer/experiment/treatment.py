"""Treatments: what an arm of an experiment does to a model. A new one is a file with one registered class.

A treatment acts in training, at inference, or in both, and knows its matched random partners: the same thing as strong, along directions,
in words or on rows that mean nothing. An arm is a treatment and a `when` (`steer.experiment.arms`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from steer.directions.direction import Directions
from steer.errors import ConfigError
from steer.experiment.experiment_features import ExperimentFeatures
from steer.experiment.matched import sites_of, states_at
from steer.experiment.pronoun_circuits import PronounCircuits
from steer.intervene import Plan
from steer.model.site import Site
from steer.model.tokens import Row
from steer.registry import Registry

NEVER, TRAIN, INFERENCE, BOTH, BAKED = WHEN = ("never", "train", "inference", "both", "baked")


@dataclass
class Bench:
    """What treatments are made from, before anything acts.

    Attributes:
        model, tokenizer: the base.
        rows: texts of the experiment, on which the sizes of edits are measured.
        directions: by the names that plans in text form use.
        fingerprint: of the base.
        features: of a dictionary, that arms edit; None for an experiment without a section `features`.
        circuits: of pronouns, that arms ablate; None for an experiment without a section `circuit`.
    """

    model: nn.Module
    tokenizer: Any
    rows: Sequence[Row]
    directions: Mapping[str, Directions] = field(default_factory=dict)
    fingerprint: dict[str, Any] | None = None
    features: ExperimentFeatures | None = None
    circuits: PronounCircuits | None = None
    _states: dict[Site, Tensor] = field(default_factory=dict, repr=False)

    def states(self, plan: Plan) -> dict[Site, Tensor]:
        """Activations of the base at the sites of a plan, [tokens, width] each, on the texts of the experiment; read once."""
        if missing := [site for site in sites_of(plan, self.model) if site not in self._states]:
            self._states |= states_at(self.model, missing, self.rows)
        return self._states


class Treatment(ABC):
    """What is done to a model.

    A subclass overrides what it does: `acting` or `system` at inference, `training_plan` or `training_rows` in training.

    Attributes:
        when: `train`, `inference`, `both` or `baked`, as far as it can act then.
        unit: of `size`, the quantity in which controls are matched.
        system: message before what the model is asked at inference.
    """

    name: ClassVar[str]
    when: ClassVar[tuple[str, ...]]
    unit: ClassVar[str] = ""
    system: str | None = None

    @abstractmethod
    def describe(self) -> str:
        """One phrase for the page."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What it is, JSON-able, before `prepare`: two treatments with the same `spec` do the same in the same experiment."""

    def prepare(self, bench: Bench) -> Self:
        """Reads what it is made of, and finds fault with it, on the base model. Called once, before it acts."""
        return self

    def check_when(self, when: str, arm: str) -> None:
        """Raises ConfigError when it cannot act then. arm: named by the error."""
        if when not in WHEN:
            raise _unknown_when(arm, when)
        possible = (NEVER,) if not self.when else self.when
        if when not in possible:
            raise _impossible(self, when, arm, possible)

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the treatment, at inference; as it was afterwards."""
        yield model

    @contextmanager
    def baked(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the treatment in its weights; as it was afterwards."""
        raise NotImplementedError
        yield

    def training_plan(self) -> Plan | None:
        """A plan that acts while the model trains."""
        return None

    @contextmanager
    def trained_from(self, model: nn.Module) -> Iterator[nn.Module]:
        """The base model that training starts from."""
        yield model

    def training_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The rows that the model is trained on."""
        return list(rows)

    def save(self, folder: Path) -> None:  # noqa: B027 - most have nothing to keep
        """Writes what it is made of into the folder of a cell, for whoever wants to use it."""

    def size(self, bench: Bench) -> dict[str, float]:
        """The matched quantity, by part; empty when there is none."""
        return {}

    def control(self, bench: Bench, seed: int) -> Treatment:
        """A matched random partner. Raises ConfigError where none can be made."""
        raise _no_controls(self)


TREATMENTS: Registry[type[Treatment]] = Registry("treatment", "steer.experiment.treatments", "steer.treatments", subclass_of=Treatment)


# ---- errors


def _no_controls(treatment: Treatment) -> ConfigError:
    return ConfigError(
        f"no matched controls of treatment '{treatment.name}' are known",
        expected="a treatment that makes its random partners",
        found=treatment.describe(),
        remedy="write the control yourself, as an arm with a treatment of its own",
    )


def _unknown_when(arm: str, when: str) -> ConfigError:
    return ConfigError(f"arm '{arm}': unknown when '{when}'", expected=", ".join(WHEN), found=when, remedy="choose one of these")


def _impossible(treatment: Treatment, when: str, arm: str, possible: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        f"arm '{arm}': treatment '{treatment.name}' cannot act with when={when}",
        expected=f"when={' or '.join(possible)}",
        found=f"when={when}",
        remedy="choose one of these, or another treatment",
    )
