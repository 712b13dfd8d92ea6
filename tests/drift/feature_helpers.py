"""Dictionaries of tiny models for the tests of tracked features."""

from __future__ import annotations

from typing import Any

import torch
from drift.drift_helpers import SITE, WIDTH
from torch import Tensor, nn

from steer.features import Encoder, InMemory, Origin, Untrained
from steer.features.activation import Activation
from steer.features.activations.relu import ReLU
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.model.tokens import Row

FEATURES, CHOSEN = 40, [5, 33, 8]
DENSITY = torch.full((FEATURES,), 0.1)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dictionary(activation: Activation | None = None, *, width: int = WIDTH, site: str = SITE, **untrained: Any) -> SparseAutoencoder:
    """Decoder rows of one length, so that all features are like all others."""
    rows = nn.functional.normalize(numbers(FEATURES, width, seed=8), dim=1)
    encoder = Encoder(InMemory(numbers(FEATURES, width, seed=5)), numbers(FEATURES, seed=6) - 1, activation or ReLU())
    return SparseAutoencoder(encoder, InMemory(rows), numbers(width, seed=9), Origin((site,), (site,), untrained=Untrained(**untrained)))


def states(model: nn.Module, ids: Tensor, mask: Tensor | None = None, layer: int = 2) -> Tensor:
    """[batch, tokens, width] at SITE, read without any hook."""
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer]


def features_of(model: nn.Module, rows: list[Row], own: SparseAutoencoder, first: int = 0) -> list[Tensor]:
    """Of each text, [tokens, features] by the definition, without the first tokens."""
    return [own.encode(states(model, torch.tensor([row.ids]))[0])[first:].double() for row in rows]
