"""Cross-layer transcoders (Ameisen et al. 2025, Circuit Tracing), and crosscoders of the weakly causal kind (Gemma Scope 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.features.architectures.sparse_autoencoder import check_rows, needs_input
from steer.features.dictionary import ARCHITECTURES, Dictionary, Features, Parts, check_features, probe
from steer.features.encoder import Encoder, check_shape, chosen, wrong_width
from steer.features.parts import encoder_from, encoder_parts, encoder_settings, named
from steer.features.provenance import Origin
from steer.features.rows import Rows, check_finite


@ARCHITECTURES.register("cross_layer_transcoder")
class CrossLayerTranscoder(Dictionary):
    """Features that read one layer each and write several: the outputs of its own and of all later MLPs, say.

    Feature `feature(layer, number)` is a feature of one layer, counted through all layers. A decoder may be of low rank (`LowRank`).

    Args:
        encoders: one for each site that is read.
        decoders: [features of the layer, sites that it writes, width] each.
        targets: for each layer, the places in `origin.writes` of the sites that it writes.
        decoder_bias: [sites written, width].
        skip: [sites, d_out, d_in], from each site that is read to the written one of the same place; None for none.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        decoders: Sequence[Rows],
        targets: Sequence[Sequence[int]],
        decoder_bias: Tensor,
        origin: Origin,
        skip: Tensor | None = None,
    ) -> None:
        self.encoders, self.decoders, self.targets = list(encoders), list(decoders), [list(places) for places in targets]
        self.decoder_bias, self.origin, self.skip = decoder_bias, origin, skip
        self.d_in, self.d_out = self.encoders[0].rows.shape[-1], decoder_bias.shape[-1]
        self.starts = [0]
        for encoder in self.encoders:
            self.starts.append(self.starts[-1] + encoder.width)
        self.width = self.starts[-1]
        self._check()

    @property
    def activation_name(self) -> str:
        return self.encoders[0].activation.name

    def feature(self, layer: int, number: int) -> int:
        """Index of a feature of one layer, which is counted through `reads`. Raises ConfigError where there is none."""
        if not 0 <= layer < len(self.encoders) or not 0 <= number < self.encoders[layer].width:
            raise _no_feature(self, layer, number)
        return self.starts[layer] + number

    def layer_of(self, feature: int) -> tuple[int, int]:
        """(layer, number) of a feature. Raises ConfigError outside the dictionary."""
        index = int(chosen(feature, self.width)[0])
        layer = next(layer for layer, start in enumerate(self.starts[1:]) if index < start)
        return layer, index - self.starts[layer]

    def pre_activations(self, h: Tensor, features: Features | None = None) -> Tensor:
        return self._of_layers(h, None if features is None else chosen(features, self.width), Encoder.pre_activations)

    def _encode(self, h: Tensor, features: Tensor | None) -> Tensor:
        return self._of_layers(h, features, Encoder.encode)

    def _of_layers(self, h: Tensor, features: Tensor | None, compute: Callable[[Encoder, Tensor, Tensor | None], Tensor]) -> Tensor:
        """[..., chosen] put together from the layers, each of which sees its own activations."""
        check_stacked(self, h)
        if features is None:
            return torch.cat([compute(encoder, h[..., layer, :], None) for layer, encoder in enumerate(self.encoders)], -1)
        groups = list(self._by_layer(features))
        parts = [compute(self.encoders[layer], h[..., layer, :], numbers) for layer, _, numbers in groups]
        if not parts:
            return h.new_zeros(*h.shape[:-2], 0, dtype=torch.promote_types(h.dtype, torch.float32))
        order = torch.cat([places for _, places, _ in groups]).argsort().to(h.device)
        return torch.cat(parts, -1)[..., order]

    def decode(self, f: Tensor, h: Tensor | None = None) -> Tensor:
        check_features(f, self.width)
        out = self.decoder_bias.to(f.device, f.dtype).expand(*f.shape[:-1], *self.decoder_bias.shape)
        for layer, part in enumerate(f.split([encoder.width for encoder in self.encoders], -1)):
            out = out + self._written(layer, part, self.decoders[layer].all(f))
        if self.skip is None:
            return out
        if h is None:
            raise needs_input(self, "the skip connection reads them")
        return out + torch.einsum("...ld,lod->...lo", h.to(out.dtype), self.skip.to(out.device, out.dtype))

    def decode_selected(self, f: Tensor, features: Features, h: Tensor | None = None) -> Tensor:
        indices = chosen(features, self.width)
        check_features(f, len(indices))
        out = f.new_zeros(*f.shape[:-1], *self.decoder_bias.shape)
        for layer, places, numbers in self._by_layer(indices):
            out = out + self._written(layer, f[..., places.to(f.device)], self.decoders[layer].select(numbers, f))
        return out

    def _written(self, layer: int, f: Tensor, rows: Tensor) -> Tensor:
        """[..., sites, width] what features of one layer write; 0 at the sites that it does not write."""
        written = (f @ rows.flatten(1)).view(*f.shape[:-1], *rows.shape[1:])
        if self.targets[layer] == list(range(len(self.writes))):
            return written
        out = written.new_zeros(*f.shape[:-1], *self.decoder_bias.shape)
        return out.index_copy(-2, torch.tensor(self.targets[layer], device=f.device), written)

    def encoder_rows(self, features: Features) -> Tensor:
        indices = chosen(features, self.width)
        rows = torch.zeros(len(indices), self.d_in)
        for layer, places, numbers in self._by_layer(indices):
            rows[places] = self.encoders[layer].rows.select(numbers, probe())
        return rows

    def decoder_rows(self, features: Features) -> Tensor:
        """[chosen, sites written, d_out]"""
        indices = chosen(features, self.width)
        rows = torch.zeros(len(indices), len(self.writes), self.d_out)
        for layer, places, numbers in self._by_layer(indices):
            rows[places[:, None], torch.tensor(self.targets[layer])] = self.decoders[layer].select(numbers, probe())
        return rows

    def threshold(self, features: Features | None = None) -> Tensor | None:
        indices = torch.arange(self.width) if features is None else chosen(features, self.width)
        out = torch.zeros(len(indices))
        for layer, places, numbers in self._by_layer(indices):
            of_layer = self.encoders[layer].activation.threshold(probe().new_empty(len(numbers)), numbers)
            if of_layer is None:
                return None
            out[places] = of_layer
        return out

    def _by_layer(self, features: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(layer, places in the list, numbers within the layer) for each layer that has chosen features."""
        for layer, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            places = ((features >= start) & (features < end)).nonzero()[:, 0]
            if len(places):
                yield layer, places, features[places] - start

    def parts(self) -> dict[str, Rows | Tensor | None]:
        parts: dict[str, Rows | Tensor | None] = {"decoder_bias": self.decoder_bias, "skip": self.skip}
        for layer, (encoder, decoder) in enumerate(zip(self.encoders, self.decoders, strict=True)):
            parts.update({f"{layer}.{name}": part for name, part in {**encoder_parts(encoder), "decoder": decoder}.items()})
        return parts

    def settings(self) -> dict[str, Any]:
        return {"encoders": [encoder_settings(encoder) for encoder in self.encoders], "targets": self.targets}

    @classmethod
    def restore(cls, parts: Parts, settings: Mapping[str, Any], origin: Origin) -> Self:
        of_layers = [named(parts, f"{layer}.") for layer in range(len(settings["encoders"]))]
        encoders = [encoder_from(part, described) for part, described in zip(of_layers, settings["encoders"], strict=True)]
        decoders = [part["decoder"] for part in of_layers]
        return cls(encoders, decoders, settings["targets"], parts["decoder_bias"], origin, parts.get("skip"))

    def _check(self) -> None:
        """Raises ConfigError, WidthError for parts that do not fit together."""
        if not len(self.encoders) == len(self.decoders) == len(self.targets) == len(self.reads):
            raise _wrong_layers(self)
        check_shape("the bias of the decoders", self.decoder_bias, (len(self.writes), self.d_out))
        check_finite(self.decoder_bias, "the bias of the decoders")
        for encoder, decoder, places in zip(self.encoders, self.decoders, self.targets, strict=True):
            check_rows(self.name, encoder.rows, decoder)
            if decoder.shape[1:] != (len(places), self.d_out) or not all(0 <= place < len(self.writes) for place in places):
                raise _wrong_targets(self, decoder, places)
        if self.skip is not None:
            check_shape("the skip connection", self.skip, (len(self.reads), self.d_out, self.d_in))
            check_finite(self.skip, "the skip connection")


def check_stacked(dictionary: Dictionary, h: Tensor) -> None:
    """Raises WidthError unless activations are [..., sites, width] of the sites that a dictionary reads."""
    if h.dim() < 2 or h.shape[-2] != len(dictionary.reads):
        raise wrong_width((len(dictionary.reads), dictionary.d_in), h)


# ---- errors


def _wrong_layers(dictionary: CrossLayerTranscoder) -> ConfigError:
    counts = [len(part) for part in (dictionary.encoders, dictionary.decoders, dictionary.targets)]
    return ConfigError(
        "the layers of a cross-layer transcoder do not fit its sites",
        expected=f"{len(dictionary.reads)} encoders, decoders and lists of targets, one for each site that is read",
        found=counts,
        remedy="name one site for each layer",
    )


def _wrong_targets(dictionary: CrossLayerTranscoder, decoder: Rows, places: list[int]) -> ConfigError:
    return ConfigError(
        "a decoder of a cross-layer transcoder does not fit the sites that it writes",
        expected=f"[features, {len(places)}, {dictionary.d_out}], at places from 0 to {len(dictionary.writes) - 1}",
        found=f"{list(decoder.shape)} for the places {places}",
        remedy="check the order of its axes: features, sites, width",
    )


def _no_feature(dictionary: CrossLayerTranscoder, layer: int, number: int) -> ConfigError:
    sizes = [encoder.width for encoder in dictionary.encoders]
    return ConfigError(
        f"no feature {number} of layer {layer}",
        expected=f"a layer from 0 to {len(sizes) - 1}, and a number below {sizes[layer] if 0 <= layer < len(sizes) else sizes}",
        found=(layer, number),
        remedy="layers are counted through `dictionary.reads`",
    )
