"""What cannot be attributed or used is told: the thing, what was expected, what was found, and what to do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from circuits.attribution_helpers import CLEAN, pairs, rows, target
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer

from steer.circuits import (
    Ablation,
    Circuit,
    ComponentScores,
    LogitDifference,
    LogProbability,
    Pairs,
    attribute,
    information_flow,
    mean_ablation,
    resample_ablation,
    zero_ablation,
)
from steer.errors import ConfigError, NonFiniteError, SteerError, WrongModelError


@pytest.fixture(scope="module")
def model():
    return FAMILIES["llama"]()


@pytest.fixture(scope="module")
def scores(model) -> ComponentScores:
    return scored(model)


def scored(model, target=target, **how) -> ComponentScores:
    return attribute(model, how.pop("pairs", None) or pairs(model), target, method=how.pop("method", "eap"), progress=False, **how)


def told(error: SteerError, *words: str) -> None:
    """All four parts are there, and these words are in them."""
    text = str(error)
    assert all(part in text for part in ("expected:", "found:", "remedy:"))
    for word in words:
        assert word in text


# ---- targets

CONSTANT = {
    "detached": lambda logits, prompt: target(logits.detach(), prompt),
    "item": lambda logits, prompt: torch.tensor(logits[-1, 3].item()),
    "argmax": lambda logits, prompt: logits[-1].argmax().float(),
    "comparison": lambda logits, prompt: (logits[-1, 3] > logits[-1, 4]).float(),
    "a number of its own": lambda logits, prompt: torch.ones((), requires_grad=True) * 2,
    "multiplied by 0": lambda logits, prompt: logits[-1, 3] * 0,
    "a logit less itself": lambda logits, prompt: logits[-1, 3] - logits[-1, 3],
}


@pytest.mark.parametrize("method", ["eap", "eap_ig", "mask_gradient", "eap_gp"])
@pytest.mark.parametrize("name", CONSTANT)
def test_a_target_without_a_gradient_is_refused(model, name, method):
    with pytest.raises(ConfigError, match=r"target[\s\S]*gradient") as raised:
        scored(model, CONSTANT[name], method=method, edges=False)
    told(raised.value, "differentiable")


def test_a_target_of_one_token_alone_is_not_constant(model):
    """The first token of a text reads no other: nothing that differs between these prompts reaches it."""
    same_start = pairs(model, [[5, 9, 33]], [[5, 8, 31]])
    with pytest.raises(ConfigError, match="every component scores zero") as raised:
        scored(model, lambda logits, prompt: logits[0, 3], pairs=same_start, edges=False)
    told(raised.value, "look at the pairs")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda logits, prompt: 3.0, ("gives no number", "float")),
        (lambda logits, prompt: None, ("gives no number", "NoneType")),
        (lambda logits, prompt: logits[-1], ("gives no number", "[96]")),
        (lambda logits, prompt: logits[-1, :0], ("gives no number", "[0]")),
    ],
)
def test_a_target_that_is_no_number_is_refused(model, value, words):
    with pytest.raises(ConfigError) as raised:
        scored(model, value)
    told(raised.value, *words)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_target_that_is_not_finite_is_refused(model, value):
    with pytest.raises(NonFiniteError, match="prompt 0") as raised:
        scored(model, lambda logits, prompt: logits[-1, 3] + value)
    told(raised.value)


def test_gradients_that_are_not_finite_are_refused(model):
    with pytest.raises(NonFiniteError, match="gradient of the target") as raised:
        scored(model, lambda logits, prompt: (logits[-1, 3] - logits[-1, 3].detach()).sqrt())
    told(raised.value, "finite")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LogitDifference(5, 96), ("does not exist", "0 to 95", "96")),
        (lambda: LogProbability(10**9), ("does not exist", "0 to 95")),
        (lambda: LogitDifference([5], [6]), ("tokens of a target", "2 prompts")),
        (lambda: LogProbability(-1), ("a token of a target",)),
        (lambda: LogitDifference("a", 3), ("token",)),
    ],
)
def test_tokens_of_a_target_that_do_not_fit_are_refused(model, make, words):
    with pytest.raises(ConfigError) as raised:
        scored(model, make())
    told(raised.value, *words)


# ---- pairs


def test_prompts_of_a_pair_have_one_length(model):
    with pytest.raises(ConfigError) as raised:
        pairs(model, CLEAN, [CLEAN[0], [1, 2, 3]])
    told(raised.value, "1 of 2 pairs", "pair 1: 4 tokens, 3 tokens")


def test_prompts_of_other_lengths_are_shown_and_need_no_counterfactual(model):
    tokenizer, clean = tiny_tokenizer(), ["the cat sat", "the cat sat on"]
    with pytest.raises(ConfigError) as raised:
        Pairs.of(model, clean, ["the dog", "the dog sat on"], tokenizer=tokenizer)
    told(raised.value, "pair 0: 3 tokens in 'the cat sat', 2 tokens in 'the dog'", "Pairs.of(model, clean, clean)", "method='eap'")
    alone = Pairs.of(model, clean, clean, tokenizer=tokenizer)
    mean = mean_ablation(model, ["the dog ran in the house", "we like the sun and the moon"], tokenizer=tokenizer)
    assert scored(model, LogitDifference(8, 9), pairs=alone, ablation=mean).nodes.any()  # as the remedy says


@pytest.mark.parametrize("method", ["eap", "eap_ig", "mask_gradient", "clean_corrupted"])
def test_a_counterfactual_that_is_its_prompt_attributes_nothing(model, method):
    with pytest.raises(ConfigError) as raised:
        scored(model, pairs=pairs(model, CLEAN, [CLEAN[0][::-1], CLEAN[1]]), method=method)
    told(raised.value, "1 of 2 pairs: 1")


def test_scores_that_are_all_zero_are_refused(model):
    """The counterfactuals differ at their last token alone, which has no role."""
    labels = [["seen"] * (len(row) - 1) + [None] for row in CLEAN]
    clean, corrupted = rows(CLEAN), rows([[*row[:-1], row[-1] + 1] for row in CLEAN])
    with pytest.raises(ConfigError) as raised:
        scored(model, pairs=Pairs.of(model, clean, corrupted, positions=labels), edges=False)
    told(raised.value, "scores zero", "positions")


@pytest.mark.parametrize(("right", "wrong", "where"), [(5, 5, "token 5"), ([4, 5], [5, 5], "prompts [1]"), ([4, 5], 5, "prompts [1]")])
def test_a_token_against_itself_is_no_target(right, wrong, where):
    with pytest.raises(ConfigError) as raised:
        LogitDifference(right, wrong)
    told(raised.value, where, "another token")


@pytest.mark.parametrize(("clean", "corrupted"), [(CLEAN, CLEAN[:1]), (CLEAN[:1], CLEAN), ([], CLEAN)])
def test_prompts_pair_up(model, clean, corrupted):
    with pytest.raises(ConfigError) as raised:
        pairs(model, clean, corrupted)
    told(raised.value)


def test_no_pairs_are_refused(model):
    with pytest.raises(ConfigError) as raised:
        pairs(model, [], [])
    told(raised.value, "at least one")


@pytest.mark.parametrize("given", [None, [CLEAN, CLEAN], "a text"])
def test_what_is_no_pairs_is_refused(model, given):
    with pytest.raises(ConfigError) as raised:
        attribute(model, given, target, progress=False)
    told(raised.value, "Pairs.of")


def test_tokens_beyond_the_vocabulary_are_refused(model):
    with pytest.raises(ConfigError) as raised:
        scored(model, pairs=pairs(model, [[5, 96]], [[5, 6]]))
    told(raised.value, "96")
    with pytest.raises(ConfigError) as raised:
        scored(model, pairs=pairs(model, [[5, 6]], [[5, 96]]))
    told(raised.value, "96")


def test_scores_that_are_all_zero_choose_nothing(scores):
    """Of a file, say: `attribute` refuses to give such."""
    nothing = dataclasses.replace(scores, nodes=scores.nodes * 0, edges=scores.edges * 0)
    for choose in (lambda: nothing.top_nodes(1), lambda: nothing.top_edges(1)):
        with pytest.raises(ConfigError, match="all scores of (nodes|edges) are zero") as raised:
            choose()
        told(raised.value, "may be the same")


# ---- arguments


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"method": "eap_igg"}, ("attribution method", "eap_ig")),
        ({"method": 3}, ("method of an attribution",)),
        ({"rule": "relpp"}, ("backward rule", "relp")),
        ({"ablation": "mean"}, ("ablation", "zero_ablation")),
        ({"max_tokens": 0}, ("max_tokens",)),
        ({"max_tokens": "many"}, ("max_tokens",)),
    ],
)
def test_arguments_are_looked_at(model, how, words):
    with pytest.raises(ConfigError) as raised:
        scored(model, **how)
    told(raised.value, *words)


def test_means_of_positions_do_not_stand_for_texts_of_any_length(model):
    ablation = mean_ablation(model, rows([CLEAN[0]]), per_position=True)
    with pytest.raises(ConfigError) as raised:
        scored(model, ablation=ablation)
    told(raised.value, "mean per position")


def test_means_of_another_model_are_refused(model):
    with pytest.raises(SteerError) as raised:
        scored(model, ablation=mean_ablation(FAMILIES["llama"](hidden_size=64), rows(CLEAN)))
    told(raised.value, "64", "32")


@pytest.mark.parametrize("ablate", [zero_ablation, lambda: Ablation("mean", {})])
def test_constants_are_there_for_every_site(model, ablate):
    if ablate().kind == "zero":
        assert bool(scored(model, ablation=ablate()).nodes.any())
    else:
        with pytest.raises(ConfigError, match="no constant for") as raised:
            scored(model, ablation=ablate())
        told(raised.value)


# ---- names and circuits


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a0.h4", ("no writer 'a0.h4'",)),
        ("a9.h0", ("no writer 'a9.h0'",)),
        ("m3", ("no writer 'm3'",)),
        ("a0.h1->a2.h9<q>", ("no reader 'a2.h9<q>'",)),
        ("a0.h1->a2.h1<k>", ("no reader 'a2.h1<k>'", "a<layer>.g<group><k>")),
        ("a2.h1->a1.h1<q>", ("no edge",)),
        ("m1->m1", ("no edge",)),
        ("", ("no writer ''",)),
    ],
)
def test_unknown_names_are_refused(scores, name, words):
    with pytest.raises(ConfigError) as raised:
        scores[name]
    told(raised.value, *words)


def test_a_circuit_of_unknown_or_no_nodes_is_refused(model):
    with pytest.raises(ConfigError) as raised:
        Circuit.of_nodes(model, ["a0.h1", "a0.h7"])
    told(raised.value, "a0.h7")
    with pytest.raises(ConfigError, match="empty") as raised:
        Circuit.of_nodes(model, [])
    told(raised.value, "at least one")


@pytest.mark.parametrize(
    "choose",
    [
        lambda scores: scores.top_nodes(0),
        lambda scores: scores.top_nodes(13),
        lambda scores: scores.top_nodes(1, kinds=("heads",)),
        lambda scores: scores.top_nodes(1.5),
        lambda scores: scores.top_edges(10**6),
        lambda scores: scores.top_neurons(1),
        lambda scores: dataclasses.replace(scores, edges=None).top_edges(1),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(scores, choose):
    with pytest.raises(ConfigError) as raised:
        choose(scores)
    told(raised.value)


def test_an_empty_circuit_is_no_plan(model, scores):
    empty = dataclasses.replace(scores.top_nodes(1), nodes=torch.zeros(len(scores.graph.writers), dtype=torch.float64))
    with pytest.raises(ConfigError, match="empty") as raised:
        empty.with_ablation(zero_ablation()).ablation_plan(model)
    told(raised.value)


def test_a_circuit_without_constants_is_no_plan(model, scores):
    with pytest.raises(ConfigError, match="what takes the place") as raised:
        scores.top_nodes(1).ablation_plan(model)
    told(raised.value, "mean_ablation")
    with pytest.raises(ConfigError, match="no constant") as raised:
        scores.top_nodes(1).with_ablation(resample_ablation()).ablation_plan(model)
    told(raised.value, "mean_ablation")


@pytest.mark.parametrize("other", ["llama of another depth", "llama of other heads", "llama of other weights", "gpt2"])
def test_the_circuit_of_another_model_is_refused(scores, other):
    def fresh():
        if other.endswith("weights"):
            changed = FAMILIES["llama"]()
            changed.model.embed_tokens.weight.data.mul_(2)
            return changed
        sizes = {"depth": {"num_hidden_layers": 2}, "heads": {"num_attention_heads": 8}}.get(other.rpartition(" ")[2], {})
        return FAMILIES["gpt2" if other == "gpt2" else "llama"](**sizes)

    with pytest.raises(WrongModelError) as raised:
        scores.top_nodes(1).with_ablation(zero_ablation()).ablation_plan(fresh())
    told(raised.value)


def test_resampling_has_no_place_in_generation(model, scores):
    """What another prompt gives is known for no text that is being written: there is no plan that could be attached."""
    with pytest.raises(ConfigError, match="text of any length"):
        scores.top_nodes(1).with_ablation(resample_ablation()).ablation_plan(model)


# ---- models


def test_a_model_without_logits_is_refused(model):
    with pytest.raises(SteerError) as raised:
        scored(model.model)
    told(raised.value, "logits")


@pytest.mark.parametrize("texts", [None, 3, [3], [""]])
def test_texts_of_information_flow_are_looked_at(model, texts):
    with pytest.raises(ConfigError) as raised:
        information_flow(model, texts, progress=False)
    told(raised.value)


def test_text_without_a_tokenizer_is_refused(model):
    with pytest.raises(ConfigError) as raised:
        Pairs.of(model, ["a"], ["b"])
    told(raised.value, "tokenizer")
