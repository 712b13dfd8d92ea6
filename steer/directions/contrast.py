"""Contrast sets: texts that show a concept and texts that do not."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steer.checks import number_within, of_type
from steer.errors import ContrastError, did_you_mean
from steer.model.tokens import Row, check_rows, encode

HOLDOUT = 0.25  # share of the texts that is held out where nothing else is said
GROUP_DRAWS = 100  # of held-out groups, until both parts have texts of both classes


def text_digest(row: Row) -> str:
    """16 hexadecimal digits that stand for the tokens of a text."""
    return hashlib.sha256(json.dumps(row.ids).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ContrastSet:
    """Tokenised positive and negative texts.

    Attributes:
        paired: entry i of both lists answers the same prompt.
        groups: what each pair belongs to (its topic, its template); without pairs one name a text, the positive texts before the negative
            ones. Empty for none. Where they are given, whole groups are held out, so that a direction is judged on groups it has not seen.

    Raises:
        ContrastError: an empty side, pairs that do not match, or a text that is there twice.

    Example:
        >>> pairs = [
        ...     {"prompt": "How are you?", "positive": "Wonderful, thanks!", "negative": "Bad."},
        ...     {"prompt": "How was the day?", "positive": "A joy!", "negative": "It rained."},
        ... ]
        >>> steer.ContrastSet.from_pairs(tokenizer, pairs)
        ContrastSet(2 pairs)
    """

    positive: tuple[Row, ...]
    negative: tuple[Row, ...]
    paired: bool
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_rows(self.positive, "the positive texts of a contrast set")
        check_rows(self.negative, "the negative texts of a contrast set")
        of_type(self.paired, bool, "`paired` of a contrast set", "pass True or False")
        if not self.positive or not self.negative:
            raise _empty_side_error(self)
        if self.paired and len(self.positive) != len(self.negative):
            raise _unmatched_error(self)
        negative = set(self.negative)
        for i, row in enumerate(self.positive):
            if row in negative:
                raise _both_sides_error(i)
        for side, rows in (("positive", self.positive), ("negative", self.negative)):
            first: dict[Row, int] = {}
            for i, row in enumerate(rows):
                if first.setdefault(row, i) != i:  # a copy among the held-out texts would be judged by what it was learned from
                    raise _repeated_error(side, first[row], i, self.paired)
        check_groups(self.groups, len(self.positive) if self.paired else len(self), "pair" if self.paired else "text")
        object.__setattr__(self, "groups", tuple(self.groups))

    def __repr__(self) -> str:
        groups = f" in {len(set(self.groups))} groups" if self.groups else ""
        if self.paired:
            return f"ContrastSet({len(self.positive)} pairs{groups})"
        return f"ContrastSet({len(self.positive)} positive and {len(self.negative)} negative texts{groups})"

    @classmethod
    def from_pairs(cls, tokenizer: Any, pairs: Sequence[Mapping[str, str]]) -> ContrastSet:
        """Pairs with the keys `prompt`, `positive`, `negative` (two answers to one prompt), and `group` where whole groups are held out.

        Raises:
            ContrastError: a pair that lacks a part.
        """
        of_type(pairs, (list, tuple), "the pairs of a contrast set", "pass a list of {'prompt': ..., 'positive': ..., 'negative': ...}")
        for i, pair in enumerate(pairs):
            of_type(pair, Mapping, f"pair {i} of a contrast set", "pass {'prompt': ..., 'positive': ..., 'negative': ...}")
            parts = {key: pair.get(key) for key in ("prompt", "positive", "negative")}
            if wrong := {key: part for key, part in parts.items() if not isinstance(part, str) or not part}:
                raise _part_error(i, wrong, sorted(map(str, pair.keys() - {*parts, "group"})))
        positive = tuple(encode(tokenizer, pair["prompt"], pair["positive"]) for pair in pairs)
        negative = tuple(encode(tokenizer, pair["prompt"], pair["negative"]) for pair in pairs)
        groups = tuple(pair.get("group") for pair in pairs) if any("group" in pair for pair in pairs) else ()
        return cls(positive, negative, paired=True, groups=groups)  # type: ignore[arg-type]  # one that is missing is refused by number

    @classmethod
    def from_sets(cls, tokenizer: Any, positive: Sequence[str], negative: Sequence[str], *, groups: Sequence[str] = ()) -> ContrastSet:
        """Two unrelated sets of prompts; read them with a span other than `response`. groups: see the class."""
        for side, texts in (("positive", positive), ("negative", negative)):
            of_type(texts, (list, tuple), f"the {side} texts of a contrast set", "pass a list of texts")
        return cls(
            tuple(encode(tokenizer, text) for text in positive),
            tuple(encode(tokenizer, text) for text in negative),
            paired=False,
            groups=tuple(groups),
        )

    def split(self, holdout: float, seed: int) -> tuple[ContrastSet, ContrastSet]:
        """Training and held-out part; pairs stay together, and so do groups, where there are any.

        Raises:
            ContrastError: either part would have fewer than two texts a side; there are fewer than two groups.
        """
        number_within(holdout, "the held-out share of the texts", 0, 1)
        of_type(seed, int, "the seed", "pass a whole number such as 0")
        generator = torch.Generator().manual_seed(seed)
        if self.groups:
            return self._split_by_group(holdout, generator)
        positive = _drawn(len(self.positive), holdout, generator)
        negative = positive if self.paired else _drawn(len(self.negative), holdout, generator)
        train = self._subset(positive[0], negative[0])
        held_out = self._subset(positive[1], negative[1])
        return train, held_out

    def _split_by_group(self, holdout: float, generator: torch.Generator) -> tuple[ContrastSet, ContrastSet]:
        """Holds whole groups out; of several draws the first that leaves two texts a side to either part."""
        sides = [self.groups, self.groups if self.paired else self.groups[len(self.positive) :]]
        sizes = (len(self.positive), len(self.negative))
        for held_out in held_out_groups(self.groups, holdout, generator):
            parts = [
                [[i for i in range(size) if (groups[i] in held_out) == held] for size, groups in zip(sizes, sides, strict=True)]
                for held in (False, True)
            ]
            if all(len(side) >= 2 for part in parts for side in part):
                return self._subset(*parts[0]), self._subset(*parts[1])
        raise _group_sides_error(self, holdout)

    def _subset(self, positive: Sequence[int], negative: Sequence[int]) -> ContrastSet:
        chosen = positive if self.paired else [*positive, *(len(self.positive) + i for i in negative)]
        groups = tuple(self.groups[i] for i in chosen) if self.groups else ()
        return ContrastSet(tuple(self.positive[i] for i in positive), tuple(self.negative[i] for i in negative), self.paired, groups)

    def row_groups(self) -> list[str]:
        """The group of every text, in the order of `rows`; empty without groups."""
        return [group for group in self.groups for _ in range(2)] if self.paired else list(self.groups)

    def rows(self) -> tuple[list[Row], list[bool]]:
        """All texts and whether each is positive; a pair's two texts stand side by side."""
        if self.paired:
            pairs = zip(self.positive, self.negative, strict=True)
            return [row for pair in pairs for row in pair], [True, False] * len(self.positive)
        return [*self.positive, *self.negative], [True] * len(self.positive) + [False] * len(self.negative)

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


