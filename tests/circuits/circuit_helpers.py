"""Random dictionaries of tiny models, for circuits of which the right numbers follow from the model alone."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.features import Encoder, InMemory, Origin, Untrained
from steer.features.activations.jumprelu import JumpReLU
from steer.features.activations.relu import ReLU
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.architectures.transcoder import Transcoder

WIDTH, FEATURES = 32, 12


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def autoencoder(site: str = "layers.1.output", seed: int = 1, untrained: Untrained | None = None, norm: str = "none") -> SparseAutoencoder:
    encoder = Encoder(InMemory(numbers(FEATURES, WIDTH, seed=seed)), 0.3 * numbers(FEATURES, seed=seed + 1), ReLU(), norm=norm)
    decoder = InMemory(0.2 * numbers(FEATURES, WIDTH, seed=seed + 2))
    origin = Origin((site,), (site,), untrained=untrained or Untrained())
    return SparseAutoencoder(encoder, decoder, 0.1 * numbers(WIDTH, seed=seed + 3), origin)


def transcoder(layer: int = 1, seed: int = 11, skip: bool = False) -> Transcoder:
    activation = JumpReLU(0.1 * numbers(FEATURES, seed=seed).abs())
    encoder = Encoder(InMemory(numbers(FEATURES, WIDTH, seed=seed + 1)), None, activation)
    decoder = InMemory(0.2 * numbers(FEATURES, WIDTH, seed=seed + 2))
    origin = Origin((f"layers.{layer}.mlp.input",), (f"layers.{layer}.mlp.output",))
    through = 0.1 * numbers(WIDTH, WIDTH, seed=seed + 4) if skip else None
    return Transcoder(encoder, decoder, 0.1 * numbers(WIDTH, seed=seed + 3), origin, through)


def every_node(*dictionaries: SparseAutoencoder, roles: int = 1) -> int:
    """More nodes than there are, of these dictionaries and the embedding."""
    return roles * (1 + sum(dictionary.width + 1 for dictionary in dictionaries))
