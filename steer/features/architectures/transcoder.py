"""Transcoders: what a part of the model writes, predicted from what it reads (Dunefsky et al. 2024, arXiv 2406.11944)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from steer.errors import ConfigError
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder, needs_input
from steer.features.dictionary import ARCHITECTURES, Parts
from steer.features.encoder import Encoder, check_shape
from steer.features.parts import encoder_from
from steer.features.provenance import Origin
from steer.features.rows import Rows, Scaled, check_finite


@ARCHITECTURES.register("transcoder")
class Transcoder(SparseAutoencoder):
    """Features of one site whose sum gives another one, mostly the output of an MLP from its input, with a skip connection or without.

    A skip connection is a linear map around the features (Paulo et al. 2025, arXiv 2501.18823).

    Args:
        skip: [d_out, d_in] or None.
    """

    restores_norm = False

    def __init__(self, encoder: Encoder, decoder: Rows, decoder_bias: Tensor, origin: Origin, skip: Tensor | None = None) -> None:
        super().__init__(encoder, decoder, decoder_bias, origin)
        self.skip = skip
        if skip is not None:
            check_shape("the skip connection", skip, (self.d_out, self.d_in))
            check_finite(skip, "the skip connection")

    def _completed(self, out: Tensor, h: Tensor | None) -> Tensor:
        out = super()._completed(out, None)
        if self.skip is None:
            return out
        if h is None:
            raise needs_input(self, "the skip connection reads them")
        return out + h.to(out.dtype) @ self.skip.to(out.device, out.dtype).mT

    def scaled(self, factor: float, factor_out: float | None = None) -> Self:
        """As for an autoencoder, with a factor of its own for what is written; the same one when None."""
        out = factor if factor_out is None else factor_out
        encoder = self.encoder
        shift = None if encoder.shift is None else encoder.shift / factor
        folded = Encoder(Scaled(encoder.rows, factor), encoder.bias, encoder.activation, shift=shift, norm=encoder.norm)
        skip = None if self.skip is None else self.skip * (factor / out)
        return type(self)(folded, Scaled(self.decoder, 1 / out), self.decoder_bias / out, self.origin, skip)

    def with_gain(self, gain: Tensor) -> Self:
        """The same for activations that were multiplied by the gain of a norm, [d_in], which those of its training were not.

        Raises:
            ConfigError: a gain with zeros, or numbers that are not finite. WidthError: of another width.
        """
        check_shape("the gain of the norm", gain, (self.d_in,))
        if not bool((gain.isfinite() & (gain != 0)).all()):
            raise _no_gain(gain)
        encoder = self.encoder
        shift = None if encoder.shift is None else encoder.shift * gain
        folded = Encoder(Scaled(encoder.rows, 1 / gain.double()), encoder.bias, encoder.activation, shift=shift, norm=encoder.norm)
        skip = None if self.skip is None else self.skip / gain.to(self.skip.dtype)
        return type(self)(folded, self.decoder, self.decoder_bias, self.origin, skip)

    def parts(self) -> dict[str, Rows | Tensor | None]:
        return {**super().parts(), "skip": self.skip}

    def settings(self) -> dict[str, Any]:
        return {"encoder": super().settings()["encoder"]}

    @classmethod
    def restore(cls, parts: Parts, settings: Mapping[str, Any], origin: Origin) -> Self:
        return cls(encoder_from(parts, settings["encoder"]), parts["decoder"], parts["decoder_bias"], origin, parts.get("skip"))


# ---- errors


def _no_gain(gain: Tensor) -> ConfigError:
    wrong = gain[~gain.isfinite() | (gain == 0)]
    return ConfigError(
        "the gain of the norm cannot be taken out",
        expected="finite numbers other than 0",
        found=f"{len(wrong)} of {len(gain)} are not, such as {wrong[0].item():g}",
        remedy="pass the weight of the norm in front of the MLP, in Gemma 1 + weight",
    )
