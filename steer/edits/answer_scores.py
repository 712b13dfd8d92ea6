"""Answers scored behind prompts: p = exp(mean log-probability per token), and whether each token of them is the likeliest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import whole_number
from steer.edits.locate import target_ids, text_ids
from steer.errors import NonFiniteError, TokenizerError
from steer.model.anatomy import Anatomy
from steer.model.annotations import response_tokens
from steer.model.capture import batches, check_vocabulary, evaluating
from steer.model.devices import input_device
from steer.model.load import tokenizer_of
from steer.model.logits_at import logits_at, lone_head
from steer.model.memory import in_halves
from steer.model.tokens import Row, check_tokenizer, collate, encode

Question = tuple[str, str]  # a prompt and an answer


@dataclass(frozen=True)
class Answer:
    """Score of one answer behind one prompt.

    Attributes:
        logprobs: of each token of it, in nat.
        predicted: the likeliest token in each place.
        hits: where that is the token of the answer.
    """

    logprobs: tuple[float, ...]
    predicted: tuple[int, ...]
    hits: tuple[bool, ...]

    @property
    def probability(self) -> float:
        """exp of the mean log-probability per token, so that answers of different length compare."""
        return math.exp(sum(self.logprobs) / len(self.logprobs))

    @property
    def first_probability(self) -> float:
        """Of the first token of it."""
        return math.exp(self.logprobs[0])

    @property
    def is_top(self) -> bool:
        """Every token is the likeliest one."""
        return all(self.hits)

    @property
    def accuracy(self) -> float:
        """Share of tokens that are the likeliest one, each behind the right ones before it."""
        return sum(self.hits) / len(self.hits)


class AnswerScorer:
    """Scores answers with a causal language model. A plan that is attached stays in force, and is told which tokens are the answer.

    A prompt is read once for all answers that begin alike; texts are padded at the right, and logits computed only where an answer is
    predicted. An answer stands behind a blank, without special tokens.

    Args:
        tokenizer: None for the one that came with the model.
        chat: prompts are messages of a user, put through the chat template, and answers what the assistant says, without a blank.
        max_tokens: padded tokens of a batch; one that does not fit into memory is halved.
        progress: a bar where the output is a terminal.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, chat: bool = False, max_tokens: int = 1024, progress: bool = True
    ) -> None:
        whole_number(max_tokens, "`max_tokens`", least=1)
        self.model = model
        self.tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
        check_tokenizer(self.tokenizer)
        self.chat = chat
        self.max_tokens = max_tokens
        self.progress = progress
        self.anatomy = Anatomy.find(model)

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """Tokens of a prompt, with the special ones in front of it that the tokenizer or the chat template puts there."""
        if self.chat:
            return encode(self.tokenizer, prompt).ids
        return text_ids(self.tokenizer, prompt)

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Tokens of an answer. Raises as `target_ids`."""
        if not self.chat:
            return target_ids(self.tokenizer, answer)
        ids = tuple(self.tokenizer(answer.strip(), add_special_tokens=False).input_ids)
        if not ids:
            raise _no_tokens(answer)
        return ids

    def scores(self, questions: Iterable[Question], *, what: str = "answers") -> dict[Question, Answer]:
        """The answers, each behind its prompt. Raises NonFiniteError, and TokenizerError for a text without tokens."""
        questions = list(dict.fromkeys(questions))
        by_prompt: dict[str, list[str]] = {}
        for prompt, answer in questions:
            by_prompt.setdefault(prompt, []).append(answer)
        rows: dict[Row, int] = {}
        places: dict[Question, tuple[int, tuple[int, ...]]] = {}  # number of the row that an answer is read in, and its tokens
        for prompt, answers in by_prompt.items():
            start = self.prompt_ids(prompt)
            if not start:
                raise _no_tokens(prompt)
            targets = {answer: self.answer_ids(answer) for answer in answers}
            stems = _longest([ids[:-1] for ids in targets.values()])
            for answer, ids in targets.items():
                stem = next(stem for stem in stems if stem[: len(ids) - 1] == ids[:-1])
                row = Row((*start, *stem), len(start))
                places[prompt, answer] = (rows.setdefault(row, len(rows)), ids)
        wanted: list[list[tuple[Question, tuple[int, ...]]]] = [[] for _ in rows]
        for question, (number, ids) in places.items():
            wanted[number].append((question, ids))
        found = self._read(list(rows), wanted, what)
        return {question: found[question] for question in questions}

    def _read(self, rows: list[Row], wanted: list[list[tuple[Question, tuple[int, ...]]]], what: str) -> dict[Question, Answer]:
        check_vocabulary(self.anatomy, rows)
        found: dict[Question, Answer] = {}
        with tqdm(total=len(rows), desc=what, disable=None if self.progress else True, leave=False) as bar, evaluating(self.model):
            for batch in batches(rows, self.max_tokens):
                for chosen, answers in in_halves(batch, lambda part: self._answers(part, rows, wanted)):
                    found |= answers
                    bar.update(len(chosen))
        return found

    def _answers(
        self, chosen: Sequence[int], rows: list[Row], wanted: list[list[tuple[Question, tuple[int, ...]]]]
    ) -> dict[Question, Answer]:
        """The answers that some rows hold."""
        places = [(of, at) for of, i in enumerate(chosen) for at in range(rows[i].prompt - 1, len(rows[i].ids))]
        logits = self._logits([rows[i] for i in chosen], places)  # [places, vocabulary]
        first = {of: place for place, (of, _) in reversed(list(enumerate(places)))}
        return _answers(logits, [(question, ids, first[of]) for of, i in enumerate(chosen) for question, ids in wanted[i]])

    def _logits(self, rows: Sequence[Row], places: Sequence[tuple[int, int]]) -> Tensor:
        """[places, vocabulary] fp32. places: (row, token) of each."""
        batch = {name: tensor.to(input_device(self.model)) for name, tensor in collate(rows, 0).items()}
        said = batch.pop("labels") != -100
        columns = torch.tensor([row * said.shape[1] + token for row, token in places])
        with response_tokens(self.model, said):
            return logits_at(self.model, lone_head(self.model, self.anatomy.unembedding), {**batch, "use_cache": False}, columns).float()


def _longest(stems: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The stems that no other one begins with, longest first."""
    kept: list[tuple[int, ...]] = []
    for stem in sorted(set(stems), key=len, reverse=True):
        if not any(longer[: len(stem)] == stem for longer in kept):
            kept.append(stem)
    return kept


