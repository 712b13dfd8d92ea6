"""A dictionary of a tiny model whose features are known: each is on at one word alone, wherever it stands."""

from __future__ import annotations

import torch
from tiny_tokenizer import SPECIAL, WORDS
from torch import Tensor, nn

from steer.features import Encoder, InMemory, Origin, Untrained
from steer.features.activations.jumprelu import JumpReLU
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder

SITE = "layers.0.input"  # the token embeddings


def token(word: str) -> int:
    return len(SPECIAL) + WORDS.index(word)


def word_dictionary(
    model: nn.Module, words: list[str], *, untrained: Untrained | None = None, decoder: Tensor | None = None
) -> SparseAutoencoder:
    """Feature j has the value 1 at word j and is off at every other token."""
    embedding: Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator, union-attr]
    # a row for each word that is 1 at its own embedding and small at all others, by ridge regression
    targets = torch.eye(len(embedding))[[token(word) for word in words]]
    covariance = embedding.T @ embedding + 0.1 * torch.eye(embedding.shape[1])
    rows = targets @ embedding @ torch.linalg.inv(covariance)
    values = rows @ embedding.T  # [words, vocabulary]
    own = values[range(len(words)), [token(word) for word in words]]
    rows, values = rows / own[:, None], values / own[:, None]
    values[range(len(words)), [token(word) for word in words]] = 0
    threshold = values.amax(1).clamp_min(0) * 0.5 + 0.5
    assert (values.amax(1) < 0.99).all(), "another word looks the same"
    encoder = Encoder(InMemory(rows), torch.zeros(len(words)), JumpReLU(threshold))
    decoder = embedding[[token(word) for word in words]].clone() if decoder is None else decoder
    return SparseAutoencoder(
        encoder, InMemory(decoder), torch.zeros(embedding.shape[1]), Origin((SITE,), (SITE,), untrained=untrained or Untrained())
    )


def sentences(count: int, seed: int = 0, length: int = 12) -> list[str]:
    """Random words."""
    random = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=random).tolist()) for _ in range(count)]
