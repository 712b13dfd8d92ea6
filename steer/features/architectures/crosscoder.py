"""Crosscoders: one set of features for several layers, or for several models (Lindsey et al. 2024; arXiv 2504.02922)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.dictionary import ARCHITECTURES, Parts
from steer.features.encoder import Encoder
from steer.features.provenance import Origin
from steer.features.rows import Rows, Scaled


@ARCHITECTURES.register("crosscoder")
class Crosscoder(SparseAutoencoder):
    """Features that read several sites together, of one model or of several models, and write all of them.

    Args:
        encoder: of rows [features, sites, width]; its activations are [..., sites, width], and a feature reads the sum over the sites.
        decoder: [features, sites, width].
        decoder_bias: [sites, width].

    Raises:
        ConfigError: matrices, sites and models that do not go together.
    """

    def __init__(self, encoder: Encoder, decoder: Rows, decoder_bias: Tensor, origin: Origin) -> None:
        super().__init__(encoder, decoder, decoder_bias, origin)
        if len(encoder.rows.shape) != 3 or encoder.rows.shape[1] != len(origin.reads) or decoder.shape[1:-1] != (len(origin.writes),):
            raise _wrong_sites(encoder.rows, decoder, origin)
        if origin.models and len(origin.models) != len(origin.reads):
            raise _wrong_models(origin)

    def scaled(self, factor: float | Tensor) -> Self:
        """As for an autoencoder, with one factor for all sites, or [sites]."""
        per_site = torch.as_tensor(factor, dtype=torch.float64).reshape(-1, 1)  # [sites or 1, 1]
        encoder = self.encoder
        shift = None if encoder.shift is None else encoder.shift / per_site.to(encoder.shift.dtype)
        folded = Encoder(Scaled(encoder.rows, per_site), encoder.bias, encoder.activation, shift=shift, norm=encoder.norm)
        bias = self.decoder_bias / per_site.to(self.decoder_bias.dtype)
        return type(self)(folded, Scaled(self.decoder, 1 / per_site), bias, self.origin)

    @classmethod
    def restore(cls, parts: Parts, settings: Mapping[str, Any], origin: Origin) -> Self:
        whole = SparseAutoencoder.restore(parts, settings, origin)
        return cls(whole.encoder, whole.decoder, whole.decoder_bias, origin)


# ---- errors


def _wrong_sites(encoder: Rows, decoder: Rows, origin: Origin) -> ConfigError:
    return ConfigError(
        "the matrices of a crosscoder do not fit its sites",
        expected=f"[features, {len(origin.reads)}, width] and [features, {len(origin.writes)}, width]",
        found=f"{list(encoder.shape)} and {list(decoder.shape)}",
        remedy="name one site for each layer or model that it reads, in the order of the file",
    )


def _wrong_models(origin: Origin) -> ConfigError:
    return ConfigError(
        "a crosscoder between models needs the name of each",
        expected=f"{len(origin.reads)} names, one for each site that it reads",
        found=list(origin.models),
        remedy="name the models in the order in which their activations are stacked",
    )
