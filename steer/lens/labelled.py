"""Labelled texts: what a probe is fitted on, which of their tokens it reads, and which of them are held out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steer.checks import number_within, of_type, one_of
from steer.directions.contrast import check_groups, held_out_groups
from steer.errors import ConfigError, ContrastError, TokenizerError
from steer.model.tokens import Row, check_rows, encode, plain

DRAWS = 100  # of the held-out texts, until both parts have texts of either class

# which tokens of an answer a probe reads -> (first, one after the last) of them, from those of the exact answer and the length of the text
ANSWER_TOKENS = {
    "prompt_last": "the last token of the prompt, before anything was answered",
    "exact_before": "the token before the exact answer",
    "exact_first": "the first token of the exact answer",
    "exact_last": "the last token of the exact answer",
    "exact": "all tokens of the exact answer, averaged",
    "exact_after": "the token after the exact answer",
    "last": "the last token of the whole answer",
}


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with a label each: a number, or True and False (1 and 0) for two classes.

    Attributes:
        groups: what each text belongs to (topic, template); empty for none. Where they are given, whole groups are held out.
        token: which tokens of an answer these texts end in, a key of `ANSWER_TOKENS`; empty where they were not chosen.
        rows: the texts. labels: one for each, 1 for True and 0 for False, or numbers in the unit in which the probe is to tell them.

    Raises:
        ContrastError: labels that are no numbers or do not match the texts, or a text that is there twice.

    Example:
        >>> texts = ["the cat sat on the mat", "we want food"]
        >>> labelled = steer.LabelledTexts.from_texts(tokenizer, texts, [True, False])
    """

    rows: tuple[Row, ...]
    labels: tuple[float, ...]
    groups: tuple[str, ...] = ()
    token: str = ""

    def __post_init__(self) -> None:
        check_rows(self.rows, "the labelled texts")
        of_type(self.labels, (tuple, list), "the labels of texts", "pass one number for each text")
        if len(self.labels) != len(self.rows):
            raise _label_count_error(len(self.labels), len(self.rows))
        for i, label in enumerate(self.labels):
            if not isinstance(label, int | float) or not math.isfinite(label):
                raise _label_error(i, label)
        check_groups(self.groups, len(self.rows), "text")
        first: dict[Row, int] = {}
        for i, row in enumerate(self.rows):
            if first.setdefault(row, i) != i:  # a copy among the held-out texts would be judged by what it was learned from
                raise _repeated_error(first[row], i)
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "labels", tuple(map(float, self.labels)))
        object.__setattr__(self, "groups", tuple(self.groups))

    def __repr__(self) -> str:
        groups = f" in {len(set(self.groups))} groups" if self.groups else ""
        return (
            f"LabelledTexts({len(self.rows)} texts{groups}, labels {min(self.labels, default=0):.4g} to {max(self.labels, default=0):.4g})"
        )

    @classmethod
    def from_texts(cls, tokenizer: Any, texts: Sequence[str], labels: Sequence[float], *, groups: Sequence[str] = ()) -> LabelledTexts:
        """Running text, read with any span."""
        of_type(texts, (list, tuple), "the labelled texts", "pass a list of texts")
        return cls(tuple(plain(tokenizer, text) for text in texts), tuple(labels), tuple(groups))

    @classmethod
    def from_answers(cls, tokenizer: Any, answers: Sequence[Mapping[str, Any]], *, token: str = "exact_last") -> LabelledTexts:
        """Answers of a model with the keys `prompt`, `answer`, `exact` (the part of the answer that is right or wrong, in its words),
        `correct` (True or False), and `group` where whole groups are held out.

        Each text ends in the tokens that the probe reads, and these are its response; what follows has no part in their activations.

        Args:
            token: a key of `ANSWER_TOKENS`. The tokens of the exact answer say most of whether it is right.

        Raises:
            ConfigError: a key is missing; another token. TokenizerError: the exact answer is not in the answer, or has no tokens there.
        """
        one_of(token, list(ANSWER_TOKENS), "the token of an answer")
        of_type(answers, (list, tuple), "the answers", "pass a list of {'prompt': ..., 'answer': ..., 'exact': ..., 'correct': ...}")
        for i, record in enumerate(answers):
            of_type(record, Mapping, f"answer {i}", "pass {'prompt': ..., 'answer': ..., 'exact': ..., 'correct': ...}")
            wrong = [key for key in ("prompt", "answer", "exact") if not isinstance(record.get(key), str) or not record[key]]
            if wrong or not isinstance(record.get("correct"), bool | int):
                raise _answer_error(i, wrong or ["correct"])
        rows = tuple(_answer_row(tokenizer, record, token, i) for i, record in enumerate(answers))
        groups = tuple(record.get("group") for record in answers) if any("group" in record for record in answers) else ()
        return cls(rows, tuple(float(record["correct"]) for record in answers), groups, token)  # type: ignore[arg-type]

    def split(self, holdout: float, seed: int, *, classes: bool) -> tuple[list[int], list[int]]:
        """Indices of the texts to fit on and of those that are held out, whole groups where there are any.

        Args:
            classes: two texts of either class are in either part.

        Raises:
            ContrastError: too few texts or groups, or another number of classes than two.
        """
        number_within(holdout, "the held-out share of the texts", 0, 1)
        of_type(seed, int, "the seed", "pass a whole number such as 0")
        if classes and set(self.labels) != {0.0, 1.0}:
            raise _classes_error(set(self.labels))
        if not classes and len(set(self.labels)) < 2:
            raise _constant_error(self.labels)
        generator = torch.Generator().manual_seed(seed)
        size, count = len(self.rows), round(len(self.rows) * holdout)
        draws = held_out_groups(self.groups, holdout, generator) if self.groups else (None for _ in range(DRAWS))
        for chosen in draws:
            texts = set(torch.randperm(size, generator=generator)[:count].tolist()) if chosen is None else set()
            held = [i for i in range(size) if (i in texts if chosen is None else self.groups[i] in chosen)]
            fitted = sorted(set(range(size)) - set(held))
            if all(_suffices([self.labels[i] for i in part], classes) for part in (fitted, held)):
                return fitted, held
        raise _split_error(self, holdout, classes)


