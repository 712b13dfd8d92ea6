"""What the tests of directions share: moments of given vectors, and a model whose answers a known direction controls."""

from __future__ import annotations

from collections.abc import Collection

import torch
from families import FAMILIES
from torch import Tensor
from transformers import PreTrainedModel

from steer.directions import ContrastSet, Direction
from steer.directions.moments import ContrastMoments
from steer.model.site import Site
from steer.model.tokens import Row

SITE = "layers.1.output"
GOOD, BAD = 10, 11  # tokens that the direction makes likely and unlikely


def moments_of(x: Tensor, side: Tensor, paired: bool, needs: Collection[str]) -> ContrastMoments:
    """Moments of pooled activations. x: [texts, width]."""
    moments = ContrastMoments(side, paired, needs)
    moments.update(x[:, None], torch.ones(len(x), 1), torch.arange(len(x)))
    return moments


def controlled(strength: float = 1.0) -> tuple[PreTrainedModel, Direction]:
    """A tiny model and a direction at `SITE` that raises the logit of GOOD and lowers that of BAD."""
    model = FAMILIES["llama"]()
    generator = torch.Generator().manual_seed(7)
    v = torch.randn(32, generator=generator)
    v /= v.norm()
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[GOOD] += strength * v
        head[BAD] -= strength * v
        for block in model.model.layers:  # what is written at the site reaches the end
            block.self_attn.o_proj.weight.mul_(0.1)
            block.mlp.down_proj.weight.mul_(0.1)
        model.model.norm.weight.fill_(1.0)
    return model, Direction(Site.parse(SITE), v, "planted", "response", {"activation_norm": 2.0})


def pairs(count: int = 6, seed: int = 0) -> ContrastSet:
    """Pairs of different lengths whose answers are GOOD and BAD tokens, with one more token of the same kind in both."""
    generator = torch.Generator().manual_seed(seed)
    positive, negative = [], []
    for _ in range(count):
        prompt = torch.randint(20, 96, (int(torch.randint(2, 7, (), generator=generator)),), generator=generator).tolist()
        end = torch.randint(20, 96, (1,), generator=generator).tolist()
        positive.append(Row((*prompt, GOOD, GOOD, *end), len(prompt)))
        negative.append(Row((*prompt, BAD, BAD, *end), len(prompt)))
    return ContrastSet(tuple(positive), tuple(negative), paired=True)


def running_text(count: int = 4, seed: int = 100) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    return [Row(tuple(torch.randint(20, 96, (5 + i,), generator=generator).tolist()), 1) for i in range(count)]
