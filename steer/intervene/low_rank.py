"""Edits of a few coordinates: h + c(h R^T) W, the form that most operators have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from steer import kernels
from steer.checks import tensor_of
from steer.errors import ConfigError, WidthError
from steer.intervene.operator import Operator, RowTensors, check_finite, slotted

SMALLEST_NORM = 1e-30  # of an edited token that is scaled back: norms up to 1e8 divided by it are finite in fp32


class LowRank(Operator):
    """h + mask * c(x) W with x = h R^T: reads coordinates along the rows of R, and moves h along the rows of W.

    A subclass names R and W and says in `change` how far to move. Everything is worked out in fp32 at least, whatever the dtype of h:
    hidden norms reach 1e4, where bf16 keeps two digits of a small coordinate.

    Attributes:
        reads, writes: names of the tensors R and W, [slots, rank, width].
    """

    reads: ClassVar[str]
    writes: ClassVar[str]
    short_paths = ("fused", "kernel_arguments")

    def change(self, x: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        """How far to move along each row of W, [batch, tokens, rank of W], at full mask.

        Args:
            x: [batch, tokens, rank of R], fp32 or fp64.
            strength, per_row: as in `Operator.delta`; the change is exactly 0 where the strength is.
        """
        raise NotImplementedError

    def read_and_write(self, per_row: RowTensors) -> tuple[Tensor, Tensor]:
        """R and W for this batch, [batch or 1, rank, width]."""
        return per_row[self.reads], per_row[self.writes]

    def apply(self, h: Tensor, strength: Tensor, mask: Tensor | None, per_row: RowTensors) -> Tensor:
        with without_autocast(h):
            read, write = self.read_and_write(per_row)
            wide = widened(h)
            change = self.change(coordinates(wide, read), strength, per_row)  # [batch, tokens, rank of W]
            edited = moved(wide, change if mask is None else change * mask, write)
        return edited if wide is h else edited.to(h.dtype)

    def kernel_arguments(self, strength: Tensor, bank: RowTensors) -> dict[str, Any] | None:
        """The same as `change` in the terms of `steer.kernels.edit`: what the numbers of its directions are, and what else differs from
        reading R, writing W and the strength. None where it cannot be said in them.

        Args:
            strength: as in `change`.
            bank: the tensors of all row slots.
        """
        return None

    def fused(self, h: Tensor, strength: Tensor, mask: Tensor | None, rows: Tensor | None, preserve_norm: bool) -> Tensor | None:
        arguments = self.kernel_arguments(strength, self.tensors)
        if arguments is None:
            return None
        read, write = self.read_and_write(self.tensors)
        slots = rows if self.slots > 1 else None
        arguments = {"read": read, "write": write, "strength": strength, **arguments}
        return kernels.edit(h, mask=mask, slots=slots, preserve_norm=preserve_norm, **arguments)


class LinearLowRank(LowRank):
    """A low-rank edit whose change is strength * c * x, a multiple of what it reads; a subclass states c."""

    linear_in_strength = True

    def factor(self, per_row: RowTensors) -> Tensor | float:
        """c, [batch or 1, 1, 1] or a number."""
        raise NotImplementedError

    def change(self, x: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        return strength * self.factor(per_row) * x

    def is_affine(self) -> bool:
        return True


def without_autocast(h: Tensor) -> AbstractContextManager[Any]:
    """Autocast would round a fp32 residual stream to bf16 in the products."""
    device = h.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def widened(h: Tensor) -> Tensor:
    """h in fp32, or fp64 when it is that."""
    return h if h.dtype is torch.float32 else h.to(torch.promote_types(h.dtype, torch.float32))


def coordinates(h: Tensor, rows: Tensor) -> Tensor:
    """h R^T, [batch, tokens, rank]. h: [batch, tokens, width]; rows: [batch or 1, rank, width]."""
    rows = rows if rows.dtype is h.dtype else rows.to(h.dtype)
    if rows.shape[1] == 1 and (h.shape[1] == 1 or torch.compiler.is_compiling()):  # a compiler fuses this with its neighbours
        return (h * rows).sum(-1, keepdim=True)
    return linear(h, rows[0]) if rows.shape[0] == 1 else h @ rows.mT


def moved(h: Tensor, change: Tensor, rows: Tensor) -> Tensor:
    """h + change W. change: [batch, tokens, rank]; rows: [batch or 1, rank, width]."""
    rows = rows if rows.dtype is h.dtype else rows.to(h.dtype)
    if rows.shape[1] == 1:
        return torch.addcmul(h, change, rows)
    return torch.baddbmm(h, change.expand(h.shape[0], -1, -1), rows.expand(h.shape[0], -1, -1))


# ---- what constructors make of their arguments


def numbers(value: float | Tensor, what: str) -> Tensor:
    """[slots, 1, 1] fp32, to go with coordinates, from a number or from one per row slot."""
    per_slot = tensor_of(value, what, "pass a number, or one per row slot").detach().to(torch.float32, copy=True)
    if per_slot.dim() > 1 or per_slot.numel() == 0:
        raise _not_flat(what, per_slot)
    check_finite(per_slot, what)
    return per_slot.reshape(-1, 1, 1)


def unit(vector: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """[slots, 1, width] of length 1, and the lengths that they had, [slots, 1, 1]. Raises ConfigError for a vector that is zero."""
    vector = slotted(vector, 2, what).double().unsqueeze(1)  # [slots, 1, width]
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    if not bool((length > 0).all()):
        raise _zero_vector(what, length)
    return (vector / length).float(), length.float()


def orthonormal(rows: Tensor, what: str) -> Tensor:
    """[slots, rank, width] orthonormal rows with the span and the orientation of those given: Gram-Schmidt, the first keeps its direction.

    Args:
        rows: [width], [rank, width] or [slots, rank, width].

    Raises:
        ConfigError: rows that are zero or linearly dependent.
    """
    rows = tensor_of(rows, what, "pass a vector or a matrix of rows")
    rows = slotted(rows[None] if rows.dim() == 1 else rows, 3, what).double()
    q, r = torch.linalg.qr(rows.mT)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    independent_part = diagonal.abs()
    if bool((independent_part.amin(-1) <= 1e-6 * rows.norm(dim=-1).amax(-1)).any()) or rows.shape[1] > rows.shape[2]:
        raise _dependent_rows(what, rows.shape[1], float(independent_part.min()))
    return (q * diagonal.sign().unsqueeze(-2)).mT.float().contiguous()


def orthonormalised(rows: Tensor) -> Tensor:
    """The same in a graph, for rows that are being learned: L^-1 A with L L^T = A A^T, smooth in A. rows: [slots, rank, width]."""
    if rows.shape[1] == 1:
        return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    factor, _ = torch.linalg.cholesky_ex(rows @ rows.mT)
    return torch.linalg.solve_triangular(factor, rows, upper=False)


def listed(values: Tensor) -> str:
    """Numbers of row slots in words."""
    return ", ".join(f"{value:.4g}" for value in values.flatten().tolist())


def with_norm_of(h: Tensor, edited: Tensor) -> Tensor:
    """`edited` scaled to the norms of h, token by token; a token that was not edited keeps every bit. Both fp32 or fp64."""
    before = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    after = torch.linalg.vector_norm(edited, dim=-1, keepdim=True)
    return edited * (before / after.clamp_min(SMALLEST_NORM))


def same_width(what: str, **tensors: Tensor) -> None:
    """Raises WidthError unless the last dimensions agree."""
    widths = {name: tensor.shape[-1] for name, tensor in tensors.items()}
    if len(set(widths.values())) > 1:
        raise _different_widths(what, widths)


# ---- errors


def _not_flat(what: str, numbers: Tensor) -> ConfigError:
    return ConfigError(
        f"{what} has the wrong shape",
        expected="a number, or one per row slot",
        found=list(numbers.shape),
        remedy="give a flat list of numbers",
    )


def _zero_vector(what: str, length: Tensor) -> ConfigError:
    return ConfigError(
        f"{what} is zero",
        expected="a vector with a length, which gives a direction",
        found=f"lengths {length.flatten().tolist()}",
        remedy="take the vector of a site at which the classes differ",
    )


def _dependent_rows(what: str, count: int, smallest: float) -> ConfigError:
    return ConfigError(
        f"{what} are zero or linearly dependent",
        expected=f"{count} independent directions",
        found=f"smallest independent part {smallest:.3g}",
        remedy="leave out the one that is zero or follows from the others",
    )


def _different_widths(what: str, widths: dict[str, int]) -> WidthError:
    return WidthError(
        f"the tensors of '{what}' do not fit together",
        expected="one width, that of the site",
        found=", ".join(f"{width} in {name}" for name, width in widths.items()),
        remedy="take all of them from the same model and site",
    )