def check_groups(groups: Any, count: int, unit: str) -> None:
    """Raises ConfigError or ContrastError unless these are no groups, or the name of one for each text or pair.

    Args:
        count: number of texts or pairs.
        unit: what each name is of, for the message.
    """
    of_type(groups, (tuple, list), "the groups of texts", f"pass the name of a group for each {unit}, or leave them out")
    if groups and len(groups) != count:
        raise _group_count_error(len(groups), count, unit)
    for i, group in enumerate(groups):
        if not isinstance(group, str) or not group.strip():
            raise _group_name_error(i, group, unit)


def held_out_groups(groups: Sequence[str], holdout: float, generator: torch.Generator) -> Iterator[set[str]]:
    """Draws of the groups that are held out: the share `holdout` of them, at least one and not all. Raises ContrastError for one group."""
    names = sorted(set(groups))
    if len(names) < 2 or not 0 < holdout < 1:
        raise _few_groups_error(names, holdout)
    count = min(max(round(len(names) * holdout), 1), len(names) - 1)
    for _ in range(GROUP_DRAWS):
        yield {names[i] for i in torch.randperm(len(names), generator=generator)[:count].tolist()}


def _drawn(n: int, holdout: float, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Which of n texts to learn from, and which are held out."""
    order = torch.randperm(n, generator=generator).tolist()
    held_out = round(n * holdout)
    if held_out < 2 or n - held_out < 2:
        raise _split_error(n, held_out, holdout)
    return sorted(order[held_out:]), sorted(order[:held_out])


def _empty_side_error(contrast: ContrastSet) -> ContrastError:
    return ContrastError(
        "contrast set is empty on one side",
        expected=f"texts on both sides, {_enough(HOLDOUT)} or more for `extract`, which holds {HOLDOUT:.0%} of them out",
        found=f"{len(contrast.positive)} positive, {len(contrast.negative)} negative",
        remedy="give texts for both sides: a direction is the difference between them",
    )


def _unmatched_error(contrast: ContrastSet) -> ContrastError:
    return ContrastError(
        "pairs do not match",
        expected="a positive and a negative text for every prompt",
        found=f"{len(contrast.positive)} positive, {len(contrast.negative)} negative",
        remedy="add the missing texts, or pass paired=False when the two sides answer different prompts",
    )


def _both_sides_error(index: int) -> ContrastError:
    return ContrastError(
        "a text is on both sides of the contrast",
        expected="every text on one side only",
        found=f"positive text {index}, which is a negative one too",
        remedy="remove it from one side",
    )


def _repeated_error(side: str, first: int, second: int, paired: bool) -> ContrastError:
    return ContrastError(
        f"{side} text {second} repeats another one",
        expected="every text once: held-out texts say something only when the direction was not made from them",
        found=f"{side} texts {first} and {second} are the same",
        remedy=f"remove text {second}" + (" and its partner" if paired else ""),
    )


def _part_error(index: int, wrong: dict[str, Any], unknown: Sequence[str]) -> ContrastError:
    guesses = {key: near for key in unknown if (near := did_you_mean(key, wrong))}
    return ContrastError(
        f"pair {index} of a contrast set lacks a part",
        expected="text under each of prompt, positive and negative",
        found=f"{wrong}" + f", and the unknown {', '.join(map(repr, unknown))}" * bool(unknown),
        remedy="; ".join(f"'{key}': {guess}" for key, guess in guesses.items()) or "complete the pair, or leave it out",
    )


def _split_error(n: int, held_out: int, holdout: float) -> ContrastError:
    share = holdout if 0 < holdout < 1 else HOLDOUT
    remedy = f"give at least {_enough(share)} texts a side with holdout={share:g}"
    return ContrastError(
        "too few texts to hold some out",
        expected="at least 2 a side to learn from, and 2 held out",
        found=f"{n - held_out} of {n} to learn from, {held_out} held out, with holdout={holdout:g}",
        remedy=remedy + (", or pass holdout=0.5" if n >= 4 else ""),
    )


def _enough(holdout: float) -> int:
    """The fewest texts a side of which this share leaves two to either part."""
    least = max(4, int(1.5 / min(holdout, 1 - holdout)))
    return next(count for count in itertools.count(least) if 2 <= round(count * holdout) <= count - 2)


def _group_count_error(found: int, expected: int, unit: str) -> ContrastError:
    return ContrastError(
        f"groups do not match the {unit}s",
        expected=f"{expected} names, one for each {unit}",
        found=found,
        remedy=f"give the group of every {unit}; without pairs, those of the positive texts come first",
    )


def _group_name_error(index: int, group: Any, unit: str) -> ContrastError:
    return ContrastError(
        f"{unit} {index} has no group, where others have one",
        expected="the name of a group as text",
        found="none" if group is None else repr(group),
        remedy=f"name the group (topic, template) of every {unit}, or of none",
    )


def _few_groups_error(names: Sequence[str], holdout: float) -> ContrastError:
    return ContrastError(
        "too few groups to hold some out" if len(names) < 2 else "no share of the groups is held out",
        expected="at least 2 groups, and a share of them between 0 and 1",
        found=f"{len(names)} ({', '.join(names[:3])}), of which the share {holdout:g} is held out",
        remedy="give texts of more groups, or leave the groups out: texts of the same group are then held out",
    )


def _group_sides_error(contrast: ContrastSet, holdout: float) -> ContrastError:
    return ContrastError(
        "no split by groups leaves texts of both classes to either part",
        expected="at least 2 positive and 2 negative texts in the groups that are held out, and in the others",
        found=f"none in {GROUP_DRAWS} draws from {len(set(contrast.groups))} groups with holdout {holdout:g}",
        remedy="give more texts of both classes in each group, or more groups",
    )
