"""Models that the workloads run on, and one decoded token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

VOCABULARY = 128
PROMPT = 16  # tokens


def tiny_llama(layers: int, width: int, *, positions: int = 2048, attention: str = "sdpa") -> Any:
    """A random Llama in eval mode, whose blocks cost next to nothing."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def read_model(folder: str) -> Any:
    """The model of a folder in float32, read without `steer`, which the environments of other libraries lack."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_ids(model: Any, batch: int, tokens: int) -> Tensor:
    """[batch, tokens] token ids, the same in every process."""
    return torch.randint(5, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))


def decoded(model: Any, ids: Tensor, mask: Tensor | None = None) -> Iterator[dict[str, Any]]:
    """Runs the prompt, then gives the arguments of one decode step after the other, as `generate` passes them; the caller runs each.

    Args:
        ids: [batch, tokens] the prompt.
        mask: [batch, tokens] attention mask of a padded prompt; None, as in `generate`, when nothing is padded.
    """
    batch, length = ids.shape
    cache = DynamicCache(config=model.config)
    common: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    masked = {} if mask is None else {"attention_mask": mask}
    positions = torch.arange(length)[None].expand(batch, -1)
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
    model(input_ids=ids, position_ids=positions, **masked, **common)
    token, position = ids[:, -1:], positions[:, -1:]
    while True:
        position = position + 1
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(batch, 1)), 1)
            masked = {"attention_mask": mask}
        yield {"input_ids": token, "position_ids": position, **masked, **common}
