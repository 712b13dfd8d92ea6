"""A circuit as a treatment: its components ablated towards constants, while the model is used, trained, or in its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import nn

from steer.checks import finite_number, of_type, one_of
from steer.circuits import Circuit
from steer.errors import ConfigError
from steer.experiment.pronoun_circuits import ATTRIBUTION, BY, GATE_SETTINGS, PronounCircuits
from steer.experiment.treatment import BAKED, BOTH, INFERENCE, TRAIN, TREATMENTS, Bench, Treatment
from steer.experiment.treatments.plan import PlanTreatment
from steer.files import tensor_hash
from steer.intervene import Plan

FILE = "file"


@TREATMENTS.register("circuit")
class CircuitTreatment(Treatment):
    """Components of `experiment.circuit` ablated: heads found by attribution, or gates that were learned; or those of a circuit file.

    Controls: as many random components of each kind with the same amounts.

    Args:
        by: `attribution` with `settings` `nodes`, or `gates` with those of `steer.experiment.pronoun_circuits.GATE_SETTINGS`, or `file`
            with `path`.
        dose: strength of the ablation, a factor; 1 puts the constants in place of the components.
        settings: see `by`.

    Raises:
        ConfigError: settings that do not go with `by`, or no path of a file.

    Example:
        >>> # in a configuration: treatment: {kind: circuit, by: attribution, settings: {nodes: 5}}
    """

    when = (TRAIN, INFERENCE, BOTH, BAKED)
    unit = "components"

    def __init__(self, by: str, dose: float = 1.0, settings: Mapping[str, Any] | None = None) -> None:
        self.by: str = one_of(by, (*BY, FILE), "`by` of a circuit")
        finite_number(dose, "the dose of a circuit")
        of_type(settings or {}, Mapping, "the settings of a circuit", "e.g. {nodes: 5}")
        known = {ATTRIBUTION: ("nodes",), FILE: ("path",)}.get(by, tuple(GATE_SETTINGS))
        for name in settings or {}:
            one_of(name, known, f"a setting of a circuit by {by}")
        if by == FILE and not (settings or {}).get("path"):
            raise _no_path()
        self.dose = dose
        self.settings = dict(settings or {})
        self._drawn: int | None = None
        self._circuit = Circuit.load(self.settings["path"]) if by == FILE else None
        self._content = None if self._circuit is None else tensor_hash(self._circuit.file_form()[1])
        self._inner: PlanTreatment | None = None

    def describe(self) -> str:
        what = {ATTRIBUTION: "heads by attribution", FILE: "circuit of a file"}.get(self.by, "learned gates of heads and neurons")
        return f"{what} ablated" + (f", strength {self.dose:g}" if self.dose != 1 else "")

    def spec(self) -> dict[str, Any]:
        drawn = {} if self._drawn is None else {"random": self._drawn}
        content = {} if self._content is None else {"content": self._content}
        return {"by": self.by, "dose": self.dose, "settings": self.settings, **content, **drawn}

    def prepare(self, bench: Bench) -> Self:
        if self._inner is None:
            self._use(self._found(bench), bench)
        return self

    def _found(self, bench: Bench) -> Circuit:
        if self._circuit is not None:
            return self._circuit
        return circuits_of(bench, self).circuit(self.by, self.settings)

    def _use(self, circuit: Circuit, bench: Bench) -> None:
        self._circuit = circuit
        self._inner = PlanTreatment(circuit.ablation_plan(bench.model, self.dose)).prepare(bench)

    @property
    def inner(self) -> PlanTreatment:
        """Its plan. Raises ConfigError before `prepare`."""
        if self._inner is None:
            raise _not_prepared(self)
        return self._inner

    @property
    def circuit(self) -> Circuit:
        """Raises ConfigError before `prepare`."""
        if self._circuit is None:
            raise _not_prepared(self)
        return self._circuit

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        with self.inner.acting(model):
            yield model

    @contextmanager
    def baked(self, model: nn.Module) -> Iterator[nn.Module]:
        with self.inner.baked(model) as changed:
            yield changed

    def training_plan(self) -> Plan | None:
        return self.inner.training_plan()

    def save(self, folder: Path) -> None:
        self.circuit.save(folder / "circuit")

    def size(self, bench: Bench) -> dict[str, float]:
        neurons = sum(float(amounts.sum()) for amounts in self.circuit.neurons.values())
        sizes = {"nodes": float(self.circuit.nodes.sum()), "neurons": neurons}
        return {part: value for part, value in sizes.items() if value}

    def control(self, bench: Bench, seed: int) -> Treatment:
        partner = CircuitTreatment(self.by, self.dose, self.settings)
        partner._drawn = seed
        partner._use(self.circuit.random(seed), bench)
        return partner


def circuits_of(bench: Bench, treatment: Treatment) -> PronounCircuits:
    """The circuits of the experiment. Raises ConfigError where it has none."""
    if bench.circuits is None:
        raise _no_circuits(treatment)
    return bench.circuits


# ---- errors


def _no_circuits(treatment: Treatment) -> ConfigError:
    return ConfigError(
        f"treatment '{treatment.name}' needs the circuits of an experiment that has none",
        expected="a section experiment.circuit, with the splits that circuits are found on",
        found="none",
        remedy="add it, see conf/experiment/gender_pronoun.yaml; or by: file with settings: {path: ...}",
    )


def _no_path() -> ConfigError:
    return ConfigError("a circuit by file needs the path of one", expected="settings: {path: <circuit>}", found="no path",
                       remedy="save one with circuit.save(path)")  # fmt: skip


def _not_prepared(treatment: CircuitTreatment) -> ConfigError:
    what = "the circuit of this treatment was not found yet"
    return ConfigError(what, expected="`prepare` before it acts", found=treatment.describe(), remedy="call prepare(bench)")
