"""A plan of interventions as a treatment."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import nn

from steer.checks import finite_number, of_type
from steer.directions.text import plan_from_text
from steer.errors import ConfigError
from steer.experiment.matched import edit_norms, random_partner
from steer.experiment.treatment import BAKED, BOTH, INFERENCE, TRAIN, TREATMENTS, Bench, Treatment
from steer.files import tensor_hash
from steer.intervene import Intervention, Plan
from steer.intervene.deploy import bake
from steer.model.context import PHASES

_AT_INFERENCE = ("validate", "generate")  # phases of a plan


@TREATMENTS.register("plan")
class PlanTreatment(Treatment):
    """A plan: attached while the model trains, while it is used, in both, or baked into its weights.

    Controls: the same plan along random directions, with edits as large (`steer.experiment.matched`).

    Args:
        plan: a Plan, the path of a saved one, or its text, e.g. `2 gushing:layers.22.output@response`; a text names directions of the
            experiment.
        dose: factor of every strength, which a sweep varies.

    Example:
        >>> steer.compare(model, {"plain": None, "warm": plan}, "logprob_gap", items)
    """

    when = (TRAIN, INFERENCE, BOTH, BAKED)
    unit = "root mean square of |dh|"

    def __init__(self, plan: Plan | str | Path, dose: float = 1.0) -> None:
        of_type(plan, (Plan, str, Path), "the plan of a treatment", "pass a steer.Plan, the path of a saved one, or its text")
        finite_number(dose, "the dose of a plan")
        self.source = plan
        self.dose = dose
        is_saved = isinstance(plan, Path) or isinstance(plan, str) and _is_saved(plan)
        self._is_text = isinstance(plan, str) and not is_saved
        given = plan if isinstance(plan, Plan) else None if self._is_text else Plan.load(plan)
        self._plan = None if given is None else _dosed(given, dose)

    @property
    def plan(self) -> Plan:
        """The plan. Raises ConfigError before `prepare` when it is a text."""
        if self._plan is None:
            raise _not_prepared(self.source)
        return self._plan

    def describe(self) -> str:
        if self._is_text:
            return f"plan `{self.source}`" + (f", dose {self.dose:g}" if self.dose != 1 else "")
        return "; ".join(each.summary() for each in self.plan.interventions)

    def spec(self) -> dict[str, Any]:
        if self._is_text:
            return {"text": self.source, "dose": self.dose}
        manifest, tensors = self.plan.file_form()
        return {"plan": manifest, "tensors": tensor_hash(tensors)}

    def prepare(self, bench: Bench) -> Self:
        if self._plan is None:
            self._plan = _dosed(plan_from_text(str(self.source), bench.directions), self.dose)
        self._plan.validate(bench.model)
        return self

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        with self.plan.attached(model) as attachment:
            yield model
        if attachment.passes and self._is_to_act() and not any(attachment.fired().values()):  # without a pass it warns
            raise _acted_nowhere(self.plan, attachment.passes)

    def check_when(self, when: str, arm: str) -> None:
        super().check_when(when, arm)
        needed = {TRAIN: ("train",), INFERENCE: _AT_INFERENCE}.get(when, PHASES)
        for each in () if self._plan is None else self._plan.interventions:
            if not set(each.phases) & set(needed):
                raise _other_phases(each, when, arm, needed)

    def _is_to_act(self) -> bool:
        """It has an edit that acts on its tokens whatever they hold; a gate may stay closed, and a strength of 0 is a dose, too."""
        return any(each.gate is None and each.enabled and any(each.strength) for each in self.plan.interventions)

    @contextmanager
    def baked(self, model: nn.Module) -> Iterator[nn.Module]:
        with bake(self.plan, model, savable=False):
            yield model

    def training_plan(self) -> Plan | None:
        return self.plan

    def save(self, folder: Path) -> None:
        self.plan.save(folder / "plan")

    def size(self, bench: Bench) -> dict[str, float]:
        return edit_norms(self.plan, bench.model, bench.states(self.plan))

    def control(self, bench: Bench, seed: int) -> Treatment:
        return PlanTreatment(random_partner(self.plan, bench.model, bench.states(self.plan), seed)).prepare(bench)


def _is_saved(text: str) -> bool:
    """A path of a saved plan, folder or single file, and no text of one; os.path says no of what can be no path."""
    return os.path.isfile(os.path.join(text, "manifest.json")) or text.endswith(".safetensors") and os.path.isfile(text)


def _dosed(plan: Plan, dose: float) -> Plan:
    """The plan with every strength times the dose."""
    if dose == 1:
        return plan
    dosed = [dataclasses.replace(each, strength=tuple(dose * value for value in each.strength)) for each in plan.interventions]
    return Plan(dosed, fingerprint=plan.fingerprint, step=plan.step)


# ---- errors


def _other_phases(intervention: Intervention, when: str, arm: str, needed: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        f"arm '{arm}': '{intervention.name}' does not act with when={when}",
        expected=f"phases with {' or '.join(needed)}",
        found=", ".join(intervention.phases),
        remedy="give it other phases, or the arm another `when`",
    )


def _acted_nowhere(plan: Plan, passes: int) -> ConfigError:
    named = ", ".join(f"'{each.name}' on {each.scope} tokens in {', '.join(each.phases)}" for each in plan.interventions)
    return ConfigError(
        "nothing was measured under this plan: it acted on no token",
        expected=f"tokens for {named}",
        found=f"none in {passes} passes of the model",
        remedy="choose another scope, e.g. `all`, or an outcome in which such tokens occur: only metrics of answers generate any",
    )


def _not_prepared(source: Any) -> ConfigError:
    what = "this plan was not read yet"
    return ConfigError(what, expected="`prepare` before it acts", found=repr(source), remedy="call prepare(bench), as steer.compare does")
