"""A plan of interventions as a treatment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import nn

from steer.checks import of_type
from steer.directions.text import plan_from_text
from steer.errors import ConfigError
from steer.experiment.matched import edit_norms, random_partner
from steer.experiment.treatment import BAKED, BOTH, INFERENCE, TRAIN, TREATMENTS, Bench, Treatment
from steer.files import tensor_hash
from steer.intervene import Plan
from steer.intervene.deploy import bake

_AT_INFERENCE = ("validate", "generate")


@TREATMENTS.register("plan")
class PlanTreatment(Treatment):
    """A plan: attached while the model trains, while it is used, in both, or baked into its weights.

    Controls: the same plan along random directions, with edits as large (`steer.experiment.matched`).

    Args:
        plan: a Plan, the path of a saved one, or its text, e.g. `2 gushing:layers.22.output@response`; a text names directions of the
            experiment.

    Example:
        >>> steer.compare(model, {"plain": None, "warm": plan}, "logprob_gap", items)
    """

    when = (TRAIN, INFERENCE, BOTH, BAKED)
    unit = "root mean square of |dh|"

    def __init__(self, plan: Plan | str | Path) -> None:
        of_type(plan, (Plan, str, Path), "the plan of a treatment", "pass a steer.Plan, the path of a saved one, or its text")
        self.source = plan
        is_saved = isinstance(plan, Path) or isinstance(plan, str) and (Path(plan) / "manifest.json").is_file()
        self._is_text = isinstance(plan, str) and not is_saved
        self._plan = plan if isinstance(plan, Plan) else None if self._is_text else Plan.load(plan)

    @property
    def plan(self) -> Plan:
        """The plan. Raises ConfigError before `prepare` when it is a text."""
        if self._plan is None:
            raise _not_prepared(self.source)
        return self._plan

    def describe(self) -> str:
        return "; ".join(each.summary() for each in self._plan.interventions) if self._plan is not None else str(self.source)

    def spec(self) -> dict[str, Any]:
        if self._is_text:
            return {"text": self.source}
        manifest, tensors = self.plan.file_form()
        return {"plan": manifest, "tensors": tensor_hash(tensors)}

    def prepare(self, bench: Bench) -> Self:
        if self._plan is None:
            self._plan = plan_from_text(str(self.source), bench.directions)
        self._plan.validate(bench.model)
        return self

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        with self.plan.attached(model, phases=_AT_INFERENCE):
            yield model

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


# ---- errors


def _not_prepared(source: Any) -> ConfigError:
    what = "this plan was not read yet"
    return ConfigError(what, expected="`prepare` before it acts", found=repr(source), remedy="call prepare(bench), as steer.compare does")
