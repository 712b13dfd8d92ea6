"""An edit of facts as a treatment: its weight deltas, while the model is used, under its training, or baked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from steer.checks import of_type
from steer.edits.edit import Edit, WeightDelta
from steer.edits.edited_weights import EditedWeights
from steer.experiment.matched import generator_of, random_factors
from steer.experiment.treatment import BAKED, BOTH, INFERENCE, TRAIN, TREATMENTS, Bench, Treatment


@TREATMENTS.register("edit")
class EditTreatment(Treatment):
    """Writes facts into the weights: under the training and not afterwards (`train`), where the model is used (`inference`), in both, or
    baked.

    Controls: deltas of the same rank and Frobenius norm in the same matrices, between random keys and random values.

    Args:
        edit: an Edit, or the path of a saved one, solved for the base model of the experiment.

    Example:
        >>> steer.compare(model, {"plain": None, "edited": edit, "steered": plan, "random": steer.matched(edit)}, "logprob_gap", items)
    """

    when = (TRAIN, INFERENCE, BOTH, BAKED)
    unit = "Frobenius norm of the change"

    def __init__(self, edit: Edit | str | Path) -> None:
        of_type(edit, (Edit, str, Path), "the edit of a treatment", "pass a steer.edits.Edit, or the path of a saved one")
        self.edit = edit if isinstance(edit, Edit) else Edit.load(edit)
        self._drawn: int | None = None  # seed of a control

    def describe(self) -> str:
        count = len(self.edit.facts)
        if self._drawn is not None:
            return f"random weights as large as the edit '{self.edit.provenance['control_of']}'"
        return f"edit '{self.edit.name}' of {count} fact{'s' * (count != 1)} by {self.edit.editor}"

    def spec(self) -> dict[str, Any]:
        return {"edit": self.edit.digest, "random": self._drawn}

    def prepare(self, bench: Bench) -> Self:
        with self.edit.applied(bench.model):  # finds fault with it now
            return self

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        # what was trained with this base, and merged into it, is other weights
        with EditedWeights.of(model).with_edit(self.edit, on_other_weights=True):
            yield model

    baked = acting
    trained_from = acting

    def save(self, folder: Path) -> None:
        self.edit.save(folder / "edit")

    def size(self, bench: Bench) -> dict[str, float]:
        return {delta.path: delta.norm for delta in self.edit.deltas}

    def control(self, bench: Bench, seed: int) -> Treatment:
        deltas = []
        for number, delta in enumerate(self.edit.deltas):
            u, v = random_factors(*delta.shape, delta.rank, delta.norm, generator_of("edit", seed, number))
            deltas.append(WeightDelta(delta.path, delta.layer, u, v))
        made = Edit((), "random", tuple(deltas), f"{self.edit.name}-random{seed}", provenance={"control_of": self.edit.name})
        partner = EditTreatment(replace(made, base=self.edit.base, model=self.edit.model))
        partner._drawn = seed
        return partner
