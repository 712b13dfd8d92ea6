"""Gradients as they are, those of attribution patching (Syed, Rager & Conmy 2023, arXiv 2310.10348)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from steer.circuits.backward_rule import BACKWARD_RULES, BackwardRule
from steer.model.anatomy import Anatomy


@BACKWARD_RULES.register("plain")
class Plain(BackwardRule):
    """The derivative of the model."""

    def applied(self, anatomy: Anatomy) -> AbstractContextManager[None]:
        return nullcontext()
