"""Mean substitution: every token of the subject has the mean embedding of the tokens of all subjects. As a corruption, ours."""

from __future__ import annotations

from typing import Any

from torch import Generator

from steer.edits.tracing.corruption import CORRUPTIONS, CorruptedSubject, Corruption
from steer.edits.tracing.prompts import Subjects
from steer.errors import EditError


@CORRUPTIONS.register("mean")
class Mean(Corruption):
    """Each token is replaced by the mean embedding of the tokens of all subjects."""

    def of(self, number: int, subjects: Subjects, samples: int, generator: Generator) -> CorruptedSubject:
        """Raises EditError where all subjects are one and the same."""
        if len({prompt.subject_ids for prompt in subjects.prompts}) < 2:
            raise _one_subject(subjects)
        return CorruptedSubject(subjects.mean.expand(1, *subjects.values[number].shape))

    def settings(self) -> dict[str, Any]:
        return {}


# ---- errors


def _one_subject(subjects: Subjects) -> EditError:
    return EditError(
        "the mean of one subject says what that subject is",
        expected="facts about two subjects or more",
        found=f"'{subjects.prompts[0].fact.subject}' alone",
        remedy="trace it among other facts, or with corruption='noise'",
    )
