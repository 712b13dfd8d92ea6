"""Held out by group: a direction is judged on groups that it has not seen, its quality says so, and too few groups are refused."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from steer.directions import ContrastSet, Direction, Directions, extract, select, train_direction
from steer.directions.heldout import group_separation, is_at_chance, separation
from steer.errors import ConfigError, ContrastError
from steer.features import Encoder, InMemory, Origin, sae_refined
from steer.features.activations.relu import ReLU
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.model.site import Site
from steer.model.tokens import Row

SITE = "layers.1.output"
TOPICS = ("cities", "animals", "elements", "spanish", "facts", "sums")


def topical(paired: bool = True, topics: int = 6, each: int = 8) -> ContrastSet:
    """Texts of several topics, in each of which another token tells the classes apart."""
    generator = torch.Generator().manual_seed(3)
    positive, negative, groups = [], [], []
    for topic in range(topics):
        for _ in range(each):
            text = torch.randint(40, 96, (5,), generator=generator).tolist()
            positive.append(Row((*text, 10 + topic), 2))
            negative.append(Row((*text, 20 + topic), 2))
            groups.append(TOPICS[topic])
    return ContrastSet(tuple(positive), tuple(negative), paired, tuple(groups if paired else groups + groups))


def quiet(tiny, shared: float):
    """A model whose blocks add little, and whose positive tokens differ from negative ones by `shared` parts of one direction."""
    model = tiny("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(0.02)
            block.mlp.down_proj.weight.mul_(0.02)
        embedding = model.get_input_embeddings().weight
        embedding[10:16] = torch.eye(32)[:6] * 6 + shared * torch.eye(32)[20]
        embedding[20:26] = -torch.eye(32)[:6] * 6 - shared * torch.eye(32)[20]
        embedding[40:] *= 0.1
    return model


@given(st.integers(2, 8), st.booleans(), st.floats(0.05, 0.95), st.integers(0, 99))
def test_a_split_by_group_leaves_every_group_whole(topics, paired, holdout, seed):
    contrast = topical(paired, min(topics, 6), each=2)
    train, held = contrast.split(holdout, seed)
    assert not set(train.groups) & set(held.groups) and set(train.groups) | set(held.groups) == set(contrast.groups)
    names = dict(zip([row.ids for row in contrast.rows()[0]], contrast.row_groups(), strict=True))
    for part in (train, held):
        assert [names[row.ids] for row in part.rows()[0]] == part.row_groups() and part.paired is paired
    assert len(set(held.groups)) == min(max(round(min(topics, 6) * holdout), 1), min(topics, 6) - 1)
    assert contrast.split(holdout, seed)[1] == held


@pytest.mark.parametrize("paired", [True, False])
def test_a_direction_of_single_topics_is_at_chance_on_others(paired, tiny):
    """What texts of the same topics call perfect, unseen topics call chance."""
    model = quiet(tiny, shared=0.0)
    contrast = topical(paired)
    by_text = extract(model, dataclasses.replace(contrast, groups=()), [SITE], name="truth", progress=False)[SITE]
    by_group = extract(model, contrast, [SITE], name="truth", progress=False)[SITE]
    assert by_text.metrics["auc"] == 1.0 and by_text.held_out == "texts" and "unseen" not in repr(by_text)
    assert by_group.metrics["auc"] < 0.8 and by_group.held_out == "groups" and "on 2 unseen groups" in repr(by_group)
    assert by_group.metrics["n_heldout_groups"] == 2 and by_group.metrics["auc_worst_group"] <= by_group.metrics["auc"] + 0.2


def test_a_direction_that_topics_share_is_not(tiny, tmp_path):
    directions = extract(quiet(tiny, shared=9.0), topical(), [SITE, "embed"], name="truth", span="last", progress=False)
    assert directions[SITE].metrics["auc"] == 1.0 == directions[SITE].metrics["auc_worst_group"]
    assert directions.provenance["held_out"] == "groups" and len(directions.provenance["groups_fitted_on"]) == 4
    loaded = Directions.load(directions.save(tmp_path / "truth"))
    assert loaded[SITE].held_out == "groups" and loaded.best().metrics == directions.best().metrics


def test_best_does_not_compare_unseen_groups_with_seen_ones(tiny):
    model = quiet(tiny, shared=9.0)
    contrast = topical()
    grouped = extract(model, contrast, [SITE], name="truth", progress=False)[SITE]
    plain = extract(model, dataclasses.replace(contrast, groups=()), ["embed"], name="truth", progress=False)["embed"]
    with pytest.raises(ConfigError, match="judged in different ways"):
        Directions([grouped, plain], "truth", {}).best()


def test_select_rejects_what_is_at_chance_on_unseen_groups(tiny):
    model = quiet(tiny, shared=0.0)
    vector = torch.eye(32)[3]
    metrics = {"dprime": 0.1, "n_heldout": 40.0}
    known = [
        Direction(Site.parse(SITE), vector, "a", "last", {**metrics, "auc": auc, **groups})
        for auc, groups in ((0.52, {"n_heldout_groups": 2.0}), (0.9, {"n_heldout_groups": 2.0}), (0.52, {}))
    ]
    rows = [Row((50, 51, 60 + i), 3) for i in range(4)]
    selection = select(model, known, showing=rows[:2], lacking=rows[2:], tokens=[10], max_kl=1e9, progress=False)
    chance = ["no better than chance on groups" in candidate.rejected for candidate in selection.candidates]
    assert chance == [True, False, False]
    assert [candidate.held_out for candidate in selection.candidates] == ["groups", "groups", "texts"]
    assert selection.to_dict()["candidates"][1]["auc"] == 0.9


def test_what_is_trained_or_rebuilt_is_judged_on_unseen_groups_too(tiny):
    model = quiet(tiny, shared=9.0)
    contrast = topical()
    trained = train_direction(model, contrast, SITE, name="truth", method="reps", steps=1, batch_size=2, progress=False)[SITE]
    direction = extract(model, contrast, [SITE], name="truth", progress=False)[SITE]
    eye = torch.cat([torch.eye(32), -torch.eye(32)])  # [features, width]
    encoder = Encoder(InMemory(eye), torch.zeros(64), ReLU())
    dictionary = SparseAutoencoder(encoder, InMemory(eye), torch.zeros(32), Origin((SITE,), (SITE,)))
    refined = sae_refined(model, contrast, direction, dictionary, top=8, progress=False).direction
    assert [entry.metrics["n_heldout_groups"] for entry in (trained, refined)] == [2, 2]


def test_the_lowest_auc_within_a_group_is_by_hand():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0, 9.0, 5.0, 6.0, 8.0, 1.0], dtype=torch.float64)
    positive = torch.tensor([True, True, False, False, True, True, False, False, True])
    groups = ["a"] * 4 + ["b"] * 4 + ["alone"]
    assert group_separation(values, positive, groups) == {"n_heldout_groups": 3.0, "auc_worst_group": 0.5}
    assert group_separation(values, positive, []) == {}


def test_chance_is_what_random_projections_reach_in_nineteen_of_twenty_draws():
    generator = torch.Generator().manual_seed(0)
    draws = [separation(*torch.randn(2, 30, generator=generator, dtype=torch.float64)) for _ in range(2000)]
    assert 0.03 < sum(not is_at_chance(draw) for draw in draws) / 2000 < 0.07


def test_pairs_of_a_file_have_their_group_under_a_key():
    words = ["cat", "dog", "house", "tree"]
    pairs = [{"prompt": word, "positive": f"good {word}", "negative": f"bad {word}", "group": "ab"[i % 2]} for i, word in enumerate(words)]
    contrast = ContrastSet.from_pairs(tiny_tokenizer(), pairs)
    assert contrast.groups == ("a", "b", "a", "b") and repr(contrast) == "ContrastSet(4 pairs in 2 groups)"
    sets = ContrastSet.from_sets(tiny_tokenizer(), ["good cat", "good dog"], ["bad cat"], groups=["x", "y", "x"])
    assert sets.groups == ("x", "y", "x") == tuple(sets.row_groups())
    with pytest.raises(ContrastError, match="pair 1 has no group"):
        ContrastSet.from_pairs(tiny_tokenizer(), [pairs[0], {key: pairs[1][key] for key in ("prompt", "positive", "negative")}])


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        (("a",) * 12, "too few groups(.|\n)*at least 2 groups(.|\n)*1 \\(a\\)"),
        (("a",) * 11 + ("b",), "no split by groups leaves texts of both classes"),
        (("a", "b"), "groups do not match the pairs(.|\n)*12 names"),
        (("a",) * 11 + (" ",), "pair 11 has no group"),
        (("a",) * 11 + (3,), "pair 11 has no group(.|\n)*3"),
    ],
)
def test_groups_that_cannot_be_held_out_are_refused(groups, match):
    contrast = topical(topics=6, each=2)
    with pytest.raises(ContrastError, match=match):
        ContrastSet(contrast.positive, contrast.negative, True, groups).split(0.25, 0)


def test_groups_as_one_text_are_refused():
    contrast = topical(topics=2, each=2)
    with pytest.raises(ConfigError, match="the groups of texts"):
        ContrastSet(contrast.positive, contrast.negative, True, "abcd")
