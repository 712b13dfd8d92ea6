"""Dictionaries of tiny models and what a clamp is by definition: the whole dictionary in the place of the activation, its error added."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steer.features import Encoder, InMemory, Origin, Untrained
from steer.features.activation import Activation
from steer.features.activations.abstopk import AbsTopK
from steer.features.activations.batchtopk import BatchTopK
from steer.features.activations.gated import Gated
from steer.features.activations.groupmax import GroupMax
from steer.features.activations.jumprelu import JumpReLU
from steer.features.activations.relu import ReLU
from steer.features.activations.topk import TopK
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder

SITE, FEATURES, CHOSEN = "layers.1.output", 40, [5, 33, 8]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ACTIVATIONS: dict[str, Callable[[], Activation]] = {
    "relu": ReLU,
    "jumprelu": lambda: JumpReLU(numbers(FEATURES, seed=1).abs()),
    "batchtopk": lambda: BatchTopK(0.7, 4),
    "gated": lambda: Gated(numbers(FEATURES, seed=2), numbers(FEATURES, seed=3), 0.3 * numbers(FEATURES, seed=4)),
    "topk": lambda: TopK(12),
    "abstopk": lambda: AbsTopK(12),
    "groupmax": lambda: GroupMax(10),
}


def autoencoder(
    activation: str = "jumprelu",
    *,
    width: int = 32,
    norm: str = "none",
    untrained: Untrained | None = None,
    site: str = SITE,
    spread: float = 1.0,
) -> SparseAutoencoder:
    """Rows of a length at which about half of the features of a tiny model are on."""
    encoder = Encoder(
        InMemory(spread * numbers(FEATURES, width, seed=5)),
        numbers(FEATURES, seed=6),
        ACTIVATIONS[activation](),
        shift=numbers(width, seed=7),
        norm=norm,
    )
    origin = Origin((site,), (site,), untrained=untrained or Untrained())
    return SparseAutoencoder(encoder, InMemory(numbers(FEATURES, width, seed=8)), numbers(width, seed=9), origin)


def spliced(dictionary: SparseAutoencoder, edit: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """decode(edit(encode(h))) + (h - decode(encode(h))), in fp64 and with every gradient."""
    wide = h.double()
    f = dictionary.encoder.encode(wide)
    return (dictionary.decode(edit(f), wide) + (wide - dictionary.decode(f, wide))).to(h.dtype)


def with_chosen(f: Tensor, new: Callable[[Tensor], Tensor]) -> Tensor:
    """Features of which the chosen ones are other ones."""
    return torch.cat([new(f[..., [j]]) if j in CHOSEN else f[..., [j]] for j in range(f.shape[-1])], -1)
