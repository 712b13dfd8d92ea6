"""Dictionaries: activations of a model written as a sparse sum of features (sparse autoencoders, transcoders, crosscoders).

What is common to all architectures stands here. An architecture is one file in `steer.features.architectures`; which pre-activations become
features is an activation of its own, in `steer.features.activations`, so that each activation goes with each architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from steer.checks import tensor_of
from steer.errors import ConfigError, WidthError
from steer.features.encoder import check_shape, chosen
from steer.features.provenance import Origin, Source, Untrained
from steer.features.rows import Rows, check_finite
from steer.intervene.operator import Operator
from steer.intervene.source import OperatorSource
from steer.model.site import Site
from steer.registry import Registry

Features = Tensor | list[int] | int  # indices of chosen features
Parts = Mapping[str, Any]  # Rows, tensors or None by name


class _PerFeature:
    """A statistic of every feature, [width] finite numbers or None. Setting another one raises WidthError, NonFiniteError, ConfigError."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, dictionary: Any, owner: type) -> Tensor | None:
        return None if dictionary is None else dictionary.__dict__.get(self.name)

    def __set__(self, dictionary: Dictionary, value: Tensor | None) -> None:
        if value is not None:
            value = tensor_of(value, f"`{self.name}` of a dictionary", "pass one number for each feature").detach().float()
            check_shape(f"`{self.name}` of a dictionary", value, (dictionary.width,))
            check_finite(value, f"`{self.name}` of a dictionary")
        dictionary.__dict__[self.name] = value


