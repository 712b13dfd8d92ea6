"""Tiny random models, one per family of decoder: 3 blocks of width 32, vocabulary 96, built from configs, so that no test needs a download.

Every call gives a new model with the same weights. All dropouts are off and the model is in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 3, 32, 4, 2, 8, 96

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LENGTH = {"max_position_embeddings": 128}
_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    **_LENGTH,
    **_IDS,
}


def _family(prefix: str, config: dict[str, Any], seed: int = 0) -> Callable[..., PreTrainedModel]:
    def build(**sizes: int) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
            model = getattr(transformers, prefix + head)(_config(prefix, {**config, **sizes}))
            _spread(model)
        return model.eval()

    return build


def _config(prefix: str, config: dict[str, Any]) -> Any:
    name = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    return getattr(transformers, name)(**config)


def _spread(model: PreTrainedModel) -> None:
    """Initial norms are all ones, biases all zeros and matrices near zero: a test could mix them up and still pass. Make each count."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.2)
        parameter.data.add_(noise)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _family("Llama", _LLAMA_LIKE),
    # a window shorter than the tests' prompts, so that the sliding mask matters
    "mistral": _family("Mistral", {**_LLAMA_LIKE, "sliding_window": 4}),
    "qwen2": _family("Qwen2", _LLAMA_LIKE),
    "qwen3": _family("Qwen3", {**_LLAMA_LIKE, "head_dim": 16}),  # heads x head_dim = 64, not the width
    "gemma2": _family("Gemma2", {**_LLAMA_LIKE, "head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM, "sliding_window": 4}),
    "gemma3": _family(
        "Gemma3",
        {
            **_LLAMA_LIKE,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": _family("Phi3", _LLAMA_LIKE),
    "gpt2": _family(
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": 128,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            **_IDS,
        },
    ),
    "gpt_neox": _family(
        "GPTNeoX",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "use_parallel_residual": True,
            **_LENGTH,
            **_IDS,
        },
    ),
    "opt": _family(
        "OPT",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            **_LENGTH,
            **_IDS,
        },
    ),
    "falcon": _family(
        "Falcon",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "multi_query": True,
            "parallel_attn": True,
            "alibi": False,
            **_LENGTH,
            **_IDS,
        },
    ),
    "olmo2": _family("Olmo2", _LLAMA_LIKE),
    # every second block without rotary positions
    "smollm3": _family("SmolLM3", {**_LLAMA_LIKE, "no_rope_layers": [1, 0, 1]}),
    "mixtral": _family("Mixtral", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": _family(
        "Qwen3Moe",
        {**_LLAMA_LIKE, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
}
