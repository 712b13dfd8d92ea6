"""Embeddings that share their weight with the head, and with more than the head, in the forms that families and PEFT have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hand import ids, vector
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import steer
from steer.errors import AnatomyError, DeployError
from steer.intervene import Ablate, Add, Intervention, Plan
from steer.model.tied import untie

SIZES = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **{"vocab_size": 96, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3},
}


def umt5() -> nn.Module:
    """Scales what its head takes, but only as long as its configuration calls it tied."""
    config = transformers.UMT5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, tie_word_embeddings=True)
    return transformers.UMT5ForConditionalGeneration(config).eval()


def bart() -> nn.Module:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SIZES)).eval()


@pytest.mark.parametrize("make", [umt5, bart])
def test_a_weight_that_an_encoder_has_too_is_not_untied(make):
    model = make()
    with torch.no_grad():
        plain = model(input_ids=ids(), decoder_input_ids=ids()).logits
        with pytest.raises(AnatomyError, match="encoder"):
            untie(model)
        assert torch.equal(model(input_ids=ids(), decoder_input_ids=ids()).logits, plain)
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_what_peft_puts_around_a_tied_head(options, tiny):
    model = get_peft_model(tiny("smollm3"), LoraConfig(r=2, init_lora_weights=False, **options)).eval()
    with torch.no_grad():
        plain = model(input_ids=ids()).logits
        assert untie(model)
        assert torch.equal(model(input_ids=ids()).logits, plain)
    head, embedding = model.get_base_model().lm_head, model.get_base_model().model.embed_tokens
    assert not {id(parameter) for parameter in head.parameters()} & {id(parameter) for parameter in embedding.parameters()}
    assert not untie(model)


@pytest.mark.filterwarnings("ignore")
def test_a_bake_of_a_weight_that_is_in_no_file_is_refused():
    """Marian makes its positions anew when it is loaded."""
    model = transformers.MarianMTModel(transformers.MarianConfig(**SIZES, max_position_embeddings=32)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = Plan(Intervention(Add(vector()), "embed"))
    with pytest.raises(DeployError, match="embed_positions"):
        steer.bake(plan, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with steer.bake(plan, model, savable=False) as baked:
        assert baked.changed == ["model.decoder.embed_positions.weight"]


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_model_that_takes_sound(tmp_path: Path):
    def whisper() -> nn.Module:
        torch.manual_seed(0)
        limits = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32}
        return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SIZES, **limits)).eval()

    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": ids()}
    model = whisper()
    plan = Plan(Intervention(Ablate(vector()), "layers.1.mlp.output"))
    with plan.attached(model), torch.no_grad():
        expected = model(**inputs).logits
    steer.to_adapter(plan, model, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(whisper(), tmp_path / "adapter")(**inputs).logits, expected)