class Dictionary(OperatorSource):
    """Encodes activations as features and decodes features to activations; all of them, or a few at the cost of a few.

    A dictionary of one site takes activations h: [..., d_in] of that site. One that reads several sites takes [..., sites, d_in], one row
    for each of `reads`, in their order; one that writes several gives [..., sites, d_out] likewise. Features are counted through all
    layers.
    Everything is computed at least in fp32, and differentiable in the activations.

    Attributes:
        name: of the architecture.
        origin: sites, source, and the tokens that it was not trained on.
        width: number of features. d_in, d_out: size of the activations that it reads and writes.
        maxima: [width] fp32, the largest value that each feature was seen with; None where nobody recorded it. `save` keeps it.
        density: [width] fp32, the share of tokens on which each feature was on; likewise.

    Example:
        >>> h = torch.randn(2, 7, dictionary.d_in)  # [batch, tokens, d_in]
        >>> features = dictionary.encode(h)  # [batch, tokens, width]
        >>> dictionary.decode(features).shape == h.shape
        True
        >>> dictionary.encode_selected(h, [3, 40]).shape
        torch.Size([2, 7, 2])
    """

    name: ClassVar[str]
    short_names = {"clamp": "clamp_features", "ablate": "ablate_features", "keep_only": "keep_only_features", "add": "add_decoder"}
    origin: Origin
    width: int
    d_in: int
    d_out: int
    maxima = _PerFeature()
    density = _PerFeature()

    # ---- what an architecture says

    def pre_activations(self, h: Tensor, features: Features | None = None) -> Tensor:
        """[..., chosen] what the activation function makes features of; all when None. Raises WidthError, ConfigError."""
        raise NotImplementedError

    def _encode(self, h: Tensor, features: Tensor | None) -> Tensor:
        """[..., chosen] features of all tokens."""
        raise NotImplementedError

    def decode(self, f: Tensor, h: Tensor | None = None) -> Tensor:
        """[..., d_out] the reconstruction of activations, or [..., sites, d_out].

        Args:
            f: [..., width] features.
            h: [..., d_in] the activations that were encoded; needed with a norm at run time, or a skip connection.

        Raises:
            ConfigError: h is needed. WidthError: f of another width.
        """
        raise NotImplementedError

    def decode_selected(self, f: Tensor, features: Features, h: Tensor | None = None) -> Tensor:
        """The sum of f_j W_j over chosen features, f: [..., chosen]: what they add to the reconstruction, without its bias.

        Adding this for the change of a few features to the true activation is the clamp that keeps the error of the dictionary.
        """
        raise NotImplementedError

    def encoder_rows(self, features: Features) -> Tensor:
        """[chosen, ...] fp32 rows that chosen features are read by, without those of the others."""
        raise NotImplementedError

    def decoder_rows(self, features: Features) -> Tensor:
        """[chosen, ...] fp32 rows that chosen features write."""
        raise NotImplementedError

    def threshold(self, features: Features | None = None) -> Tensor | None:
        """[chosen] fp32, what a pre-activation must exceed for its feature to be on; None for top-k, where that depends on the others."""
        raise NotImplementedError

    def parts(self) -> dict[str, Rows | Tensor | None]:
        """Its numbers by name, for a file: rows [features, ...], tensors of any shape, and None for what it does without."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What else a file has to hold, JSON-able."""
        raise NotImplementedError

    @classmethod
    def restore(cls, parts: Parts, settings: Mapping[str, Any], origin: Origin) -> Self:
        """Rebuilds it from its file form."""
        raise NotImplementedError

    # ---- what follows

    def encode(self, h: Tensor, *, positions: Tensor | None = None) -> Tensor:
        """[..., width] features, 0 at tokens that the dictionary was not trained on.

        Args:
            positions: [...] place of each token in its text; without them, tokens are left out by their norm alone.

        Raises:
            WidthError: activations of another width.
        """
        return self._on_trained(self._encode(h, None), h, positions)

    def encode_selected(self, h: Tensor, features: Features, *, positions: Tensor | None = None) -> Tensor:
        """[..., chosen] as `encode(h)[..., features]`, without the others where the activation is elementwise. positions: see `encode`."""
        return self._on_trained(self._encode(h, chosen(features, self.width)), h, positions)

    def reconstruct(self, h: Tensor, *, positions: Tensor | None = None) -> Tensor:
        """[..., d_out] decode(encode(h)); positions: see `encode`."""
        return self.decode(self.encode(h, positions=positions), h)

    def error(self, h: Tensor, target: Tensor | None = None, *, positions: Tensor | None = None) -> Tensor:
        """[..., d_out] what the reconstruction lacks, target - reconstruct(h).

        Args:
            target: [..., d_out] what is to be reconstructed; None for h itself, which an autoencoder alone allows.
            positions: see `encode`.

        Raises:
            ConfigError: no target for a dictionary that writes other sites than it reads.
        """
        if target is None and self.origin.reads != self.origin.writes:
            raise _no_target(self)
        return (h if target is None else target) - self.reconstruct(h, positions=positions)

    def operator(self, kind: type[Operator], words: Mapping[str, Any]) -> Operator:
        """`feature` is one index, `features` a list; the other words are arguments of the operator."""
        named = [word for word in ("feature", "features") if word in words]
        if len(named) != 1:
            raise TypeError(f"either feature=5 or features=[5, 7] is needed, not {' and '.join(named) or 'neither'}")
        make: Any = kind
        made: Operator = make(self, words[named[0]], **{word: value for word, value in words.items() if word not in named})
        return made

    def text_site(self) -> Site | None:
        return self.writes[0] if len(self.writes) == 1 else None

    @property
    def reads(self) -> tuple[Site, ...]:
        return self.origin.reads

    @property
    def writes(self) -> tuple[Site, ...]:
        return self.origin.writes

    @property
    def source(self) -> Source:
        return self.origin.source

    @property
    def untrained(self) -> Untrained:
        return self.origin.untrained

    def save(self, path: str | Path, *, dtype: str = "float32", format: str = "steer") -> Path:
        """Writes it in a format that can be written (`steer`, `saelens`). dtype: `float32`, `bfloat16` or `int8` (per row)."""
        from steer.features.format import writer_of

        return writer_of(format)(self, path, dtype)

    def __repr__(self) -> str:
        where = ", ".join(map(str, self.reads[:3])) + (", ..." if len(self.reads) > 3 else "")
        to = "" if self.reads == self.writes else f" -> {', '.join(map(str, self.writes[:3]))}" + (", ..." if len(self.writes) > 3 else "")
        return f"{type(self).__name__}({self.width} features, {self.activation_name}, at {where}{to})"

    @property
    def activation_name(self) -> str:
        """The name of its activation, e.g. `jumprelu`."""
        raise NotImplementedError

    def _on_trained(self, f: Tensor, h: Tensor, positions: Tensor | None) -> Tensor:
        if positions is not None:
            positions = _checked_positions(positions, h.shape[: -1 if len(self.reads) == 1 else -2])
            positions = positions if len(self.reads) == 1 else positions.unsqueeze(-1)
        inside = self.untrained.trained_on(h, positions)
        if inside is None:
            return f
        return f * (inside if len(self.reads) == 1 else inside.all(-1)).unsqueeze(-1)


