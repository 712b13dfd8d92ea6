"""Sparse autoencoders: one site, read and written (Cunningham et al. 2023, arXiv 2309.08600; Bricken et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.features.dictionary import ARCHITECTURES, Dictionary, Features, Parts, check_features, check_sites, probe
from steer.features.encoder import Encoder, Normalised, check_shape, chosen
from steer.features.parts import encoder_from, encoder_parts, encoder_settings
from steer.features.provenance import Origin
from steer.features.rows import InMemory, Rows, Scaled, check_finite
from steer.kernels import sparse_decode
from steer.kernels.dispatch import MIN_NUMEL, needs_pytorch_operations
from steer.kernels.sparse_decode import decode_pattern
from steer.kernels.sparse_pattern import SPARSE, SparsePattern


@ARCHITECTURES.register("sparse_autoencoder")
class SparseAutoencoder(Dictionary):
    """Features of one site, whose sum gives that site back: every activation, Matryoshka by its prefixes.

    Args:
        encoder: see there.
        decoder: [features, width].
        decoder_bias: [width].
        prefixes: widths at which a Matryoshka dictionary is one of its own (Bussmann et al. 2025, arXiv 2503.17547), the whole one last;
            empty for others.

    Raises:
        ConfigError: an encoder and a decoder of other numbers of features, several sites, or prefixes that do not grow to the width.
        WidthError, NonFiniteError: a bias of another shape, or with numbers that are not finite.
    """

    restores_norm = True  # the norm that was taken from the activations is given to the reconstruction

    def __init__(self, encoder: Encoder, decoder: Rows, decoder_bias: Tensor, origin: Origin, prefixes: Sequence[int] = ()) -> None:
        self.encoder, self.decoder, self.decoder_bias, self.origin = encoder, decoder, decoder_bias, origin
        self.width, self.d_in, self.d_out = encoder.width, encoder.rows.shape[-1], decoder.shape[-1]
        self.prefixes = tuple(prefixes)
        check_rows(self.name, encoder.rows, decoder)
        if len(encoder.rows.shape) == len(decoder.shape) == 2:
            check_sites(self.name, 1, 1, origin)
        check_shape("the bias of the decoder", decoder_bias, decoder.shape[1:])
        check_finite(decoder_bias, "the bias of the decoder")
        if self.prefixes and (sorted(set(self.prefixes)) != list(self.prefixes) or self.prefixes[0] < 1 or self.prefixes[-1] != self.width):
            raise _wrong_prefixes(self.prefixes, self.width)

    @property
    def activation_name(self) -> str:
        return self.encoder.activation.name

    def pre_activations(self, h: Tensor, features: Features | None = None) -> Tensor:
        return self.encoder.pre_activations(h, None if features is None else chosen(features, self.width))

    def _encode(self, h: Tensor, features: Tensor | None) -> Tensor:
        return self.encoder.encode(h, features)

    def decode(self, f: Tensor, h: Tensor | None = None) -> Tensor:
        check_features(f, self.width)
        return self._completed(_sum_of_rows(f, self.decoder.all(f).flatten(1)), h)

    def reconstruct(self, h: Tensor, *, positions: Tensor | None = None) -> Tensor:
        top = self.encoder.top(h)
        if top is None:
            return super().reconstruct(h, positions=positions)
        values = self._on_trained(top.values, h, positions)
        return self._completed(sparse_decode(values, top.indices, self.decoder.all(values).flatten(1)), h)

    def _completed(self, out: Tensor, h: Tensor | None) -> Tensor:
        """The reconstruction, from the sum of the rows of the decoder, [..., sites times width]. h: as in `decode`."""
        normalised = self._normalised(h)
        out = out.view(*out.shape[:-1], *self.decoder.shape[1:]) + self.decoder_bias.to(out.device, out.dtype)
        out = out if normalised.scale is None else out * normalised.scale
        return out if normalised.offset is None else out + normalised.offset

    def decode_selected(self, f: Tensor, features: Features, h: Tensor | None = None) -> Tensor:
        scale = self._normalised(h).scale
        indices = chosen(features, self.width)
        check_features(f, len(indices))
        rows = self.decoder.select(indices, f)
        out = (f @ rows.flatten(1)).view(*f.shape[:-1], *self.decoder.shape[1:])
        return out if scale is None else out * scale

    def encoder_rows(self, features: Features) -> Tensor:
        return self.encoder.rows.select(chosen(features, self.width), probe())

    def decoder_rows(self, features: Features) -> Tensor:
        return self.decoder.select(chosen(features, self.width), probe())

    def threshold(self, features: Features | None = None) -> Tensor | None:
        indices = None if features is None else chosen(features, self.width)
        return self.encoder.activation.threshold(probe().new_empty(self.width if indices is None else len(indices)), indices)

    def prefix(self, number: int) -> Self:
        """The Matryoshka dictionary of the first `prefixes[number]` features. Raises ConfigError where there is no such prefix."""
        if not -len(self.prefixes) <= number < len(self.prefixes):
            raise _no_prefix(self, number)
        width = self.prefixes[number]
        like, encoder = probe(), self.encoder
        bias = None if encoder.bias is None else encoder.bias[:width]
        tensors = {name: tensor if len(tensor) == 1 else tensor[:width] for name, tensor in encoder.activation.tensors.items()}
        activation = encoder.activation.restore(tensors, encoder.activation.settings)
        smaller = Encoder(InMemory(encoder.rows.all(like)[:width]), bias, activation, shift=encoder.shift, norm=encoder.norm)
        prefixes = [size for size in self.prefixes if size <= width]
        return type(self)(smaller, InMemory(self.decoder.all(like)[:width]), self.decoder_bias, self.origin, prefixes)

    def scaled(self, factor: float) -> Self:
        """The same for activations that were multiplied by a factor in training: it is folded in, so that raw ones are taken.

        Features keep their values; the encoder gets the factor, a number above 0, the decoder, its bias and the shift lose it.
        """
        encoder = self.encoder
        shift = None if encoder.shift is None else encoder.shift / factor
        folded = Encoder(Scaled(encoder.rows, factor), encoder.bias, encoder.activation, shift=shift, norm=encoder.norm)
        return type(self)(folded, Scaled(self.decoder, 1 / factor), self.decoder_bias / factor, self.origin, self.prefixes)

    def parts(self) -> dict[str, Rows | Tensor | None]:
        return {**encoder_parts(self.encoder), "decoder": self.decoder, "decoder_bias": self.decoder_bias}

    def settings(self) -> dict[str, Any]:
        return {"encoder": encoder_settings(self.encoder), "prefixes": list(self.prefixes)}

    @classmethod
    def restore(cls, parts: Parts, settings: Mapping[str, Any], origin: Origin) -> Self:
        encoder = encoder_from(parts, settings["encoder"])
        return cls(encoder, parts["decoder"], parts["decoder_bias"], origin, settings["prefixes"])

    def _normalised(self, h: Tensor | None) -> Normalised:
        if self.encoder.norm == "none" or not self.restores_norm:
            return Normalised(self.decoder_bias)  # the activations have no part in it
        if h is None:
            raise needs_input(self, f"the norm '{self.encoder.norm}' of each token is put back")
        return self.encoder.normalised(h)


def _sum_of_rows(f: Tensor, rows: Tensor) -> Tensor:
    """f @ rows; where f is mostly 0, and nobody wants its gradient, which 0 has too, of the features that are on alone."""
    wants_gradient = torch.is_grad_enabled() and (f.requires_grad or rows.requires_grad)
    if f.numel() >= MIN_NUMEL and not wants_gradient and not torch.compiler.is_compiling() and not needs_pytorch_operations(f):
        pattern, values = SparsePattern.of_dense(f.reshape(-1, f.shape[-1]))
        if len(pattern) * SPARSE < f.numel():
            return decode_pattern(values, rows, pattern).view(*f.shape[:-1], rows.shape[1])
    return f @ rows


def check_rows(name: str, encoder: Rows, decoder: Rows) -> None:
    """Raises ConfigError for an encoder and a decoder of different numbers of features."""
    if encoder.shape[0] != decoder.shape[0]:
        raise ConfigError(
            f"encoder and decoder of the {name} have different numbers of features",
            expected=f"{encoder.shape[0]} rows, as the encoder {list(encoder.shape)} has",
            found=list(decoder.shape),
            remedy="pass both as [features, width]; a decoder of torch.nn.Linear is the other way round",
        )


# ---- errors


def needs_input(dictionary: Dictionary, why: str) -> ConfigError:
    """The error of a decoder that was not given the activations."""
    return ConfigError(
        f"this {dictionary.name} cannot decode features alone",
        expected="the activations that were encoded: decode(f, h)",
        found=f"no activations, and {why}",
        remedy="pass h, or use reconstruct(h)",
    )


def _wrong_prefixes(prefixes: Sequence[int], width: int) -> ConfigError:
    return ConfigError(
        "the prefixes of a Matryoshka dictionary do not fit",
        expected=f"growing numbers of features, the last of which is {width}",
        found=list(prefixes),
        remedy="pass the cumulated sizes of its groups",
    )


def _no_prefix(dictionary: SparseAutoencoder, number: int) -> ConfigError:
    return ConfigError(
        f"the dictionary has no prefix {number}",
        expected=f"0 to {len(dictionary.prefixes) - 1}" if dictionary.prefixes else "a Matryoshka dictionary",
        found=f"prefixes {list(dictionary.prefixes)}",
        remedy="choose one of these" if dictionary.prefixes else "use the whole dictionary",
    )
