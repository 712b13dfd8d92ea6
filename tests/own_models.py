"""Three small models written by hand, each with names and a call of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, WIDTH, LAYERS = 96, 32, 3


class Mixer(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.causal = causal

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (part.view(batch, tokens, 4, -1).transpose(1, 2) for part in self.c_attn(x).split(WIDTH, -1))
        mask = None if hidden is None else ~hidden[:, None, None]  # [batch, 1, 1, tokens]
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.c_proj(z.transpose(1, 2).reshape(x.shape))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


class PreNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.mix, self.ln_2, self.think = nn.LayerNorm(WIDTH), Mixer(causal=True), nn.LayerNorm(WIDTH), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.ln_1(x))
        return x + self.think(self.ln_2(x))


class TinyGPT(nn.Module):
    """As nanoGPT: `forward(idx, targets=None)` gives (logits, loss)."""

    def __init__(self) -> None:
        super().__init__()
        blocks = nn.ModuleList([PreNormBlock() for _ in range(LAYERS)])
        embeddings = {"wte": nn.Embedding(VOCAB, WIDTH), "wpe": nn.Embedding(64, WIDTH)}
        self.transformer = nn.ModuleDict({**embeddings, "h": blocks, "ln_f": nn.LayerNorm(WIDTH)})
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        parts = self.transformer
        x = parts["wte"](idx) + parts["wpe"](torch.arange(idx.shape[1], device=idx.device))
        for block in parts["h"]:  # type: ignore[attr-defined]
            x = block(x)
        logits = self.lm_head(parts["ln_f"](x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        return logits, loss


class PostNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.norm_a, self.ff, self.norm_b = Mixer(causal=False), nn.LayerNorm(WIDTH), mlp(), nn.LayerNorm(WIDTH)

    def forward(self, padding: Tensor, states: Tensor) -> Tensor:
        states = self.norm_a(states + self.attend(states, padding))
        return self.norm_b(states + self.ff(states))


class TinyEncoder(nn.Module):
    """Post-norm, as BERT; its mask is True on padding, and its blocks get the stream as their second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.randn(64, WIDTH))
        self.stack = nn.ModuleList([PostNormBlock() for _ in range(LAYERS)])
        self.tagger = nn.Linear(WIDTH, 5)

    def forward(self, words: Tensor, key_padding_mask: Tensor) -> Tensor:
        states = self.tok(words) + self.pos[: words.shape[1]]
        for block in self.stack:
            states = block(key_padding_mask, states)
        return self.tagger(states)


class TinyPolicy(nn.Module):
    """Numbers in and out, no token ids; its blocks stand in an nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.trunk = nn.Linear(7, WIDTH), nn.Sequential(*[PreNormBlock() for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.trunk(self.inp(frames)))


OWN = {"gpt": TinyGPT, "encoder": TinyEncoder, "policy": TinyPolicy}
BLOCKS = {"gpt": "transformer.h", "encoder": "stack", "policy": "trunk"}


def own_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return OWN[name]().eval()


def call_of(name: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Arguments of a call over two rows of 7 tokens, and [2, 7] which of these are real."""
    torch.manual_seed(1)
    real = torch.ones(2, 7, dtype=torch.bool)
    words = torch.randint(0, VOCAB, (2, 7))
    if name == "gpt":
        return (words,), real
    if name == "policy":
        return (torch.randn(2, 7, 7),), real
    real[1, 5:] = False
    return (words, ~real), real


def logits_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
