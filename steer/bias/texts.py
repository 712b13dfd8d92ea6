"""What mitigations are fitted on, as rows: pairs of texts that differ in a group alone, and running text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.checks import of_type
from steer.directions.contrast import ContrastSet
from steer.errors import ContrastError
from steer.model.tokens import Row, check_tokenizer

Pairs = Sequence[tuple[str, str]] | ContrastSet


def contrast_of(texts: Pairs, tokenizer: Any, *, least: int, paired: bool = True) -> ContrastSet:
    """Pairs as a contrast set of plain texts, without a chat template; the first text of a pair is the positive one.

    The first token of a text, where the residual stream of most models is unlike anywhere else, counts as its prompt: the span
    `response` leaves it out.

    Args:
        texts: (text, text) pairs, or a contrast set, which is taken as it is.
        least: pairs that are needed, or texts of each group.
        paired: the method compares the two texts of a pair.

    Raises:
        ConfigError: no pairs. ContrastError: too few of them, twins, or a contrast set without pairs for a method of pairs.
    """
    if not isinstance(texts, ContrastSet):
        of_type(texts, (list, tuple), "the pairs of a mitigation", "pass a list of (text, text) pairs, or a ContrastSet")
        for i, pair in enumerate(texts):
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) and text.strip() for text in pair):
                raise _no_pair(i, pair)
        sides = [tuple(running_text(tokenizer, pair[side]) for pair in texts) for side in (0, 1)]
        if len(texts) >= least:
            texts = ContrastSet(sides[0], sides[1], paired=True)
    found = min(len(texts.positive), len(texts.negative)) if isinstance(texts, ContrastSet) else len(texts)
    if found < least:
        raise _too_few(found, least)
    assert isinstance(texts, ContrastSet)
    if paired and not texts.paired:
        raise _not_paired(texts)
    return texts


def running_text(tokenizer: Any, text: str) -> Row:
    """A text as a row whose prompt is its first token, or nothing where it has no other."""
    check_tokenizer(tokenizer)
    ids = tuple(tokenizer(text).input_ids)
    return Row(ids, min(1, len(ids) - 1) if ids else 0)


# ---- errors


def _no_pair(index: int, pair: object) -> ContrastError:
    return ContrastError(
        f"pair {index} of a mitigation is none",
        expected="(text, text), two texts that differ in the group alone",
        found=repr(pair)[:80],
        remedy="complete the pair, or leave it out",
    )


def _too_few(found: int, least: int) -> ContrastError:
    return ContrastError(
        "too few pairs to fit this mitigation",
        expected=f"at least {least}",
        found=found,
        remedy="give more pairs, or ask for fewer components or classifiers; without any, those of steer.bias.gender_texts are used",
    )


def _not_paired(contrast: ContrastSet) -> ContrastError:
    return ContrastError(
        "this mitigation compares the two texts of a pair",
        expected="a paired contrast set",
        found=contrast,
        remedy="make pairs, or use a method that needs none (projection, inlp, leace)",
    )
