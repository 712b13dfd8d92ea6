"""Keys: the input of the down projection at the last token of the subject, whatever is batched, padded or wrapped around it."""

from __future__ import annotations

import peft
import pytest
import torch
from edits.edit_helpers import CONTEXTS, DENSE, FACTS, model_of, running_text
from tiny_tokenizer import tiny_tokenizer
from torch.nn.functional import cosine_similarity

from steer.edits import Contexts, Fact, FirstTokenSubjectWarning, already_said, edited_maps, fact_keys, locate, read_keys
from steer.errors import ConfigError, EditError, NonFiniteError
from steer.model.anatomy import Anatomy


def located(tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    return [text for fact in FACTS for text in CONTEXTS.locate(tokenizer, fact)]


def by_hand(model, module, text):
    """[f] of one whole text alone."""
    kept = []
    handle = module.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach().reshape(-1, args[0].shape[-1])))
    try:
        with torch.no_grad():
            model(torch.tensor([text.ids]))
    finally:
        handle.remove()
    return kept[0][text.last].float()


@pytest.mark.parametrize("family", DENSE)
def test_keys_of_a_batch_are_those_of_each_whole_text_alone(family):
    model = model_of(family)
    keys = read_keys(model, located(), [0, 1])
    for edited in edited_maps(Anatomy.find(model), [0, 1]):
        alone = torch.stack([by_hand(model, edited.module, text) for text in located()])
        torch.testing.assert_close(keys[edited.layer], alone, atol=1e-5, rtol=1e-5)


def test_the_padding_of_the_tokenizer_does_not_matter():
    left = tiny_tokenizer(padding_side="left")
    left.pad_token = left.eos_token
    model = model_of("llama")
    assert torch.equal(read_keys(model, located(left), [1])[1], read_keys(model, located(), [1])[1])


def test_the_size_of_batches_does_not_matter():
    model = model_of("gemma3")
    small, large = (read_keys(model, located(), [1], max_tokens=tokens)[1] for tokens in (8, 4096))
    torch.testing.assert_close(small, large, atol=1e-5, rtol=1e-5)


def test_nothing_behind_the_last_layer_and_the_subject_is_run():
    model = model_of("llama")
    read_keys(model, located()[:1], [0])  # the model is new: its parts are looked for
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    read_keys(model, located()[:1], [0])
    assert seen == [3]  # "the red cat" of a longer prompt, in the first block