ARCHITECTURES: Registry[type[Dictionary]] = Registry(
    "dictionary", "steer.features.architectures", "steer.dictionaries", subclass_of=Dictionary
)


def probe(dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty tensor that says in which dtype, and that on the CPU, rows are wanted."""
    return torch.empty(0, dtype=dtype)


def check_sites(name: str, reads: int, writes: int, origin: Origin) -> None:
    """Raises ConfigError for an origin with other numbers of sites, or of models, than a dictionary reads and writes."""
    if (len(origin.reads), len(origin.writes)) != (reads, writes):
        raise _wrong_sites(name, reads, writes, origin)
    if origin.models and len(origin.models) != reads:
        raise _wrong_models(name, reads, origin)


def check_features(f: Tensor, count: int) -> None:
    """Raises WidthError unless there is a number for each of so many features, [..., count]."""
    if f.dim() == 0 or f.shape[-1] != count:
        raise _wrong_features(f, count)


def _checked_positions(positions: Tensor, tokens: torch.Size) -> Tensor:
    """Positions that go with [...] tokens. Raises ConfigError, WidthError."""
    positions = tensor_of(positions, "`positions`", "pass the place of each token in its text")
    if positions.dim() > len(tokens) or any(
        size not in (1, there) for size, there in zip(positions.shape[::-1], tokens[::-1], strict=False)
    ):
        raise _wrong_positions(positions, tokens)
    return positions


# ---- errors


def _wrong_sites(name: str, reads: int, writes: int, origin: Origin) -> ConfigError:
    return ConfigError(
        f"the matrices of a {name} do not fit its sites",
        expected=f"{reads} to read and {writes} to write",
        found=f"{', '.join(map(str, origin.reads))} and {', '.join(map(str, origin.writes))}",
        remedy="name as many sites as the file is of, in its order",
    )


def _wrong_models(name: str, reads: int, origin: Origin) -> ConfigError:
    return ConfigError(
        f"the models of a {name} do not fit its sites",
        expected=f"{reads} names, one for each site that it reads",
        found=list(origin.models),
        remedy="name the models in the order in which their activations are stacked",
    )


def _wrong_features(f: Tensor, count: int) -> WidthError:
    expected, remedy = f"[..., {count}]", "pass one number for each feature, in their order"
    return WidthError("the features do not fit the dictionary", expected=expected, found=list(f.shape), remedy=remedy)


def _wrong_positions(positions: Tensor, tokens: torch.Size) -> WidthError:
    remedy = "pass the place of each token in its text, counted from 0"
    return WidthError("`positions` do not fit the tokens", expected=list(tokens), found=list(positions.shape), remedy=remedy)


def _no_target(dictionary: Dictionary) -> ConfigError:
    return ConfigError(
        "the error of this dictionary needs what it should have reconstructed",
        expected=f"target=, activations of {', '.join(map(str, dictionary.writes))}",
        found=f"a {dictionary.name} that reads {', '.join(map(str, dictionary.reads))}",
        remedy="capture both sites in one pass: dictionary.error(h, target)",
    )
