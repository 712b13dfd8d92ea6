"""Counterfactual augmentation swaps what it says, and its fine-tune leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from tiny_tokenizer import tiny_tokenizer

from steer.bias import augmented, counterfactuals, fit_mitigation
from steer.bias.counterfactual import Swap
from steer.errors import ConfigError, ContrastError, NonFiniteError
from steer.experiment.treatments.data import TrainingData


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("The nurse lost her keys.", "The nurse lost his keys."),
        ("He saw her. She saw him!", "She saw him. He saw her!"),
        ("I told her that it rained", "I told him that it rained"),
        ("The keys are his, not hers.", "The keys are hers, not his."),
        ("a friend of his who left his house", "a friend of hers who left her house"),
        ("Her old father and her", "His old mother and him"),
        ("HIS KING, Mr. King and king", "HER QUEEN, Mrs. Queen and queen"),
        ("he's himself; she'll", "she's herself; he'll"),
        ("The policewomen met Boys", "The policemen met Girls"),
        ("He", "She"),
        ("history, shepherd, Chermany, the hero's", "history, shepherd, Chermany, the heroine's"),
    ],
)
def test_words_are_swapped_with_their_capitals(text: str, swapped: str) -> None:
    assert Swap()(text) == swapped
    assert Swap()(swapped) == text


def test_the_rule_for_her_is_wrong_where_it_says_so() -> None:
    assert Swap()("gave her books") == "gave his books"


def test_one_sided_replaces_and_two_sided_adds() -> None:
    rows = ["She sings.", "It rains.", "his dog"]
    assert augmented(rows) == ["She sings.", "He sings.", "It rains.", "his dog", "her dog"]
    assert augmented(rows, sided="one") == ["He sings.", "It rains.", "her dog"]
    assert counterfactuals(rows) == ["He sings.", "her dog"]


def test_rows_keep_what_is_no_text_and_serve_the_data_treatment_of_an_experiment() -> None:
    rows = [
        {"prompt": "Who is she?", "answer": "My brother's wife.", "style": "male"},
        {"prompt": "Rain?", "answer": "Yes.", "style": "male"},
    ]
    treatment = TrainingData(more=counterfactuals(rows))
    assert treatment.training_rows(rows) == [*rows, {"prompt": "Who is he?", "answer": "My sister's husband.", "style": "male"}]
    assert rows[0]["prompt"] == "Who is she?"


def test_other_words_can_be_swapped() -> None:
    assert augmented(["A Muslim met her."], sided="one", pairs=[("muslim", "christian")]) == ["A Christian met her."]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: augmented(["It rains."]), ContrastError, "changes nothing"),
        (lambda: counterfactuals([]), ContrastError, "changes nothing"),
        (lambda: augmented("She sings."), ConfigError, "rows of counterfactual"),
        (lambda: augmented(["she"], sided="both"), ConfigError, "sided"),
        (lambda: augmented([{"question": "she"}]), ConfigError, "row 0"),
        (lambda: augmented([3]), ConfigError, "row 0"),
        (lambda: augmented(["she"], pairs=[]), ConfigError, "no words"),
        (lambda: augmented(["she"], pairs=["he"]), ConfigError, "no pair of words"),
        (lambda: augmented(["she"], pairs=[("king", "old queen")]), ConfigError, "no pair of words"),
        (lambda: augmented(["she"], pairs=[("a", "b"), ("B", "c")]), ConfigError, "'b'"),
        (lambda: augmented(["she"], pairs=[("a", "A")]), ConfigError, "itself"),
    ],
)
def test_what_cannot_be_swapped_is_refused(call: Any, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        call()


# ---- the fine-tune

TEXTS = ["she is good and he is cold", "he can run", "the sun and the moon", "she will sing a song"]
SMALL = {"steps": 4, "batch_size": 2, "rank": 2, "learning_rate": 1e-2}


def fit(model: Any, texts: Any = TEXTS, **options: Any) -> Any:
    return fit_mitigation("cda", model, texts, tokenizer=tiny_tokenizer(), **{**SMALL, **options})


def state(model: Any) -> dict[str, Any]:
    return {name: (parameter.detach().clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}


def assert_as_before(model: Any, before: dict[str, Any], training: bool) -> None:
    now = state(model)
    assert now.keys() == before.keys() and model.training is training and not hasattr(model, "peft_config")
    assert all(torch.equal(now[name][0], before[name][0]) and now[name][1] == before[name][1] for name in now)


def test_a_fine_tune_learns_the_swapped_text_and_leaves_no_trace() -> None:
    model = FAMILIES["llama"]().train()
    model.get_input_embeddings().weight.requires_grad_(False)
    before, random_state = state(model), torch.get_rng_state()
    mitigation = fit(model, steps=30)
    assert_as_before(model, before, training=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    losses = mitigation.facts["training"]["loss"]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    ids = torch.tensor([tiny_tokenizer()("he will sing a song").input_ids])  # of which only the swapped form was there
    plain = model(input_ids=ids, labels=ids).loss
    with mitigation.acting(model) as tuned:
        assert tuned(input_ids=ids, labels=ids).loss < 0.8 * plain
        assert torch.equal(tuned(input_ids=ids).logits, model(input_ids=ids).logits)
    assert_as_before(model, before, training=True)


def test_the_same_fit_gives_the_same_adapter_and_another_seed_another() -> None:
    first, again, other = (fit(FAMILIES["llama"](), seed=seed) for seed in (0, 0, 1))
    assert first.adapter.keys() == other.adapter.keys()
    assert all(torch.equal(tensor, again.adapter[name]) for name, tensor in first.adapter.items())
    assert not all(torch.equal(tensor, other.adapter[name]) for name, tensor in first.adapter.items())


def test_an_interrupted_block_leaves_no_trace() -> None:
    model = FAMILIES["llama"]()
    before, mitigation = state(model), fit(model)
    with pytest.raises(KeyboardInterrupt), mitigation.acting(model):
        raise KeyboardInterrupt
    assert_as_before(model, before, training=False)
    with pytest.raises(NonFiniteError, match="diverged"):
        fit(model, learning_rate=1e30)
    assert_as_before(model, before, training=False)


def test_rows_alone_can_be_had_and_do_not_act() -> None:
    model = FAMILIES["llama"]()
    mitigation = fit(model, steps=0, sided="one")
    assert mitigation.rows == augmented(TEXTS, sided="one") and mitigation.plan is None
    assert mitigation.facts["swapped"] == 3 and mitigation.facts["rows"] == 4 and "one-sided, 3 of 4" in mitigation.describe()
    assert mitigation.facts["texts_sha256"] != fit(model, TEXTS[:2], steps=0).facts["texts_sha256"]
    with pytest.raises(ConfigError, match="not fine-tuned"), mitigation.acting(model):
        pass


def test_a_model_with_adapters_is_refused() -> None:
    model = get_peft_model(FAMILIES["llama"](), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="adapters already"):
        fit(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"steps": -1}, "steps"), ({"batch_size": 0}, "batch_size"), ({"rank": 0}, "rank"), ({"learning_rate": 0.0}, "learning_rate")],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fit(FAMILIES["llama"](), **options)


def test_no_texts_and_half_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="no texts"):
        fit(FAMILIES["llama"](), None)
    with pytest.raises(ConfigError, match="cannot be trained on"):
        fit(FAMILIES["llama"](), [{"prompt": "she"}])
