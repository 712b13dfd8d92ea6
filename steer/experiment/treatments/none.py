"""No treatment: the model as it is, or as it was trained."""

from __future__ import annotations

from typing import Any

from steer.experiment.treatment import TREATMENTS, Treatment


@TREATMENTS.register("none")
class NoTreatment(Treatment):
    """Nothing is done to the model: what the other arms are compared with."""

    when = ()

    def describe(self) -> str:
        return "nothing"

    def spec(self) -> dict[str, Any]:
        return {}