def test_the_model_is_left_as_it_was_also_by_an_error():
    model = model_of("llama").train()
    read_keys(model, located(), [1])
    torch.nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, torch.nan)
    with pytest.raises(NonFiniteError):
        read_keys(model, located(), [1])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_under_an_adapter_the_key_is_what_the_base_layer_takes():
    """IA3 scales the neurons before the base layer sees them: what goes into PEFT's layer is another thing."""
    model = peft.get_peft_model(
        model_of("llama"), peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    ).eval()
    (edited,) = edited_maps(Anatomy.find(model), [1])
    outer = model.get_submodule(edited.path.removesuffix(".base_layer"))
    with torch.no_grad():
        for scale in outer.ia3_l.values():
            scale += torch.linspace(0, 1, scale.numel()).view_as(scale)
    text = located()[0]
    key = read_keys(model, [text], [1])[1][0]
    torch.testing.assert_close(key, by_hand(model, edited.module, text), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(key, by_hand(model, outer, text), atol=1e-2)


def test_an_adapter_that_is_trained_moves_keys_only_through_what_it_changes():
    model = peft.get_peft_model(model_of("llama"), peft.LoraConfig(target_modules=["down_proj"], r=2)).eval()
    before = read_keys(model, located(), [0, 1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and ".layers.0." in name:
                parameter += 0.5
    after = read_keys(model, located(), [0, 1])
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1], atol=1e-3)


def test_half_precision_gives_keys_in_single_precision():
    keys = read_keys(model_of("llama").to(torch.bfloat16), located(), [1])[1]
    assert keys.dtype == torch.float32 and keys.device.type == "cpu"


# ---- facts


def test_the_key_of_a_fact_is_the_weighted_mean_over_its_texts():
    model = model_of("llama")
    single = read_keys(model, located(), [1])[1].view(3, 4, 64)
    for weighting, expected in {
        "plain_half": single[:, 0] / 2 + single[:, 1:].mean(1) / 2,
        "mean": single.mean(1),
        "plain": single[:, 0],
    }.items():
        keys = fact_keys(model, tiny_tokenizer(), FACTS, CONTEXTS, [1], weighting)[1]
        torch.testing.assert_close(keys.combined, expected)
        assert keys.of.tolist() == [0, 1, 2]
    both = fact_keys(model, tiny_tokenizer(), FACTS, CONTEXTS, [0, 1], "both")[1]
    torch.testing.assert_close(both.combined, torch.stack([single[:, 0], single[:, 1:].mean(1)], 1).flatten(0, 1))
    assert both.of.tolist() == [0, 0, 1, 1, 2, 2] and torch.equal(both.plain, single[:, 0]) and both.outputs is None


def test_outputs_are_those_of_the_map_for_the_same_texts():
    model = model_of("opt")
    keys = fact_keys(model, tiny_tokenizer(), FACTS, CONTEXTS, [1], outputs=True)[1]
    (edited,) = edited_maps(Anatomy.find(model), [1])
    torch.testing.assert_close(keys.outputs, keys.combined @ edited.weight().T + edited.module.bias.detach(), atol=1e-5, rtol=1e-5)


def test_a_subject_at_the_start_is_read_behind_the_contexts_alone():
    model = model_of("llama")
    facts = [Fact("cat is", "cat", "big"), FACTS[0]]
    for weighting, of in {"plain_half": [0, 1], "plain": [0, 1], "both": [0, 1, 1]}.items():
        with pytest.warns(FirstTokenSubjectWarning):
            keys = fact_keys(model, tiny_tokenizer(), facts, CONTEXTS, [1], weighting)[1]
        torch.testing.assert_close(keys.combined[0], keys.prefixed[0])
        assert keys.of.tolist() == of
    with pytest.warns(FirstTokenSubjectWarning):
        keys = fact_keys(model, tiny_tokenizer(), facts, Contexts(()), [1])[1]
    assert torch.equal(keys.combined, keys.plain)


@pytest.mark.real
def test_two_subjects_at_the_start_do_not_share_a_key(smollm2):
    model, tokenizer = smollm2
    facts = [Fact.of("{} was founded in", subject, "Rome") for subject in ("Apple", "France")]
    with pytest.warns(FirstTokenSubjectWarning):
        keys = fact_keys(model, tokenizer, facts, Contexts(("The weather was fine", "I have heard of it")), [8])[8]
    assert cosine_similarity(*keys.plain, dim=0) > 0.99 and cosine_similarity(*keys.combined, dim=0) < 0.7


# ---- what is said already


def test_a_target_that_the_model_says_already_is_seen():
    model, tokenizer = model_of("llama"), tiny_tokenizer()
    facts = []
    for text in running_text(6, words=5):
        said = ""
        for _ in range(2):  # greedy, two tokens
            with torch.no_grad():
                logits = model(torch.tensor([tokenizer(f"{text}{said}").input_ids])).logits[0, -1]
            logits[:7] = -torch.inf  # of special tokens there is no text
            said += f" {tokenizer.decode(int(logits.argmax()))}"
        facts.append(Fact(text, text.split()[1], said))
    plain = [bool((_greedy(model, fact) == torch.tensor(tokenizer(fact.target).input_ids)).all()) for fact in facts]
    other = [fact.with_target(f"{fact.target.split()[0]} {'cat' if fact.target.split()[1] != 'cat' else 'dog'}") for fact in facts]
    assert already_said(model, tokenizer, facts, max_tokens=20) == plain and any(plain)
    assert not any(already_said(model, tokenizer, other))


def _greedy(model, fact):
    ids = tiny_tokenizer()(f"{fact.prompt} {fact.target}").input_ids
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -3:-1].argmax(-1)


def test_no_layer_and_no_text_are_refused():
    model = model_of("llama")
    with pytest.raises(EditError, match="not in this model"):
        read_keys(model, located(), [5])
    with pytest.raises(ConfigError, match="weighting"):
        fact_keys(model, tiny_tokenizer(), FACTS, CONTEXTS, [1], "half")
    assert locate(tiny_tokenizer(), "the cat", "cat").last == 1
