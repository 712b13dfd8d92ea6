"""Pairs of random prompts, and a llama written out with a mask on every edge, of which autograd gives the right scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from steer.circuits import ComponentGraph, Pairs
from steer.model.anatomy import Anatomy
from steer.model.tokens import Row

CLEAN = [[5, 9, 33, 17, 60, 2], [40, 3, 21, 88]]
CORRUPTED = [[5, 11, 33, 70, 60, 2], [41, 3, 22, 88]]


def rows(prompts: list[list[int]]) -> list[Row]:
    return [Row(tuple(ids), 0) for ids in prompts]


def pairs(model: PreTrainedModel, clean: list[list[int]] = CLEAN, corrupted: list[list[int]] = CORRUPTED) -> Pairs:
    return Pairs.of(model, rows(clean), rows(corrupted))


def target(logits: Tensor, prompt: int) -> Tensor:
    """Not linear in the logits, so that gradients differ from place to place."""
    return logits[-1].log_softmax(-1)[7 + prompt] - 0.5 * logits[-1].square().mean()


def close(a: Tensor, b: Tensor, tolerance: float = 2e-4) -> bool:
    """Equal to a part of the largest entry."""
    return bool((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max())


class WarmSoftmax(torch.autograd.Function):
    """Softmax with the derivative that it has, but for the factor, at temperature 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.softmax(-1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        warm = (ctx.saved_tensors[0] / 2).softmax(-1)
        return warm * (g - (g * warm).sum(-1, keepdim=True))


class PartOfGradient(torch.autograd.Function):
    """The same values with a part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: float) -> Tensor:
        ctx.part = part
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.part, None


class MaskedLlama:
    """A llama in which the reader v of every edge takes (1 - mask) of what the writer u gives now and mask of what it gave before.

    rule: `plain`, `gim` or `relp`, the derivatives of its norms, attention and products.
    """

    def __init__(self, model: PreTrainedModel, rule: str = "plain") -> None:
        self.model, self.body, self.rule = model, model.model, rule
        self.graph = ComponentGraph.of(Anatomy.find(model))

    def __call__(self, prompt: list[int], mask: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[tokens, vocabulary] logits and [writers, tokens, width] what is written. mask: [writers, readers], other: as written."""
        config, body, graph = self.model.config, self.body, self.graph
        ids = torch.tensor([prompt])
        written = [body.embed_tokens(ids)[0]]  # of [tokens, width]
        cos, sin = body.rotary_emb(written[0][None], torch.arange(len(prompt))[None])
        shape = (config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)

        def read(reader: int) -> Tensor:
            stack = torch.stack(written)
            m = mask[: len(stack), reader, None, None]
            return (stack if other is None else (1 - m) * stack + m * other[: len(stack)]).sum(0)

        for layer, block in enumerate(body.layers):
            places, parts = graph.readers_at(layer), {}
            for part in "qkv":
                weight = getattr(block.self_attn, f"{part}_proj").weight.unflatten(0, (-1, shape[2]))
                inputs = [self.norm(block.input_layernorm, read(reader)) for reader in range(places[part].start, places[part].stop)]
                parts[part] = torch.stack([x @ w.T for x, w in zip(inputs, weight, strict=True)])[None]  # [1, heads, tokens, head_dim]
            q, k = apply_rotary_pos_emb(parts["q"], parts["k"], cos, sin)
            if self.rule == "gim":
                q, k, parts["v"] = (PartOfGradient.apply(h, part) for h, part in ((q, 0.25), (k, 0.25), (parts["v"], 0.5)))
            k, v = (h.repeat_interleave(shape[0] // shape[1], 1) for h in (k, parts["v"]))
            scores = (q @ k.transpose(2, 3) / shape[2] ** 0.5)[0]
            late = torch.ones(len(prompt), len(prompt), dtype=torch.bool).triu(1)
            z = self.pattern(scores.masked_fill(late, -torch.inf)) @ v[0]  # [heads, tokens, head_dim]
            output = block.self_attn.o_proj.weight.T.unflatten(0, (shape[0], shape[2]))
            written += list(z @ output)
            written.append(self.mlp(block.mlp, self.norm(block.post_attention_layernorm, read(places["mlp"].start))))
        return self.model.lm_head(self.norm(body.norm, read(len(graph.readers) - 1))), torch.stack(written)

    def norm(self, module: torch.nn.Module, x: Tensor) -> Tensor:
        size = (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
        return module.weight * x / (size if self.rule == "plain" else size.detach())

    def pattern(self, scores: Tensor) -> Tensor:
        if self.rule == "gim":
            return WarmSoftmax.apply(scores)
        return scores.softmax(-1) if self.rule == "plain" else scores.softmax(-1).detach()

    def mlp(self, module: torch.nn.Module, x: Tensor) -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        if self.rule == "plain":
            return module.down_proj(torch.nn.functional.silu(gate) * up)
        # silu(gate) / gate is a constant of relp
        active = gate * gate.sigmoid().detach() if self.rule == "relp" else torch.nn.functional.silu(gate)
        return module.down_proj(PartOfGradient.apply(active, 0.5) * PartOfGradient.apply(up, 0.5))

    def gradient(self, prompt: list[int], other: list[int], number: int, at: float = 0.0) -> Tensor:
        """[writers, readers] of -target by the masks, which are all `at`."""
        shape = (len(self.graph.writers), len(self.graph.readers))
        with torch.no_grad():
            constants = self(other, torch.zeros(shape))[1]
        mask = torch.full(shape, at, requires_grad=True)
        return -torch.autograd.grad(target(self(prompt, mask, constants)[0], number), mask)[0]
