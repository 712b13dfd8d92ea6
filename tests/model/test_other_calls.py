"""Calls of models of transformers that say something else of their tokens than most: codebooks, frames, positions that do not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hand import edited, vector
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    DecisionTransformerConfig,
    DecisionTransformerModel,
    GPT2Config,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

import steer
from steer.errors import ContextError, SiteError
from steer.intervene import Add, Intervention, Plan
from steer.model.anatomy import Anatomy

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**SMALL, "image_size": 16, "patch_size": 4}
WORDS = torch.randint(3, 90, (2, 4), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def last_of(batch: int, tokens: int) -> Tensor:
    return torch.arange(tokens).expand(batch, tokens) == tokens - 1


def agrees(model: Any, inputs: dict[str, Tensor], block: nn.Module, scope: str, tokens: Tensor, site: str = "layers.0.output") -> bool:
    """The plan does what a hook written by hand does."""
    with torch.no_grad():
        with edited(block, lambda h: h + tokens.unsqueeze(-1) * vector()):
            expected = model(**inputs)[0]
        with Plan(Intervention(Add(vector()), site, scope)).attached(model) as attachment:
            steered = model(**inputs)[0]
    assert sum(attachment.fired().values()) == int(tokens.sum())
    return torch.allclose(steered, expected, atol=1e-5)


def built(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return cls(config).eval()


def test_a_row_of_each_codebook_is_no_row_of_the_stream():
    sizes = {"ffn_dim": 64, "num_codebooks": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1}
    model = built(
        MusicgenForCausalLM, MusicgenDecoderConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **sizes)
    )
    inputs = {"input_ids": torch.randint(3, 90, (4, 6))}
    for scope, tokens in (("all", torch.ones(2, 6).bool()), ("last", last_of(2, 6))):
        assert agrees(model, inputs, model.model.decoder.layers[0], scope, tokens)
    with (
        pytest.raises(ContextError, match="needs token ids"),
        Plan(Intervention(Add(vector()), "layers.0.output", "tokens[5]")).attached(model),
    ):
        model(**inputs)


def test_positions_that_are_all_the_same_do_not_cut_a_row_into_texts():
    config = DecisionTransformerConfig(state_dim=5, act_dim=3, hidden_size=32, n_layer=2, n_head=4, n_inner=64, n_positions=64)
    model = built(DecisionTransformerModel, config)
    names = {"states": 5, "actions": 3, "rewards": 1, "returns_to_go": 1}
    inputs = {name: torch.randn(2, 4, size) for name, size in names.items()} | {
        "timesteps": torch.arange(4).expand(2, 4),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
    }
    block = model.encoder.h[1]
    assert agrees(model, inputs, block, "last", last_of(2, 12), site="layers.1.output")
    first = torch.arange(12) == torch.tensor([[0], [3]])
    assert agrees(model, inputs, block, "positions[0]", first, site="layers.1.output")


def test_a_mask_of_frames_is_not_one_of_what_a_convolution_makes_of_them():
    sides = {
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
    }
    sizes = {"input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64, "decoder_start_token_id": 1}
    model = built(Speech2TextForConditionalGeneration, Speech2TextConfig(vocab_size=96, d_model=32, **sides, **sizes))
    inputs = {"input_features": torch.randn(2, 24, 8), "decoder_input_ids": WORDS}
    assert agrees(model, inputs, model.model.encoder.layers[0], "last", last_of(2, 6), site="encoder.layers.0.output")
    inputs["attention_mask"] = torch.ones(2, 24, dtype=torch.long)
    with pytest.raises(ContextError, match="not that of this forward pass"):
        agrees(model, inputs, model.model.encoder.layers[0], "last", last_of(2, 6), site="encoder.layers.0.output")


def test_captions_of_an_image():
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**VISION), GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)
    )
    model = built(VisionEncoderDecoderModel, config)
    inputs = {"pixel_values": PIXELS, "decoder_input_ids": WORDS}
    assert agrees(model, inputs, model.decoder.transformer.h[0], f"tokens[{int(WORDS[0, 1])}]", WORDS == WORDS[0, 1])
    assert agrees(model, inputs, model.encoder.layers[0], "last", last_of(2, 17), site="encoder.layers.0.output")


def test_token_ids_of_a_decoder_that_an_outer_module_with_encoder_arguments_embeds():
    opt = {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64, **TEXT}
    opt.pop("intermediate_size")
    qformer = {**TEXT, "encoder_hidden_size": 32}
    config = Blip2Config(vision_config=VISION, qformer_config=qformer, text_config=opt, num_query_tokens=4, image_token_index=95)
    model = built(Blip2ForConditionalGeneration, config)
    words = torch.cat([torch.full((2, 4), 95), WORDS], 1)
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words), "pixel_values": PIXELS}
    block = model.language_model.model.decoder.layers[0]
    assert agrees(model, inputs, block, "image", words == 95)
    assert agrees(model, inputs, block, f"tokens[{int(WORDS[0, 1])}]", words == WORDS[0, 1])


def test_an_example_shows_where_the_rows_of_a_video_are():
    model = built(VideoMAEForVideoClassification, VideoMAEConfig(**VISION, num_frames=4))
    frames = torch.randn(2, 4, 3, 16, 16)
    blocks = model.videomae.encoder.layer
    steer.describe(model, "videomae.encoder.layer", example={"pixel_values": frames})
    assert agrees(model, {"pixel_values": frames}, blocks[0], "last", last_of(2, 32))


def test_a_vision_tower_that_packs_all_images_says_what_works():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2}
    ids = {"image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
    text = {**TEXT, "num_key_value_heads": 2, "rope_parameters": rope}
    model = built(Qwen2VLForConditionalGeneration, Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    with pytest.raises(SiteError, match="'vision' of this Qwen2VLForConditionalGeneration could not be seen"):
        Anatomy.find(model).point("vision.layers.0.output")
    words = torch.cat([torch.full((2, 4), 95), WORDS], 1)
    inputs = {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "pixel_values": torch.randn(32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (words == 95).int(),
    }
    tower = model.model.visual.blocks
    with torch.no_grad():
        with edited(tower[0], lambda h: h + vector()):
            expected = model(**inputs).logits
        with Plan(Intervention(Add(vector()), "module:visual.blocks.0:output")).attached(model):
            assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)