def _answers(logits: Tensor, asked: Sequence[tuple[Question, tuple[int, ...], int]]) -> dict[Question, Answer]:
    """Answers from the logits of a batch. asked: question, tokens of the answer, and the place where the first of them is predicted."""
    normaliser, top = logits.logsumexp(-1), logits.argmax(-1)  # [places]
    at = torch.tensor([first + step for _, ids, first in asked for step in range(len(ids))], device=logits.device)
    targets = torch.tensor([token for _, ids, _ in asked for token in ids], device=logits.device)
    logprobs = (logits[at, targets] - normaliser[at]).double().cpu()  # [tokens of all answers]
    if not bool(torch.isfinite(logprobs).all()):
        raise _not_finite(logprobs)
    predicted, hits = top[at].tolist(), (top[at] == targets).tolist()
    values, found, start = logprobs.tolist(), {}, 0
    for question, ids, _ in asked:
        span = slice(start, start + len(ids))
        found[question] = Answer(tuple(values[span]), tuple(predicted[span]), tuple(hits[span]))
        start = span.stop
    return found


# ---- errors


def _no_tokens(text: str) -> TokenizerError:
    return TokenizerError("a prompt or an answer gives no tokens", expected="one or more", found=repr(text), remedy="leave it out")


def _not_finite(logprobs: Tensor) -> NonFiniteError:
    return NonFiniteError(
        "log-probabilities of answers are not finite",
        expected="a finite number for each token",
        found=f"{int((~torch.isfinite(logprobs)).sum())} of {len(logprobs)} are NaN or infinite",
        remedy="the edit broke the model: lower its strength, or edit at another layer",
    )
