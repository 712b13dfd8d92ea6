"""Rows: the encoder or decoder matrix of a dictionary, one row per feature, of which single rows are read without the rest.

Where a matrix lies in a safetensors file, the rows of a few features are read from the file and the whole is mapped into memory only when
it is asked for. Scales, low-rank products and int8 are applied to what is read, so that they cost what the chosen rows cost.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from steer.errors import DamagedFileError, NonFiniteError
from steer.tensor_files import open_safetensors

WHOLE = 8  # from a share of 1 / WHOLE of the features on, reading all of them is faster


class Rows:
    """[features, ...] numbers that are stored somewhere; `like`, of any shape, says in which dtype and on which device they are wanted.

    Attributes:
        shape: of all rows together.
        dtype: in which they are stored.

    Example:
        >>> rows = steer.features.InMemory(torch.randn(100, 32))
        >>> rows.select(torch.tensor([3, 40]), like=torch.zeros(1)).shape, rows.all(like=torch.zeros(1)).shape
        (torch.Size([2, 32]), torch.Size([100, 32]))
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self._converted: Tensor | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {str(self.dtype).removeprefix('torch.')})"

    def select(self, features: Tensor, like: Tensor) -> Tensor:
        """[chosen, ...] rows of chosen features, in the dtype and on the device of `like`. Raises NonFiniteError, FileError."""
        return self._some(features.cpu()).to(like.device, like.dtype)

    def all(self, like: Tensor) -> Tensor:
        """[features, ...] every row, in the dtype and on the device of `like`; a copy that this needs is kept. Raises as `select`."""
        kept = self._converted
        if kept is not None and kept.dtype is like.dtype and kept.device == like.device:
            return kept
        stored = self._all()
        converted = stored.to(like.device, like.dtype)
        if not converted.requires_grad:  # what is being trained changes, and belongs to one graph
            self._converted = converted
        return converted

    def _some(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def _all(self) -> Tensor:
        raise NotImplementedError


class InMemory(Rows):
    """Rows of a tensor, which may be in training.

    Args:
        tensor: [features, ...]. what: its name in messages.

    Example:
        >>> rows = steer.features.InMemory(torch.eye(4))
        >>> rows.select(torch.tensor([2]), like=torch.zeros(1))
        tensor([[0., 0., 1., 0.]])
    """

    def __init__(self, tensor: Tensor, what: str = "a matrix") -> None:
        super().__init__(tuple(tensor.shape), tensor.dtype)
        check_finite(tensor, what)
        self.tensor = tensor

    def _some(self, features: Tensor) -> Tensor:
        return self.tensor[features.to(self.tensor.device)]

    def _all(self) -> Tensor:
        return self.tensor


class InFile(Rows):
    """Rows of a tensor in a safetensors file.

    Args:
        axis: of the tensor that counts the features; the others follow in their order.
    """

    def __init__(self, path: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype, axis: int = 0) -> None:
        super().__init__((shape[axis], *shape[:axis], *shape[axis + 1 :]), dtype)
        self.path, self.key, self.axis = path, key, axis
        self._stored_shape = tuple(shape)
        self._is_checked = False

    def _some(self, features: Tensor) -> Tensor:
        if len(features) * WHOLE >= self.shape[0]:
            return self._all()[features]
        before = (slice(None),) * self.axis
        with open_safetensors(self.path) as file:
            stored = file.get_slice(self.key)
            self._check_shape(tuple(stored.get_shape()))
            read = [stored[(*before, slice(index, index + 1))].movedim(self.axis, 0) for index in features.tolist()]
        rows = torch.cat(read) if read else torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        check_finite(rows, f"'{self.key}' of {self.path}")
        return rows

    def _all(self) -> Tensor:
        with open_safetensors(self.path) as file:
            tensor = file.get_tensor(self.key)  # mapped into memory, not read
        self._check_shape(tuple(tensor.shape))
        if not self._is_checked:
            check_finite(tensor, f"'{self.key}' of {self.path}")
            self._is_checked = True
        return tensor.movedim(self.axis, 0)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape != self._stored_shape:
            raise _changed_file(self.path, self.key, self._stored_shape, shape)


class Scaled(Rows):
    """Rows times a number, or times numbers that broadcast against [features, ...]: a norm of activations or of the decoder, folded in."""

    def __init__(self, rows: Rows, factor: float | Tensor) -> None:
        super().__init__(rows.shape, rows.dtype)
        self.rows = rows
        self.factor = torch.as_tensor(factor, dtype=torch.float64)

    def _some(self, features: Tensor) -> Tensor:
        rows = self.rows._some(features)
        per_feature = self.factor.dim() == len(self.shape) and self.factor.shape[0] > 1
        return _times(rows, self.factor[features] if per_feature else self.factor)

    def _all(self) -> Tensor:
        return _times(self.rows._all(), self.factor)


class LowRank(Rows):
    """Rows `left @ right`, of which only the two factors are stored (low-rank decoders of cross-layer transcoders).

    Args:
        left: [features, ..., rank]. right: [..., rank, width] with the same axes between.

    Raises:
        DamagedFileError: factors that do not fit each other.

    Example:
        >>> rows = steer.features.LowRank(steer.features.InMemory(torch.randn(100, 4)), torch.randn(4, 32))
        >>> rows.shape
        (100, 32)
    """

    def __init__(self, left: Rows, right: Tensor) -> None:
        super().__init__((*left.shape[:-1], right.shape[-1]), left.dtype)
        if left.shape[1:] != tuple(right.shape[:-1]):
            raise _unfit_factors(left.shape, tuple(right.shape))
        check_finite(right, "the second factor of a low-rank matrix")
        self.left, self.right = left, right

    def _some(self, features: Tensor) -> Tensor:
        return self._product(self.left._some(features))

    def _all(self) -> Tensor:
        return self._product(self.left._all())

    def _product(self, left: Tensor) -> Tensor:
        return torch.einsum("n...r,...rd->n...d", left.float(), self.right.float())


class Int8(Rows):
    """Rows that are stored as whole numbers from -127 to 127, with one scale per feature."""

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        super().__init__(tuple(numbers.shape), torch.int8)
        self.numbers, self.scale = numbers, scale

    def _some(self, features: Tensor) -> Tensor:
        return self._restored(self.numbers[features], self.scale[features])

    def _all(self) -> Tensor:
        return self._restored(self.numbers, self.scale)

    def _restored(self, numbers: Tensor, scale: Tensor) -> Tensor:
        return numbers.float() * scale.view(-1, *[1] * (numbers.dim() - 1))


def as_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """[features, ...] -> int8 of the same shape, and [features] scales; the largest number of each row is met exactly."""
    flat = tensor.float().flatten(1)
    scale = flat.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (flat / scale[:, None]).round().to(torch.int8).view(tensor.shape), scale


def norms(rows: Rows) -> Tensor:
    """[features] length of each row, fp64."""
    return rows.all(torch.empty(0, dtype=torch.float64)).flatten(1).norm(dim=1)


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises NonFiniteError with the name of a tensor, and its first row that is not finite."""
    bad: Callable[[Tensor], Tensor] = lambda part: ~torch.isfinite(part.float() if part.element_size() == 1 else part)  # noqa: E731
    for start in range(0, len(tensor) if tensor.dim() else 1, 4096):
        part = bad(tensor.detach()[start : start + 4096] if tensor.dim() else tensor.detach())
        if part.any():
            row = start + int(part.flatten(1).any(1).nonzero()[0]) if tensor.dim() > 1 else None
            raise _non_finite(what, row, int(part.sum()))


def _times(rows: Tensor, factor: Tensor) -> Tensor:
    wide = torch.float64 if rows.dtype is torch.float64 else torch.float32
    return (rows.to(wide) * factor.to(rows.device)).to(wide)


# ---- errors


def _non_finite(what: str, row: int | None, count: int) -> NonFiniteError:
    where = "" if row is None else f", the first in row {row}"
    remedy = "get the file again from where it came; of a dictionary in training, lower its learning rate"
    return NonFiniteError(f"{what} is not finite", expected="finite numbers", found=f"{count} NaN or infinite{where}", remedy=remedy)


def _changed_file(path: Path, key: str, expected: tuple[int, ...], found: tuple[int, ...]) -> DamagedFileError:
    remedy = "load the dictionary again; do not replace the file of one that is in use"
    what = f"'{key}' of {path} has changed since the dictionary was loaded"
    return DamagedFileError(what, expected=f"the shape {list(expected)}", found=list(found), remedy=remedy)


def _unfit_factors(left: tuple[int, ...], right: tuple[int, ...]) -> DamagedFileError:
    return DamagedFileError(
        "the factors of a low-rank decoder do not fit",
        expected=f"[..., rank, width] with {list(left[1:])} for a first factor {list(left)}",
        found=list(right),
        remedy="pass the second factor as it was trained with the first",
    )
