"""Prompts of causal tracing: the tokens of a fact, its subject in them, and the token whose probability is traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.edits.fact import Fact
from steer.edits.locate import locate, target_ids
from steer.errors import AnatomyError, EditError
from steer.model.anatomy import Anatomy
from steer.model.capture import check_vocabulary
from steer.model.devices import input_device
from steer.model.tokens import Row


@dataclass(frozen=True)
class TracedPrompt:
    """A fact, tokenised.

    Attributes:
        fact: what is traced is its true answer, or its target where it has no other.
        ids: [tokens] of the prompt.
        first, last: places of the first and last token of the subject.
        answer: token ids of the answer; the first is traced.
    """

    fact: Fact
    ids: tuple[int, ...]
    first: int
    last: int
    answer: tuple[int, ...]

    @property
    def subject_ids(self) -> tuple[int, ...]:
        return self.ids[self.first : self.last + 1]


def traced_prompts(tokenizer: Any, facts: Sequence[Fact], anatomy: Anatomy) -> list[TracedPrompt]:
    """Tokenises facts. Raises EditError without facts, SubjectNotFoundError, TokenizerError, ConfigError."""
    of_type(facts, (list, tuple), "the facts of causal tracing", "pass a list of facts")
    if not facts:
        raise _no_facts()
    prompts = []
    for fact in facts:
        of_type(fact, Fact, "one of the facts of causal tracing", "make it with steer.edits.Fact.of(prompt, subject, target)")
        found = locate(tokenizer, fact.prompt, fact.subject)
        answer = target_ids(tokenizer, fact.true or fact.target)
        prompts.append(TracedPrompt(fact, found.ids, found.first, found.last, answer))
    check_vocabulary(anatomy, [Row((*prompt.ids, *prompt.answer), 0) for prompt in prompts])
    return prompts


class Subjects:
    """The subjects of all facts that are traced together, as the token embedding gives them.

    Attributes:
        prompts: of the facts.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, tokenizer: Any, prompts: Sequence[TracedPrompt]) -> None:
        if anatomy.embedding is None:
            raise _no_embedding(anatomy)
        self.tokenizer, self.prompts = tokenizer, prompts
        self._embedding, self._device = anatomy.embedding, input_device(model)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """[tokens, width] of tokens."""
        with torch.no_grad():
            return self._embedding(torch.tensor([ids], device=self._device))[0]

    @cached_property
    def values(self) -> list[Tensor]:
        """[subject tokens, width] of each subject."""
        return [self.embed(prompt.subject_ids) for prompt in self.prompts]

    @cached_property
    def deviation(self) -> float:
        """Standard deviation of all numbers in the embeddings of all tokens of the subjects."""
        return float(torch.cat(self.values).double().std())

    @cached_property
    def mean(self) -> Tensor:
        """[width] over all tokens of the subjects."""
        values = torch.cat(self.values)
        return values.double().mean(0).to(values.dtype)


# ---- errors


def _no_facts() -> EditError:
    return EditError("there is nothing to trace", expected="at least one fact", found="none", remedy="pass [Fact.of(...)]")


def _no_embedding(anatomy: Anatomy) -> AnatomyError:
    return AnatomyError(
        f"the token embedding of this {anatomy.kind} is not known, and causal tracing corrupts it",
        expected="a module that embeds token ids",
        found="none",
        remedy="say which it is: steer.describe(model, embed=...)",
    )
