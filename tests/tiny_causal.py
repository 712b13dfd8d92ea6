"""Tiny models of every class in transformers' own table of causal language models, made by shrinking the sizes in its default config.

One rule for all: sizes are set by the names that transformers gives them, in nested configs too, and lists with one entry per layer are
cut so that every kind of layer stays. `SPECIAL` holds what a class needs beyond that, `UNBUILT` why one cannot be built.
"""

from __future__ import annotations

from typing import Any

import torch
from families import _spread
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, WIDTH, VOCAB = 3, 32, 96

_SIZES = {
    name: size
    for size, names in (
        (
            VOCAB,
            "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size pronunciation_vocab_size shape_vocab_size "
            "ngram_vocab_size_base",
        ),
        (
            WIDTH,
            "hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size word_embed_proj_dim input_embedding_size lru_width "
            "output_embedding_size backbone_hidden_size moe_intermediate_size prompt_mid_dim shared_expert_intermediate_size "
            "shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size shared_experts_intermediate_size "
            "router_hidden_size pronunciation_embed_dim shape_embed_dim ple_embed_dim",
        ),
        (
            64,
            "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size feed_forward_size d_inner dim_ff dff "
            "intermediate_size_mlp dense_intermediate_size attention_hidden_size",
        ),
        (
            LAYERS,
            "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers num_decoder_layers num_blocks "
            "num_layers_per_stack",
        ),
        (
            4,
            "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_encoder_attention_heads "
            "num_decoder_attention_heads attention_heads swa_num_attention_heads index_n_heads linear_num_value_heads linear_num_heads "
            "num_experts num_local_experts n_routed_experts moe_num_experts num_query_groups zero_expert_num",
        ),
        (
            2,
            "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok num_experts_per_token "
            "moe_k moe_topk top_k_experts num_global_key_value_heads",
        ),
        (1, "n_group topk_group num_expert_group num_codebooks"),
        (
            8,
            "head_dim swa_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
            "index_head_dim attention_head_dim attention_head_size dim_head d_head kv_channels mamba_headdim hidden_size_per_layer_input "
            "state_size ssm_state_size mamba_d_state mamba_chunk_size chunk_size time_step_rank mamba_dt_rank laurel_rank kv_lora_rank "
            "query_pre_attn_scalar q_lora_rank o_lora_rank adapter_rank gated_norm_rank hc_lowrank index_topk d_rel rel_extent "
            "global_head_dim sliding_window window_size rotary_dim mamba_d_head mamba_head_dim mamba_n_heads mamba_num_heads",
        ),
        (16, "qk_head_dim"),
        (128, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions original_max_position_embeddings"),
    )
    for name in names.split()
}
QWEN4 = {
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
}

SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 8}),
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), {"rope_type": "default", "rope_theta": 1e4}),
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 32}},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 64},
    "falcon_h1": {"mamba_d_ssm": 64},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "nemotron_h": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "hrm_text": {"num_hidden_layers": 24},  # 3 layers in each of 2 stacks, which run in cycles
    "rwkv": {"attention_hidden_size": WIDTH},
    "xlstm": {"embedding_dim": 128, "hidden_size": 128},  # it rounds sizes of heads up to multiples of 64
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "zamba": {"attention_head_dim": 16, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"attention_head_dim": 16, "layers_block_type": ["mamba", "hybrid", "mamba"]},
}
UNBUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm",
    "blt": "its patcher has sizes of its own that no default config reaches",
    "dots3_note": "heads differ by layer in its config, which the class reads as one number",
    "dots3_note_text": "likewise",
    "gemma4_assistant": "it attends to the cache of another model and does not run alone",
    "gemma4_unified_assistant": "likewise",
}


def model_types() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments that make a config of this class tiny."""
    given = {}
    layers = next((getattr(config, n) for n in ("num_hidden_layers",) if isinstance(getattr(config, n, None), int)), None)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            given[name] = type(value)(**shrunk(value)).to_dict()
        elif name == "num_key_value_heads" and value == getattr(config, "num_attention_heads", None):
            given[name] = 4
        elif name in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            given[name] = _SIZES[name]
        elif name.endswith("_token_id") and isinstance(value, int) and value >= 0:
            given[name] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}.get(name, 3)
        elif isinstance(value, (list, tuple)) and layers and len(value) == layers and not name.startswith("_"):
            given[name] = cut(list(value), LAYERS)
    return given


def cut(entries: list[Any], count: int) -> list[Any]:
    """The first entries, but with every kind among them."""
    kinds = list(dict.fromkeys(map(str, entries)))
    first = entries[:count]
    missing = [next(e for e in entries if str(e) == kind) for kind in kinds if kind not in map(str, first)]
    return (first[: count - len(missing)] + missing)[:count]


def config_of(model_type: str) -> PreTrainedConfig:
    """A tiny config, of the text model where the class is one of that alone."""
    cls, special = CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {})
    sizes = shrunk(cls())
    for name, value in special.items():
        sizes[name] = {**sizes[name], **value} if isinstance(sizes.get(name), dict) and isinstance(value, dict) else value
    config = cls(**sizes)
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING[cls].config_class
    return config if isinstance(config, wanted) else next((part for part in vars(config).values() if isinstance(part, wanted)), config)


def class_of(model_type: str) -> type[PreTrainedModel]:
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]


def build(model_type: str) -> PreTrainedModel:
    config = config_of(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = class_of(model_type)(config)
        _spread(model)
    return model.eval()
