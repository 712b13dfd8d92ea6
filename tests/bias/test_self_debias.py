"""Self-debiasing is the paper's formula at every token: in passes over whole texts, and in `generate` with padding, a cache and beams."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

import steer
from steer.bias import fit_mitigation
from steer.bias.mitigation.self_debias import SelfDebiasProcessor
from steer.errors import ConfigError, ContextError

PREFIX = "bad rude hate"
TEXTS = ["the cat sat on", "she is", "water fire earth sun moon star day", "he was not good and"]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    """The second has learned positions, which padding must not move."""
    model = FAMILIES[request.param]()
    with torch.no_grad():  # a random model is close to uniform, where no difference of probabilities matters
        model.get_output_embeddings().weight.mul_(4)
    return model


def fit(model: Any, tokenizer: Any = None, **options: Any) -> Any:
    return fit_mitigation("self_debias", model, tokenizer=tokenizer or tiny_tokenizer(), **{"prefix": PREFIX, **options})


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text).input_ids


def by_hand(model: Any, ids: list[int], *, decay: float = 50.0, epsilon: float = 0.01, prefix: str = PREFIX, start: int = 0) -> Tensor:
    """[vocabulary] log p' of the next token, from two passes over one text; the prefix comes behind `start` tokens."""
    behind = [*ids[:start], *ids_of(prefix), *ids[start:]]
    with torch.no_grad():
        p, q = (model(torch.tensor([tokens])).logits[0, -1].double().softmax(-1) for tokens in (ids, behind))
    factor = torch.tensor([1.0 if d >= 0 else max(epsilon, math.exp(decay * d)) for d in (p - q).tolist()]).double()
    return (factor * p / (factor * p).sum()).log()


def padded(side: str) -> Any:
    return tiny_tokenizer(side)(TEXTS, padding=True, return_tensors="pt")


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_of_a_padded_batch_are_those_of_its_texts_alone(side: str, model: Any) -> None:
    batch = padded(side)
    places = (batch.attention_mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), fit(model).acting(model) as acting:
        logits = acting(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=places, use_cache=False).logits
    for row, text in enumerate(TEXTS):
        ids = ids_of(text)
        of_text = logits[row][batch.attention_mask[row].bool()].log_softmax(-1)
        for end in (1, len(ids)):
            assert torch.allclose(of_text[end - 1].double(), by_hand(model, ids[:end]), atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prefix_that_all_rows_begin_with_is_read_once(side: str, model: Any) -> None:
    """The first batch shows that it gives the same; where rows begin with padding, and with a plan, batches run whole."""
    batch, prefix = padded(side), "bad rude hate bad rude hate"
    places = (batch.attention_mask.cumsum(1) - 1).clamp_min(0)
    seen: list[torch.Size] = []
    embed = model.get_input_embeddings()
    forward = embed.forward
    embed.forward = lambda ids: seen.append(ids.shape) or forward(ids)
    with torch.no_grad(), fit(model, prefix=prefix).acting(model) as acting:

        def run() -> Tensor:
            seen.clear()
            return acting(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=places, use_cache=False).logits

        first, second = run(), run()
        rows, length = batch.input_ids.shape
        assert [tuple(shape) for shape in seen] == [
            (rows, length),
            *([(1, 6), (rows, length)] if side == "right" else [(rows, length + 6)]),
        ]
    del embed.forward
    assert torch.allclose(first, second, atol=1e-4)
    for row, text in enumerate(TEXTS):
        ids = ids_of(text)
        of_text = second[row][batch.attention_mask[row].bool()].log_softmax(-1)
        assert torch.allclose(of_text[len(ids) - 1].double(), by_hand(model, ids, prefix=prefix), atol=1e-4)


def test_the_bias_of_the_prefix_is_taken_back_and_the_model_is_as_it_was(model: Any) -> None:
    ids = torch.tensor([ids_of(TEXTS[0])])
    with torch.no_grad():
        before = model(ids).logits
        with fit(model).acting(model):
            after = model(ids, use_cache=False, logits_to_keep=1).logits
        p, q = before[0, -1].softmax(-1), model(torch.tensor([ids_of(PREFIX) + ids[0].tolist()])).logits[0, -1].softmax(-1)
        assert torch.equal(model(ids).logits, before)
    change = after[0, 0] - before[0, -1]
    likelier = q > p + 1e-3
    assert after.shape[1] == 1 and likelier.any() and bool((change[likelier] < -0.04).all()) and bool((change[q < p].abs() < 1e-5).all())
    assert float(change.min()) >= math.log(0.01) - 1e-5


def test_a_decay_of_0_changes_nothing(model: Any) -> None:
    ids = torch.tensor([ids_of(TEXTS[2])])
    with torch.no_grad(), fit(model, decay=0.0).acting(model):
        inside = model(ids).logits
    assert torch.equal(inside, model(ids).logits)


def greedy_by_hand(model: Any, text: str, tokens: int, **options: Any) -> list[int]:
    ids = ids_of(text)
    for _ in range(tokens):
        ids.append(int(by_hand(model, ids, **options).argmax()))
    return ids[-tokens:]


def test_greedy_generation_of_a_padded_batch_is_that_of_each_prompt_by_hand(model: Any) -> None:
    batch = padded("left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(**batch, logits_processor=[fit(model).logits_processor(batch.attention_mask)], **options)
    plain = model.generate(**batch, **options)
    for row, text in enumerate(TEXTS):
        assert made[row, -6:].tolist() == greedy_by_hand(model, text, 6)
    assert not torch.equal(made, plain)


class WithoutCache(SelfDebiasProcessor):
    def _parents(self, ids: Tensor) -> Tensor | None:
        return None


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_beams_and_samples_are_the_same_with_a_cache_and_without(options: dict[str, Any], model: Any) -> None:
    batch, mitigation = padded("left"), fit(model)
    made = []
    for processor in (SelfDebiasProcessor(mitigation, batch.attention_mask), WithoutCache(mitigation, batch.attention_mask)):
        torch.manual_seed(0)
        made.append(model.generate(**batch, logits_processor=[processor], max_new_tokens=7, pad_token_id=0, **options))
    assert torch.equal(*made)
    torch.manual_seed(0)
    assert made[0].tolist() != model.generate(**batch, max_new_tokens=7, pad_token_id=0, **options).tolist()


def test_beams_leave_their_row_and_the_cache_follows(model: Any) -> None:
    """Otherwise the test above would say nothing of the reordering."""
    batch, moved = padded("left"), []

    class Watched(SelfDebiasProcessor):
        def _parents(self, ids: Tensor) -> Tensor | None:
            parents = super()._parents(ids)
            moved.append(parents is not None and parents.tolist() != list(range(len(ids))))
            return parents

    model.generate(**batch, logits_processor=[Watched(fit(model), batch.attention_mask)], max_new_tokens=7, num_beams=3, pad_token_id=0)
    assert any(moved)


def test_one_processor_serves_one_call_after_another(model: Any) -> None:
    ids = torch.tensor([ids_of(TEXTS[0])])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    processor = fit(model).logits_processor()
    first = model.generate(ids, logits_processor=[processor], **options)
    assert torch.equal(model.generate(ids, logits_processor=[processor], **options), first)
    longer = model.generate(first, logits_processor=[processor], **options)
    assert longer[0, -4:].tolist() == greedy_by_hand(model, tiny_tokenizer().decode(first[0]), 4)


def test_the_prefix_comes_behind_the_start_token(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    ids = tokenizer(TEXTS[0]).input_ids
    assert ids[0] == 1
    with torch.no_grad(), fit(model, tokenizer).acting(model):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1).double()
        cut = model(torch.tensor([ids[1:]]), use_cache=False).logits[0, -1].log_softmax(-1).double()
    for end in (1, 2, len(ids)):
        assert torch.allclose(logits[end - 1], by_hand(model, ids[:end], start=1), atol=1e-4)
    assert torch.allclose(cut, by_hand(model, ids[1:]), atol=1e-4), "a text without a start token has the prefix in front"


def test_a_plan_that_is_attached_acts_behind_the_prefix_too() -> None:
    model = FAMILIES["llama"]()
    plan = steer.Plan(steer.Intervention(steer.Add(torch.randn(32, generator=torch.Generator().manual_seed(0)) * 3), "layers.1.output"))
    batch, options = padded("left"), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with plan.attached(model):
        made = model.generate(**batch, logits_processor=[fit(model).logits_processor(batch.attention_mask)], **options)
        expected = [greedy_by_hand(model, text, 5) for text in TEXTS]
    assert made[:, -5:].tolist() == expected


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"labels": torch.tensor([[8, 9]])}, "labels"),
        ({"attention_mask": torch.ones(1, 1, 2, 2)}, "attention mask"),
        ({"attention_mask": torch.tensor([[1, 0, 1]]), "input_ids": torch.tensor([[8, 9, 8]])}, "inside a text"),
        ({"logits_to_keep": torch.tensor([0])}, "chosen tokens"),
        ({"return_dict": False}, "without logits"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 32)}, "embeddings"),
    ],
)
def test_passes_that_cannot_be_rescaled_are_refused(call: dict[str, Any], said: str) -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(ContextError, match=said), torch.no_grad(), fit(model).acting(model):
        model(**{"input_ids": torch.tensor([[8, 9]]), "use_cache": False, **call})
    assert not model._forward_hooks


