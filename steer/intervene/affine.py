"""Affine edits: what an operator does to an activation, when that is an affine map, which weights and adapters can carry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steer.checks import errors_of
from steer.errors import ConfigError
from steer.intervene.low_rank import LowRank
from steer.intervene.operator import Operator


@dataclass(frozen=True, eq=False)
class Affine:
    """h + (h right^T) left + shift, in fp64.

    Attributes:
        right, left: [rank, width].
        shift: [width].

    Example:
        >>> edit = affine_form(steer.Ablate(direction), torch.tensor(1.0))
        >>> edited = h + (h @ edit.right.mT) @ edit.left + edit.shift
    """

    right: Tensor
    left: Tensor
    shift: Tensor

    @classmethod
    def adding(cls, shift: Tensor) -> Affine:
        """h + shift. shift: [width]."""
        no_rows = shift.new_empty(0, shift.shape[0])  # [0, width]
        return cls(no_rows, no_rows, shift)

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def shifts(self) -> bool:
        """The shift is not 0."""
        return bool((self.shift != 0).any())

    def then(self, later: Affine) -> Affine:
        """This edit followed by another, as a single edit; the ranks add up."""
        right = torch.cat([self.right, later.right + (later.right @ self.left.mT) @ self.right])  # [rank + later rank, width]
        shift = self.shift + (later.right @ self.shift) @ later.left + later.shift
        return Affine(right, torch.cat([self.left, later.left]), shift)

    def within(self, columns: slice | Tensor, width: int) -> Affine:
        """The same edit of some columns of a wider activation."""

        def padded(part: Tensor) -> Tensor:
            wider = part.new_zeros(*part.shape[:-1], width)
            wider[..., columns] = part
            return wider

        return Affine(padded(self.right), padded(self.left), padded(self.shift))

    def read_by(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """X and c of (h edited) rows^T = h X^T + c: what can still be read along some rows after the edit.

        Args:
            rows: [rank, width].

        Returns:
            X [rank, width] and c [rank].
        """
        return rows + (rows @ self.left.mT) @ self.right, rows @ self.shift


@torch.no_grad()
def affine_form(operator: Operator, strength: Tensor) -> Affine | None:
    """The edit of an operator with one row slot, or None when it is not an affine function of the activation.

    Args:
        strength: one number.

    Raises:
        ConfigError: an operator that says that it is affine, and whose edit is none of an addition, an affine `LowRank`, and an affine
            function of each channel by itself.
    """
    if not operator.is_affine():
        return None
    strength = strength.double().reshape(1, 1, 1)
    with errors_of(f"operator '{operator.name}'", "let it take activations in fp64, or let is_affine() return False"):
        edit = _form_at(operator, strength)
        # far apart in size, since an edit may be affine near 0 alone
        h = torch.randn(1, 4, operator.width, generator=torch.Generator().manual_seed(0x7D21), dtype=torch.float64)
        h = h * torch.tensor([0.1, 1.0, 30.0, 1000.0], dtype=torch.float64).view(1, 4, 1)  # [1, 4, width]
        edited = operator.apply(h.to(_device(operator)), strength.to(_device(operator)), None, operator.tensors).cpu()
    expected = h + (h @ edit.right.mT) @ edit.left + edit.shift
    gap = (edited.double() - expected).abs().amax(-1)  # [1, 4]
    if not bool((gap <= 1e-4 * (h.abs().amax(-1) + (expected - h).abs().amax(-1))).all()):  # NaN is none
        raise _another_edit(operator, float(gap.max()))
    return edit


def _device(operator: Operator) -> torch.device:
    return next(iter(operator.tensors.values())).device


def _form_at(operator: Operator, strength: Tensor) -> Affine:
    """strength: [1, 1, 1] fp64."""
    tensors = operator.tensors
    strength = strength.to(_device(operator))
    if not isinstance(operator, LowRank):
        return _form_by_channel(operator, strength)
    right, write = (rows[0].double() for rows in operator.read_and_write(tensors))  # [rank of R, width], [rank of W, width]
    rank = right.shape[0]
    # the change is affine in the coordinates: its value at 0 is the constant, and that at each unit vector gives one row of the matrix
    points = torch.cat([right.new_zeros(1, rank), torch.eye(rank).to(right)])[None]  # [1, 1 + rank, rank]
    change = operator.change(points, strength, tensors).double().expand(1, rank + 1, -1)[0]  # [1 + rank, rank of W]
    return Affine(right.cpu(), ((change[1:] - change[0]) @ write).cpu(), (change[0] @ write).cpu())


def _form_by_channel(operator: Operator, strength: Tensor) -> Affine:
    """Of an edit that adds a constant, or that changes each channel by itself: one row for each channel that it scales."""
    points = torch.stack([strength.new_zeros(operator.width), strength.new_ones(operator.width)])[None]  # [1, 2, width]
    change = operator.delta(points, strength, operator.tensors).double().expand(1, 2, operator.width)[0].cpu()  # [2, width]
    slope = change[1] - change[0]
    right = torch.eye(operator.width, dtype=torch.float64)[slope != 0]  # [channels, width]
    return Affine(right, right * slope, change[0])


def _another_edit(operator: Operator, gap: float) -> ConfigError:
    return ConfigError(
        f"operator '{operator.name}' says that it is `is_affine`, and its edit is none that weights and files can carry",
        expected="strength * a constant, an affine function of each channel, or a `LowRank` whose `change` is one of what it reads",
        found=f"an edit that differs from such a one by {gap:.3g}",
        remedy="let is_affine() return False in its class, also where a base class says otherwise",
    )
