"""Contrast sets: pairs stay together, the held-out part is disjoint, and what cannot be read is refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from steer.directions import ContrastSet
from steer.errors import ContrastError
from steer.model.tokens import Row


def numbered(positive: int, negative: int, paired: bool) -> ContrastSet:
    return ContrastSet(tuple(Row((i, 1), 1) for i in range(positive)), tuple(Row((i, 2), 1) for i in range(negative)), paired)


@given(st.integers(4, 60), st.integers(4, 60), st.booleans(), st.floats(0.1, 0.9), st.integers(0, 99))
def test_a_split_is_a_partition_and_keeps_pairs(positive, negative, paired, holdout, seed):
    contrast = numbered(positive, positive if paired else negative, paired)
    try:
        train, held = contrast.split(holdout, seed)
    except ContrastError:
        sizes = {len(contrast.positive), len(contrast.negative)}
        assert any(round(size * holdout) < 2 or size - round(size * holdout) < 2 for size in sizes)
        return
    for side in ("positive", "negative"):
        parts = getattr(train, side), getattr(held, side)
        assert sorted(row.ids for part in parts for row in part) == sorted(row.ids for row in getattr(contrast, side))
        assert not set(parts[0]) & set(parts[1])
    if paired:
        for part in (train, held):
            assert [row.ids[0] for row in part.positive] == [row.ids[0] for row in part.negative]
    assert contrast.split(holdout, seed)[1] == held


@pytest.mark.parametrize("holdout", [0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
def test_too_few_texts_says_how_many_suffice(holdout):
    for texts in (1, 2, 4, 5):
        try:
            numbered(texts, texts, True).split(holdout, 0)
        except ContrastError as error:
            enough = int(re.search(r"at least (\d+) texts a side", error.remedy)[1])
            numbered(enough, enough, True).split(holdout, 0)
            with pytest.raises(ContrastError):
                numbered(enough - 1, enough - 1, True).split(holdout, 0)
    with pytest.raises(ContrastError, match=r"give at least 6 texts a side with holdout=0.25, or pass holdout=0.5"):
        numbered(5, 5, True).split(0.25, 0)
    numbered(4, 4, True).split(0.5, 0)
    for holdout in (0, 1):  # of one text no share can be held out, whatever it is
        with pytest.raises(ContrastError, match=r"remedy: give at least 6 texts a side with holdout=0.25$"):
            numbered(1, 1, True).split(holdout, 0)
    with pytest.raises(ContrastError, match=r"6 or more for `extract`, which holds 25% of them out"):
        numbered(1, 0, False)


def test_pairs_and_sets_are_tokenised():
    tokenizer = tiny_tokenizer()
    pairs = ContrastSet.from_pairs(tokenizer, [{"prompt": "hello", "positive": "good cat", "negative": "bad cat"}])
    assert tokenizer.decode(pairs.positive[0].ids).split()[-3:] == ["good", "cat", "<eos>"]
    assert pairs.paired and pairs.positive[0].prompt == pairs.negative[0].prompt
    sets = ContrastSet.from_sets(tokenizer, ["good cat", "nice cat"], ["bad cat"])
    assert not sets.paired and (len(sets.positive), len(sets.negative)) == (2, 1) and sets.positive[0].response == 0


def test_a_misspelt_key_of_a_pair_is_named():
    pairs = [{"prompt": "a cat", "postive": "good", "negative": "bad", "source": "x"}]
    with pytest.raises(ContrastError, match=r"unknown 'postive', 'source'(.|\n)*'postive': did you mean 'positive'\?$"):
        ContrastSet.from_pairs(tiny_tokenizer(), pairs)


def test_the_texts_of_a_pair_stand_side_by_side():
    rows, sides = numbered(3, 3, True).rows()
    assert [row.ids for row in rows] == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)] and sides == [True, False] * 3
    rows, sides = numbered(2, 1, False).rows()
    assert [row.ids for row in rows] == [(0, 1), (1, 1), (0, 2)] and sides == [True, True, False]


def test_the_digest_depends_on_every_token():
    contrast = numbered(3, 3, True)
    changed = ContrastSet((*contrast.positive[:2], Row((9, 1), 1)), contrast.negative, True)
    assert contrast.digest() == numbered(3, 3, True).digest() != changed.digest()


@pytest.mark.parametrize(
    ("positive", "negative", "paired", "message"),
    [(0, 0, True, "empty"), (3, 0, False, "empty"), (0, 3, False, "empty"), (3, 2, True, "do not match")],
)
def test_empty_and_unmatched_sets_are_refused(positive, negative, paired, message):
    with pytest.raises(ContrastError, match=message):
        numbered(positive, negative, paired)


@pytest.mark.parametrize(("side", "paired"), [("positive", True), ("negative", True), ("negative", False)])
def test_a_repeated_text_is_refused(side, paired):
    """Copies on both sides of a split would make any separation look perfect."""
    contrast = numbered(4, 4, paired)
    sides = {"positive": contrast.positive, "negative": contrast.negative}
    sides[side] = (*sides[side][:3], sides[side][1])
    with pytest.raises(ContrastError, match=f"{side} text 3 repeats(.|\n)*texts 1 and 3(.|\n)*remove text 3"):
        ContrastSet(**sides, paired=paired)


def test_a_text_on_both_sides_is_refused():
    with pytest.raises(ContrastError, match="on both sides"):
        ContrastSet((Row((1, 2), 1), Row((3, 4), 1)), (Row((3, 4), 1),), False)
