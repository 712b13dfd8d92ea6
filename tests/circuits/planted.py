"""A tiny llama in which one path alone leads to the logits, each of its edges through channels of its own."""

from __future__ import annotations

import torch
from families import FAMILIES
from torch import nn

EDGES = ["input->a0.g0<v>", "a0.h1->m1", "m1->logits"]


def planted() -> nn.Module:
    """Without norms. The head attends to all tokens alike, so that their order does not matter."""
    model = FAMILIES["llama"]()
    inner = model.model
    inner.norm = nn.Identity()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        inner.embed_tokens.weight[:, :16] = 0  # the input writes the channels 16 to 31
        inner.embed_tokens.weight[:, 16:] = torch.randn(96, 16, generator=generator)
        for layer in inner.layers:
            layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight[:24] = 0  # what else is written goes to the channels 24 to 31, which nothing on the path reads any more
        first = inner.layers[0].self_attn
        for projection in (first.q_proj, first.k_proj, first.v_proj, first.o_proj):
            projection.weight.zero_()
        first.v_proj.weight[:8, 16:] = torch.randn(8, 16, generator=generator)
        first.o_proj.weight[:8, 8:16] = torch.eye(8)  # head 1 writes the channels 0 to 7
        mlp = inner.layers[1].mlp
        mlp.gate_proj.weight[:, 8:] = 0
        mlp.up_proj.weight[:, 8:] = 0
        mlp.down_proj.weight.zero_()
        mlp.down_proj.weight[8:16] = torch.randn(8, 64, generator=generator)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, 8:16] = torch.randn(96, 8, generator=generator)
    return model