def _suffices(labels: Sequence[float], classes: bool) -> bool:
    """A part can be fitted on, or judged by."""
    return min(labels.count(0.0), labels.count(1.0)) >= 2 if classes else len(set(labels)) >= 3


def _answer_row(tokenizer: Any, record: Mapping[str, Any], token: str, index: int) -> Row:
    """The text up to the tokens that are read, which are its response."""
    row = encode(tokenizer, record["prompt"], record["answer"])
    if token == "prompt_last":
        start, stop = row.prompt - 1, row.prompt
    elif token == "last":
        start, stop = len(row.ids) - 1, len(row.ids)
    else:
        first, end = _exact_tokens(tokenizer, row, record["answer"], record["exact"], index)
        places = {"exact": (first, end), "exact_first": (first, first + 1), "exact_last": (end - 1, end)}
        places |= {"exact_before": (first - 1, first), "exact_after": (end, end + 1)}
        start, stop = places[token]
    if not 0 <= start < stop <= len(row.ids):
        raise _no_token_error(index, token, len(row.ids))
    return Row(row.ids[:stop], start)


def _exact_tokens(tokenizer: Any, row: Row, answer: str, exact: str, index: int) -> tuple[int, int]:
    """The first token of the exact answer in a text, and the one after its last; where it is said twice, the first time."""
    at = answer.lower().find(exact.lower())
    if at < 0:
        raise _no_exact_error(index, exact, answer)
    if not getattr(tokenizer, "is_fast", False):
        raise _slow_error(tokenizer)
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    if tuple(encoded.input_ids) != row.ids[row.prompt : row.prompt + len(encoded.input_ids)]:
        raise _template_error(index)
    inside = [i for i, (start, stop) in enumerate(encoded.offset_mapping) if start < at + len(exact) and stop > at]
    if not inside:
        raise _no_exact_error(index, exact, answer)
    return row.prompt + inside[0], row.prompt + inside[-1] + 1


# ---- errors


def _label_count_error(labels: int, texts: int) -> ContrastError:
    return ContrastError("labels do not match the texts", expected=f"{texts} labels", found=labels, remedy="give one label for each text")


def _label_error(index: int, label: Any) -> ContrastError:
    return ContrastError(
        f"label {index} is no number",
        expected="a finite number, or True or False",
        found=repr(label),
        remedy="correct it, or leave the text out",
    )


def _repeated_error(first: int, second: int) -> ContrastError:
    return ContrastError(
        f"labelled text {second} repeats another one",
        expected="every text once, up to the tokens that are read: a copy that is held out would be judged by what it was learned from",
        found=f"texts {first} and {second} are the same",
        remedy=f"remove text {second}, or read a later token of the answers",
    )


def _answer_error(index: int, keys: list[str]) -> ConfigError:
    return ConfigError(
        f"answer {index} lacks a part",
        expected="text under each of prompt, answer and exact, and True or False under correct",
        found=f"none under {', '.join(keys)}",
        remedy="complete the answer, or leave it out",
    )


def _classes_error(labels: set[float]) -> ContrastError:
    return ContrastError(
        "labels are not of two classes",
        expected="True and False (1 and 0), both of them",
        found=f"{len(labels)} labels: {', '.join(f'{label:g}' for label in sorted(labels)[:5])}",
        remedy="give labels of two classes, or fit numbers with method='ridge'",
    )


def _constant_error(labels: Sequence[float]) -> ContrastError:
    return ContrastError(
        "labels do not vary", expected="at least two numbers", found=f"{len(labels)} labels, all the same", remedy="give others"
    )


def _split_error(texts: LabelledTexts, holdout: float, classes: bool) -> ContrastError:
    of = f"{len(set(texts.groups))} groups" if texts.groups else f"{len(texts.rows)} texts"
    return ContrastError(
        "too few texts to hold some out",
        expected="two texts of either class in either part" if classes else "three texts with different labels in either part",
        found=f"none in {DRAWS} draws from {of} with holdout {holdout:g}",
        remedy=f"give more {'groups, or more texts in each' if texts.groups else 'texts'}, or another holdout",
    )


def _no_exact_error(index: int, exact: str, answer: str) -> TokenizerError:
    return TokenizerError(
        f"the exact answer {index} is not in its answer",
        expected="a part of the answer, in its words",
        found=f"{exact[:60]!r} in {answer[:80]!r}",
        remedy="give the words as the answer has them, or leave it out",
    )


def _no_token_error(index: int, token: str, size: int) -> TokenizerError:
    return TokenizerError(
        f"answer {index} has no token '{token}'",
        expected=ANSWER_TOKENS[token],
        found=f"a text of {size} tokens that ends or begins there",
        remedy="read another token, or leave the answer out",
    )


def _slow_error(tokenizer: Any) -> TokenizerError:
    return TokenizerError(
        "the tokens of an exact answer cannot be found",
        expected="a fast tokenizer, which knows where its tokens start",
        found=type(tokenizer).__name__,
        remedy="load the fast tokenizer, or read the token 'last'",
    )


def _template_error(index: int) -> TokenizerError:
    return TokenizerError(
        f"the tokens of answer {index} are not those of its text in the chat template",
        expected="a template that puts the answer in as it is",
        found="other tokens where the answer begins",
        remedy="strip the answer of spaces and line ends, or read the token 'last'",
    )
