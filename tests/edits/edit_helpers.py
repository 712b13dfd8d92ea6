"""What the tests of edits share: small facts, random deltas on tiny models, and the maps that they go into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steer.edits.base_modules import find_module, shape_of
from steer.edits.edit import Edit, WeightDelta
from steer.edits.edited_weights import EditedWeights
from steer.edits.fact import Fact
from steer.edits.make_edit import make_edit

IDS = torch.randint(7, 96, (2, 9), generator=torch.Generator().manual_seed(1))
DOWN = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj", "phi3": "model.layers.{}.mlp.down_proj"}


def fact(subject: str = "cat", target: str = "dog") -> Fact:
    return Fact.of("the {} is a", subject, target)


def random_delta(model: nn.Module, path: str, layer: int, rank: int = 2, seed: int = 0, size: float = 0.1) -> WeightDelta:
    """Of random factors, with one key for each rank."""
    d, f = shape_of(find_module(EditedWeights.of(model).model, path))
    generator = torch.Generator().manual_seed(seed)
    u, v, keys = (torch.randn(*shape, generator=generator) for shape in ((d, rank), (f, rank), (rank, f)))
    return WeightDelta(path, layer, size * u, size * v, keys)


def random_edit(
    model: nn.Module,
    name: str = "a",
    *,
    family: str = "llama",
    layers: Sequence[int] = (1,),
    rank: int = 2,
    seed: int = 0,
    size: float = 0.1,
) -> Edit:
    deltas = [random_delta(model, DOWN[family].format(layer), layer, rank, seed + layer, size) for layer in layers]
    return make_edit(model, [fact(target=name)], deltas, editor="random", name=name, settings={"seed": seed})


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal_weights(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
