"""The encoder of a dictionary: activations of a model in, features out, all of them or a few."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from steer.checks import one_of
from steer.errors import ConfigError, WidthError
from steer.features.activation import Activation
from steer.features.rows import Rows, check_finite
from steer.kernels import TopFeatures, topk_encode

TILE = 2**24  # pre-activations at a time, where a few features need those of all


class Normalised(NamedTuple):
    """Activations as an encoder takes them, and how its reconstruction is brought back: times `scale`, plus `offset`."""

    x: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None


def _layer_norm(h: Tensor) -> Normalised:
    """To mean 0 and length about 1 per entry; the small number is added to the deviation, which is the unbiased one."""
    mean = h.mean(-1, keepdim=True)
    deviation = (h - mean).std(-1, keepdim=True)
    return Normalised((h - mean) / (deviation + 1e-5), deviation, mean)


def _constant_norm(h: Tensor) -> Normalised:
    """To the length sqrt(width)."""
    scale = h.norm(dim=-1, keepdim=True) / h.shape[-1] ** 0.5
    return Normalised(h / scale, scale)


def _centred(h: Tensor) -> Normalised:
    """To mean 0: what a model with centred writing weights has in its residual stream, where the plain model has h."""
    mean = h.mean(-1, keepdim=True)
    return Normalised(h - mean, None, mean)


NORMS: dict[str, Callable[[Tensor], Normalised]] = {
    "none": Normalised,
    "layer_norm": _layer_norm,
    "constant_norm": _constant_norm,
    "centred": _centred,
}


class Encoder:
    """activation(W (norm(h) - shift) + bias) of activations h: [..., width], or [..., sites, width].

    Attributes:
        rows: [features, width], or [features, sites, width] for several sites that are read together.
        bias: [features] or None. shift: [width] or [sites, width], as one token of h, or None.
        norm: a name of `NORMS`, applied to each token at run time.

    Example:
        >>> from steer.features.activations.relu import ReLU
        >>> encoder = steer.features.Encoder(steer.features.InMemory(torch.randn(64, 36)), torch.zeros(64), ReLU())
        >>> encoder.encode(torch.randn(2, 7, 36)).shape
        torch.Size([2, 7, 64])
    """

    def __init__(self, rows: Rows, bias: Tensor | None, activation: Activation, *, shift: Tensor | None = None, norm: str = "none") -> None:
        self.rows, self.bias, self.activation, self.shift = rows, bias, activation, shift
        self.norm = one_of(norm, list(NORMS), "the norm of an encoder")
        expected = {"bias": (rows.shape[0],), "shift": rows.shape[1:]}
        for name, tensor in (("bias", bias), ("shift", shift)):
            if tensor is not None:
                check_shape(f"the {name} of an encoder", tensor, expected[name])
                check_finite(tensor, f"the {name} of an encoder")
        for name, tensor in activation.tensors.items():
            if len(tensor) != 1:
                check_shape(f"{name} of the activation '{activation.name}'", tensor, (rows.shape[0],))

    @property
    def width(self) -> int:
        """Number of features."""
        return self.rows.shape[0]

    def normalised(self, h: Tensor) -> Normalised:
        """At least in fp32. Raises WidthError for activations of another width."""
        expected = self.rows.shape[1:]
        if tuple(h.shape[-len(expected) :]) != expected:
            raise wrong_width(expected, h)
        return NORMS[self.norm](h.to(torch.promote_types(h.dtype, torch.float32)))

    def pre_activations(self, h: Tensor, features: Tensor | None = None) -> Tensor:
        """[..., chosen] before the activation; all features when None. For a gated dictionary without either of its biases."""
        x = self.normalised(h).x
        x = x if self.shift is None else x - self.shift.to(x.device, x.dtype)
        return self._linear(x, features)

    def encode(self, h: Tensor, features: Tensor | None = None) -> Tensor:
        """[..., chosen] features; a few of them need their own rows alone, if the activation is elementwise."""
        if features is None and (top := self.top(h)) is not None:
            f = top.values.new_zeros(*top.values.shape[:-1], self.width)
            return f.scatter(-1, top.indices, top.values)
        if features is None or self.activation.elementwise:
            return self.activation(self.pre_activations(h, features), features)
        # such an activation hands a pre-activation through or puts 0 in its place, which has no gradient of its own
        with torch.no_grad():
            is_on = self._is_on(h, features)
        return self.pre_activations(h, features) * is_on

    def top(self, h: Tensor) -> TopFeatures | None:
        """The features that can be other than 0, [..., k], in memory that does not depend on their number; None where that is not known."""
        k = self.activation.top
        if k is None or torch.compiler.is_compiling():
            return None
        x = self.normalised(h).x
        x = x if self.shift is None else x - self.shift.to(x.device, x.dtype)
        x = x.flatten(1 - len(self.rows.shape)) if len(self.rows.shape) > 2 else x
        bias = None if self.bias is None else self.bias.to(x.device, x.dtype)
        pre, indices = topk_encode(x, self.rows.all(x).flatten(1), bias, min(k, self.width))
        return TopFeatures(self.activation.of_top(pre), indices)

    def _is_on(self, h: Tensor, features: Tensor) -> Tensor:
        """[..., chosen] exactly where whole encoding gives another number than 0, a few tokens at a time."""
        if (top := self.top(h)) is not None:
            return is_among(top, features.to(h.device), self.width)
        tokens = h.reshape(-1, *self.rows.shape[1:])
        parts = [self.encode(part)[:, features.to(h.device)] != 0 for part in tokens.split(max(1, TILE // self.width))]
        lead = h.shape[: h.dim() - len(self.rows.shape) + 1]
        return torch.cat(parts).view(*lead, len(features)) if parts else torch.zeros(*lead, len(features), device=h.device)

    def _linear(self, x: Tensor, features: Tensor | None) -> Tensor:
        rows = self.rows.all(x) if features is None else self.rows.select(features, x)
        flat = x.flatten(1 - len(self.rows.shape)) if len(self.rows.shape) > 2 else x
        pre = flat @ rows.flatten(1).mT
        if self.bias is None:
            return pre
        bias = self.bias if features is None else self.bias[features.to(self.bias.device)]
        return pre + bias.to(pre.device, pre.dtype)


def is_among(top: TopFeatures, features: Tensor, width: int) -> Tensor:
    """[..., chosen] True at chosen features that are among the top ones, with another number than 0."""
    distinct, place_of = features.unique(return_inverse=True)  # one may be chosen twice
    column = torch.full((width,), len(distinct), device=features.device)  # all others meet in one column more
    column[distinct] = torch.arange(len(distinct), device=features.device)
    on = torch.zeros(*top.values.shape[:-1], len(distinct) + 1, dtype=torch.bool, device=features.device)
    return on.scatter(-1, column[top.indices], top.values != 0)[..., place_of]


def check_shape(what: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raises WidthError for a tensor of another shape."""
    if tuple(tensor.shape) != tuple(expected):
        raise _wrong_shape(what, tensor, expected)


