"""Symmetric token replacement (Zhang & Nanda 2024, arXiv 2309.16042): another subject of as many tokens stands in the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator

from steer.checks import of_type
from steer.edits.locate import locate
from steer.edits.tracing.corruption import CORRUPTIONS, CorruptedSubject, Corruption, NoCorruption
from steer.edits.tracing.prompts import Subjects, TracedPrompt
from steer.errors import EditError, SubjectNotFoundError


@CORRUPTIONS.register("replacement")
class Replacement(Corruption):
    """Another subject of as many tokens takes its place, which is in distribution where noise is not.

    One is drawn among the other facts: of those with another answer, one of the same template where there is any.

    Args:
        subjects: by subject, the one that takes its place, where it is not to be drawn.
    """

    def __init__(self, subjects: Mapping[str, str] | None = None) -> None:
        of_type(subjects, (Mapping, type(None)), "the replacements of subjects", "pass {subject: what takes its place}")
        self.subjects = {str(subject): str(other) for subject, other in (subjects or {}).items()}

    def of(self, number: int, subjects: Subjects, samples: int, generator: Generator) -> CorruptedSubject:
        """Embeddings of one sample, and `replaced_by`.

        Raises:
            NoCorruption: no other fact has a subject of as many tokens. EditError: a given replacement has another number of tokens.
        """
        prompt = subjects.prompts[number]
        given = self.subjects.get(prompt.fact.subject)
        for other in _candidates(prompt, subjects, generator) if given is None else [given]:
            ids = _replaced(subjects.tokenizer, prompt, other)
            if ids is not None:
                return CorruptedSubject(subjects.embed(ids)[None], {"replaced_by": other})
        if given is not None:
            raise _other_length(subjects.tokenizer, prompt, given)
        raise NoCorruption(
            f"no other fact has a subject of {len(prompt.subject_ids)} tokens and another answer; name one: "
            "replacement=... of 'steer trace', or Replacement({subject: other})"
        )

    def settings(self) -> dict[str, Any]:
        return {"subjects": self.subjects}


def _candidates(prompt: TracedPrompt, subjects: Subjects, generator: Generator) -> list[str]:
    """Subjects that could take the place of one, in the order in which they are tried: drawn, those of the same template first."""
    others = [
        other
        for other in subjects.prompts
        if len(other.subject_ids) == len(prompt.subject_ids) and other.subject_ids != prompt.subject_ids and other.answer != prompt.answer
    ]
    drawn = [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
    drawn.sort(key=lambda other: _template(other) != _template(prompt))  # stable
    return list(dict.fromkeys(other.fact.subject for other in drawn))


def _template(prompt: TracedPrompt) -> tuple[int, ...]:
    """Tokens of the prompt without the subject, and a mark in its place."""
    return (*prompt.ids[: prompt.first], -1, *prompt.ids[prompt.last + 1 :])


def _replaced(tokenizer: Any, prompt: TracedPrompt, subject: str) -> tuple[int, ...] | None:
    """Tokens of another subject in the same prompt; None where it changes the number of tokens or others than those of the subject."""
    before, _, after = prompt.fact.prompt.rpartition(prompt.fact.subject)
    try:
        found = locate(tokenizer, f"{before}{subject}{after}", subject)
    except SubjectNotFoundError:  # blanks alone
        return None
    same_place = (found.first, found.last, len(found.ids)) == (prompt.first, prompt.last, len(prompt.ids))
    around = (*found.ids[: found.first], *found.ids[found.last + 1 :])
    if not same_place or around != (*prompt.ids[: prompt.first], *prompt.ids[prompt.last + 1 :]):
        return None
    return found.ids[found.first : found.last + 1]


# ---- errors


def _other_length(tokenizer: Any, prompt: TracedPrompt, subject: str) -> EditError:
    before, _, after = prompt.fact.prompt.rpartition(prompt.fact.subject)
    found = locate(tokenizer, f"{before}{subject}{after}", subject)
    return EditError(
        f"'{subject}' cannot take the place of '{prompt.fact.subject}'",
        expected=f"{len(prompt.subject_ids)} tokens, and the rest of the prompt as it is",
        found=f"{found.last - found.first + 1} tokens of {len(found.ids)}, where the prompt has {len(prompt.ids)}",
        remedy="choose a subject that the tokenizer cuts into as many tokens",
    )
