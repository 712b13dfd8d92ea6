"""Metrics of given texts are log-probabilities worked out by hand; the base itself has no KL to the base."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from callback_helpers import make_plan
from experiment.metrics.metric_helpers import CHAT, PAIRS, answer_by_hand, logprobs_by_hand, passage_by_hand
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from steer.errors import ConfigError, NonFiniteError
from steer.experiment.metric import check_items, measured, metric_of, passage, with_ids, with_system
from steer.intervene import Plan
from steer.model.tokens import Row

ITEMS = with_ids(PAIRS)
IDS = [item["id"] for item in ITEMS]
CHOICES = with_ids(
    [
        {"prompt": "where is the cat ?", "choices": ["on the mat", "no", "in the house and not under the tree"], "label": 1},
        {"prompt": "who are you ?", "choices": ["thanks", "a good cat"], "label": 0},
        {"prompt": "tell the moon a song", "choices": ["the red moon", "yes please", "two three", "water"], "label": 3},
    ]
)


@pytest.fixture
def model():
    return FAMILIES["llama"]()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "falcon", "mixtral"])
def test_log_probabilities_by_hand(family: str, tokenizer) -> None:
    model = FAMILIES[family]()
    by_hand = [answer_by_hand(model, tokenizer, item["prompt"], item["answer"]) for item in ITEMS]
    trait = [answer_by_hand(model, tokenizer, item["prompt"], item["trait"]) for item in ITEMS]
    assert list(measured(metric_of("answer_logprob"), model, tokenizer, ITEMS).values()) == pytest.approx(by_hand, rel=1e-4)
    gaps = [one - other for one, other in zip(trait, by_hand, strict=True)]
    assert list(measured(metric_of("logprob_gap"), model, tokenizer, ITEMS).values()) == pytest.approx(gaps, rel=1e-3, abs=1e-4)
    losses = [-passage_by_hand(model, tokenizer, item["text"]) for item in ITEMS]
    assert list(measured(metric_of("perplexity"), model, tokenizer, ITEMS).values()) == pytest.approx(losses, rel=1e-4)


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_the_vocabulary(model, tokenizer) -> None:
    model.lm_head.weight.data.zero_()
    values = measured(metric_of("perplexity"), model, tokenizer, ITEMS)
    assert list(values.values()) == pytest.approx([math.log(96)] * 4), "nat, not exp"


def test_a_system_message_moves_a_passage_without_changing_what_is_scored(model, tokenizer) -> None:
    told = with_system(ITEMS, "be rude")
    values = measured(metric_of("perplexity"), model, tokenizer, told)
    by_hand = []
    for item in ITEMS:
        first, rest = item["text"].split(" ", 1)
        ids = tokenizer(rest, add_special_tokens=False).input_ids
        logprobs = logprobs_by_hand(model, tokenizer, f"be rude {first}", rest)
        by_hand.append(-float(logprobs[range(len(ids)), ids].mean()))
    assert list(values.values()) == pytest.approx(by_hand, rel=1e-4)


def test_a_token_that_begins_every_text_stays_first(tokenizer) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    the, cat, be = tokenizer("the cat be", add_special_tokens=False).input_ids
    assert passage(tokenizer, {"text": "the cat"}) == Row((1, the, cat), 1)
    assert passage(tokenizer, {"text": "the cat", "system": "be"}) == Row((1, be, the, cat), 2), "both words are scored as before"


def test_a_system_message_stands_before_that_of_the_item() -> None:
    assert [item["system"] for item in with_system([{"system": "be short"}, {}], "be rude")] == ["be rude\n\nbe short", "be rude"]
    assert with_system([{"prompt": "a"}], None) == [{"prompt": "a"}]


# ---- multiple choice


@pytest.mark.parametrize("length_normalised", [True, False])
def test_choices_by_hand(model, tokenizer, length_normalised: bool) -> None:
    accuracy, probability = {}, {}
    for item in CHOICES:
        means = [answer_by_hand(model, tokenizer, item["prompt"], choice) for choice in item["choices"]]
        lengths = [1 if length_normalised else len(choice.split()) + 1 for choice in item["choices"]]  # with the end of the turn
        scores = [mean * length for mean, length in zip(means, lengths, strict=True)]
        accuracy[item["id"]] = float(scores.index(max(scores)) == item["label"])
        probability[item["id"]] = math.exp(scores[item["label"]]) / sum(map(math.exp, scores))
    options = {"metric": "choice_accuracy", "length_normalised": length_normalised}
    assert measured(metric_of(options), model, tokenizer, CHOICES) == accuracy
    assert measured(metric_of(options | {"value": "probability"}), model, tokenizer, CHOICES) == pytest.approx(probability, rel=1e-3)


def test_length_decides_without_normalisation(model, tokenizer) -> None:
    """Of a model that finds every token equally likely, the shortest choice is the likeliest."""
    model.lm_head.weight.data.zero_()
    item = with_ids([{"prompt": "who are you ?", "choices": ["a good warm cat", "cat"], "label": 1}])
    value = {"metric": "choice_accuracy", "value": "probability"}
    assert list(measured(metric_of(value), model, tokenizer, item).values()) == pytest.approx([0.5])
    (of_sums,) = measured(metric_of(value | {"length_normalised": False}), model, tokenizer, item).values()
    assert of_sums == pytest.approx(1 / (1 + 96.0**-3))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choices": "yes"}, "cannot read the choices"),
        ({"choices": ["yes", 3]}, "cannot read the choices"),
        ({"choices": ["yes", " "]}, "cannot read the choices"),
        ({"choices": ["yes"], "label": 0}, "leaves no choice"),
        ({"choices": ["yes", "yes"], "label": 0}, "leaves no choice"),
        ({"label": 2}, "an index from 0 to 1"),
        ({"label": -1}, "an index from 0 to 1"),
        ({"label": True}, "an index from 0 to 1"),
        ({"label": "1"}, "an index from 0 to 1"),
    ],
)
def test_choices_that_cannot_be_read(change: dict, said: str) -> None:
    item = {"id": "one", "prompt": "who ?", "choices": ["yes", "no"], "label": 1} | change
    with pytest.raises(ConfigError, match=said):
        check_items(metric_of("choice_accuracy"), [item])


# ---- KL


@pytest.mark.parametrize("of", ["passage", "answer"])
def test_kl_by_hand_and_zero_for_the_base(model, tokenizer, of: str) -> None:
    other = FAMILIES["llama"]()
    with torch.no_grad():
        other.lm_head.weight.add_(0.02 * torch.randn(other.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)))
    metric = metric_of({"metric": "kl_to_base", "of": of})
    check_items(metric, ITEMS)
    metric.prepare(model, tokenizer, ITEMS)
    assert set(measured(metric, model, tokenizer, ITEMS).values()) == {0.0}
    values = measured(metric, other, tokenizer, ITEMS)
    for item in ITEMS:
        before, said = item["text"].split(" ", 1) if of == "passage" else (CHAT.format(item["prompt"]), f"{item['answer']} <eos>")
        base, now = (logprobs_by_hand(one, tokenizer, before, said) for one in (model, other))
        assert values[item["id"]] == pytest.approx(float((base.exp() * (base - now)).sum(-1).mean()), rel=1e-3)
        assert values[item["id"]] > 0


def test_kl_is_taken_with_the_plan_and_of_the_same_tokens_after_a_system_message(model, tokenizer) -> None:
    metric = metric_of("kl_to_base")
    metric.prepare(model, tokenizer, ITEMS)
    plan = Plan(dataclasses.replace(make_plan(strength=3.0).interventions[0], scope="all", phases=("validate", "generate")))
    with plan.attached(model):
        assert min(measured(metric, model, tokenizer, ITEMS).values()) > 0.01
    assert set(measured(metric, model, tokenizer, ITEMS).values()) == {0.0}
    assert min(measured(metric, model, tokenizer, with_system(ITEMS, "be rude")).values()) > 0


def test_kl_against_nothing_or_another_vocabulary_or_other_tokens(model, tokenizer) -> None:
    metric = metric_of("kl_to_base")
    with pytest.raises(ConfigError, match="`prepare`"):
        metric.items(model, tokenizer, ITEMS)
    metric.prepare(model, tokenizer, ITEMS)
    with pytest.raises(ConfigError, match="the tokens of item"):
        metric.items(model, tokenizer, [{**ITEMS[0], "text": "the cat sat"}])
    model.resize_token_embeddings(100)
    with pytest.raises(ConfigError, match="the 96 tokens of the base model"):
        metric.items(model, tokenizer, ITEMS)


def test_kl_of_a_model_that_diverged(model, tokenizer) -> None:
    metric = metric_of("kl_to_base")
    metric.prepare(model, tokenizer, ITEMS)
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        metric.items(model, tokenizer, ITEMS)


def test_modes_are_restored(model, tokenizer) -> None:
    model.train()
    metric = metric_of("kl_to_base")
    metric.prepare(model, tokenizer, ITEMS)
    metric.items(model, tokenizer, ITEMS)
    with pytest.raises(ConfigError):
        metric.items(model, tokenizer, [{**ITEMS[0], "id": "another"}])
    assert all(module.training for module in model.modules())


# ---- the embedded model


@pytest.mark.real
def test_the_embedded_model_knows_what_is_likely(smollm2) -> None:
    model, tokenizer = smollm2
    questions = with_ids(
        [
            {
                "prompt": "What is the capital of France?",
                "choices": ["The capital of France is Paris.", "The capital of France is Rome."],
                "label": 0,
            },
            {"prompt": "How many legs does a cat have?", "choices": ["A cat has nine legs.", "A cat has four legs."], "label": 1},
        ]
    )
    assert set(measured(metric_of("choice_accuracy"), model, tokenizer, questions).values()) == {1.0}
    texts = with_ids(
        [{"text": "The sun rises in the east and sets in the west."}, {"text": "West sets the in sun the rises and the east in."}]
    )
    ordered, shuffled = measured(metric_of("perplexity"), model, tokenizer, texts).values()
    assert 1.0 < ordered < 4.0 < shuffled, "nat per token"
    kl = metric_of("kl_to_base")
    kl.prepare(model, tokenizer, texts)
    assert set(measured(kl, model, tokenizer, texts).values()) == {0.0}