def chosen(features: Tensor | list[int] | int, width: int) -> Tensor:
    """[chosen] indices as a tensor. Raises ConfigError for what is none, or lies outside the dictionary."""
    try:
        indices = torch.as_tensor(features)
        no_numbers = indices.is_floating_point() or indices.is_complex() or indices.dtype is torch.bool
        if indices.dim() > 1 or no_numbers and indices.numel():  # an empty list makes a tensor of floats
            raise TypeError("whole numbers are needed")
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_features(features, width) from error
    indices = indices.reshape(-1).long()
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < width:
        raise _outside(indices, width)
    return indices


# ---- errors


def wrong_width(expected: tuple[int, ...], h: Tensor) -> WidthError:
    """The error of activations that are not those of the dictionary's site."""
    shape = ", ".join(map(str, expected))
    return WidthError(
        "the activations do not fit the dictionary",
        expected=f"[..., {shape}]" + (", a row for each site that it reads" if len(expected) > 1 else ""),
        found=list(h.shape),
        remedy="use the dictionary that was trained at this site of this model; `dictionary.reads` says which",
    )


def _wrong_shape(what: str, tensor: Tensor, expected: tuple[int, ...]) -> WidthError:
    remedy = "get the file again from where it came, or check which tensor is which"
    return WidthError(f"{what} has another shape than its matrix", expected=list(expected), found=list(tensor.shape), remedy=remedy)


def _no_features(features: object, width: int) -> ConfigError:
    expected = f"an index, or a list of indices from 0 to {width - 1}"
    return ConfigError("no features are chosen", expected=expected, found=f"{features!r:.80}", remedy="e.g. [12, 400]")


def _outside(indices: Tensor, width: int) -> ConfigError:
    wrong = [index for index in indices.tolist() if not 0 <= index < width]
    remedy = "features are counted from 0; check that this is the dictionary they were found in"
    return ConfigError("a feature lies outside the dictionary", expected=f"0 to {width - 1}", found=wrong[:5], remedy=remedy)