def test_generate_inside_acting_is_refused_with_the_remedy() -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(ContextError, match="logits_processor"), fit(model).acting(model):
        model.generate(torch.tensor([[8, 9]]), max_new_tokens=2, pad_token_id=0)


def test_acting_without_a_pass_warns() -> None:
    model = FAMILIES["llama"]()
    with pytest.warns(UserWarning, match="no pass"), fit(model).acting(model):
        pass


def test_batches_that_a_processor_was_not_made_for_are_refused() -> None:
    model = FAMILIES["llama"]()
    mitigation, batch = fit(model), padded("left")
    with pytest.raises(ContextError, match="right"):
        mitigation.logits_processor(padded("right").attention_mask)
    with pytest.raises(ContextError, match="padding"):
        mitigation.logits_processor()(batch.input_ids, torch.zeros(4, 96))
    processor = mitigation.logits_processor(batch.attention_mask)
    for ids in (batch.input_ids[:3], batch.input_ids[:, :3], batch.input_ids.flip(0)):
        with pytest.raises(ContextError, match="another batch"):
            processor(ids, torch.zeros(len(ids), 96))


@pytest.mark.parametrize(
    "options",
    [{"prefix": ""}, {"prefix": " \n"}, {"prefix": None}, {"decay": -1.0}, {"decay": math.inf}, {"epsilon": 1.5}, {"epsilon": None}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="self_debias"):
        fit(FAMILIES["llama"](), **options)


def test_texts_and_models_with_an_encoder_are_refused() -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(ConfigError, match="no texts"):
        fit_mitigation("self_debias", model, [("he", "she")], tokenizer=tiny_tokenizer())
    model.config.is_encoder_decoder = True
    with pytest.raises(ConfigError, match="encoder"):
        fit(model)


def test_it_says_what_it_is() -> None:
    mitigation = fit(FAMILIES["llama"]())
    assert mitigation.plan is None and PREFIX in mitigation.describe()
    assert mitigation.facts["prefix"] == PREFIX and len(mitigation.facts["prefix_sha256"]) == 64
