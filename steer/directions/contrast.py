"""Contrast sets: texts that show a concept and texts that do not."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steer.checks import number_within, of_type
from steer.errors import ContrastError
from steer.model.tokens import Row, check_rows, encode


def text_digest(row: Row) -> str:
    """16 hexadecimal digits that stand for the tokens of a text."""
    return hashlib.sha256(json.dumps(row.ids).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ContrastSet:
    """Tokenised positive and negative texts.

    Attributes:
        paired: entry i of both lists answers the same prompt.
    """

    positive: tuple[Row, ...]
    negative: tuple[Row, ...]
    paired: bool

    def __post_init__(self) -> None:
        check_rows(self.positive, "the positive texts of a contrast set")
        check_rows(self.negative, "the negative texts of a contrast set")
        of_type(self.paired, bool, "`paired` of a contrast set", "pass True or False")
        if not self.positive or not self.negative:
            raise ContrastError(
                "contrast set is empty on one side",
                expected="at least two texts on each side",
                found=f"{len(self.positive)} positive, {len(self.negative)} negative",
                remedy="give texts for both sides: a direction is the difference between them",
            )
        if self.paired and len(self.positive) != len(self.negative):
            raise ContrastError(
                "pairs do not match",
                expected="a positive and a negative text for every prompt",
                found=f"{len(self.positive)} positive, {len(self.negative)} negative",
                remedy="add the missing texts, or pass paired=False when the two sides answer different prompts",
            )
        if set(self.positive) & set(self.negative):
            same = next(i for i, row in enumerate(self.positive) if row in set(self.negative))
            raise ContrastError(
                "a text is on both sides of the contrast",
                expected="every text on one side only",
                found=f"positive text {same}, which is a negative one too",
                remedy="remove it from one side",
            )
        for side, rows in (("positive", self.positive), ("negative", self.negative)):
            first: dict[Row, int] = {}
            for i, row in enumerate(rows):
                if first.setdefault(row, i) != i:  # a copy among the held-out texts would be judged by what it was learned from
                    raise ContrastError(
                        f"{side} text {i} repeats another one",
                        expected="every text once: held-out texts say something only when the direction was not made from them",
                        found=f"{side} texts {first[row]} and {i} are the same",
                        remedy=f"remove text {i}" + (" and its partner" if self.paired else ""),
                    )

    @classmethod
    def from_pairs(cls, tokenizer: Any, pairs: Sequence[Mapping[str, str]]) -> ContrastSet:
        """Pairs with the keys `prompt`, `positive`, `negative` (two answers to one prompt)."""
        of_type(pairs, (list, tuple), "the pairs of a contrast set", "pass a list of {'prompt': ..., 'positive': ..., 'negative': ...}")
        for i, pair in enumerate(pairs):
            of_type(pair, Mapping, f"pair {i} of a contrast set", "pass {'prompt': ..., 'positive': ..., 'negative': ...}")
            wrong = {
                key: pair.get(key) for key in ("prompt", "positive", "negative") if not isinstance(pair.get(key), str) or not pair[key]
            }
            if wrong:
                raise ContrastError(
                    f"pair {i} of a contrast set lacks a part",
                    expected="text under each of prompt, positive and negative",
                    found=wrong,
                    remedy="complete the pair, or leave it out",
                )
        positive = tuple(encode(tokenizer, pair["prompt"], pair["positive"]) for pair in pairs)
        negative = tuple(encode(tokenizer, pair["prompt"], pair["negative"]) for pair in pairs)
        return cls(positive, negative, paired=True)

    @classmethod
    def from_sets(cls, tokenizer: Any, positive: Sequence[str], negative: Sequence[str]) -> ContrastSet:
        """Two unrelated sets of prompts; read them with a span other than `response`."""
        for side, texts in (("positive", positive), ("negative", negative)):
            of_type(texts, (list, tuple), f"the {side} texts of a contrast set", "pass a list of texts")
        sides = [tuple(encode(tokenizer, text) for text in texts) for texts in (positive, negative)]
        return cls(sides[0], sides[1], paired=False)

    def split(self, holdout: float, seed: int) -> tuple[ContrastSet, ContrastSet]:
        """Training and held-out part; pairs stay together. Raises ContrastError when either would have fewer than two texts a side."""
        number_within(holdout, "the held-out share of the texts", 0, 1)
        of_type(seed, int, "the seed", "pass a whole number such as 0")

        def parts(n: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
            order = torch.randperm(n, generator=generator).tolist()
            held = round(n * holdout)
            if held < 2 or n - held < 2:
                remedy = f"{'raise' if held < 2 else 'lower'} holdout, which is {holdout}"
                if 0 < holdout < 1:
                    lower = max(4, int(1.5 / min(holdout, 1 - holdout)))
                    enough = next(k for k in itertools.count(lower) if 2 <= round(k * holdout) <= k - 2)
                    remedy = f"give at least {enough} texts a side" + (f", or {remedy}" if n >= 4 else f": holdout is {holdout}")
                raise ContrastError(
                    "too few texts to hold some out",
                    expected="at least 2 in either part",
                    found=f"{n - held} of {n} to learn from, {held} held out",
                    remedy=remedy,
                )
            return sorted(order[held:]), sorted(order[:held])

        generator = torch.Generator().manual_seed(seed)
        of_positive = parts(len(self.positive), generator)
        of_negative = of_positive if self.paired else parts(len(self.negative), generator)
        made = [
            ContrastSet(tuple(self.positive[i] for i in p), tuple(self.negative[i] for i in n), self.paired)
            for p, n in zip(of_positive, of_negative, strict=True)
        ]
        return made[0], made[1]

    def rows(self) -> tuple[list[Row], list[bool]]:
        """All texts and whether each is positive; a pair's two texts stand side by side."""
        if self.paired:
            both = [
                (row, side)
                for pair in zip(self.positive, self.negative, strict=True)
                for row, side in zip(pair, (True, False), strict=True)
            ]
        else:
            both = [(row, True) for row in self.positive] + [(row, False) for row in self.negative]
        return [row for row, _ in both], [side for _, side in both]

    def __len__(self) -> int:
        """Number of texts, both sides together."""
        return len(self.positive) + len(self.negative)

    def digests(self) -> frozenset[str]:
        """A digest of every text, by which it is recognised when it is used again."""
        return frozenset(map(text_digest, (*self.positive, *self.negative)))

    def digest(self) -> str:
        """SHA-256 over all token ids."""
        ids = [[row.ids for row in side] for side in (self.positive, self.negative)]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
