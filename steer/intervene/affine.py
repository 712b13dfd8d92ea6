"""Affine edits: what an operator does to an activation, when that is an affine map, which weights and adapters can carry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steer.intervene.low_rank import LowRank
from steer.intervene.operator import Operator


@dataclass(frozen=True, eq=False)
class Affine:
    """h + (h right^T) left + shift, in fp64.

    Attributes:
        right, left: [rank, width].
        shift: [width].
    """

    right: Tensor
    left: Tensor
    shift: Tensor

    @classmethod
    def adding(cls, shift: Tensor) -> Affine:
        """h + shift."""
        none = shift.new_empty(0, shift.shape[0])
        return cls(none, none, shift)

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    def then(self, later: Affine) -> Affine:
        """This edit followed by another, as one."""
        right = torch.cat([self.right, later.right + (later.right @ self.left.mT) @ self.right])
        shift = self.shift + (later.right @ self.shift) @ later.left + later.shift
        return Affine(right, torch.cat([self.left, later.left]), shift)

    def within(self, columns: slice | Tensor, width: int) -> Affine:
        """The same edit of some columns of a wider activation."""

        def wide(part: Tensor) -> Tensor:
            whole = part.new_zeros(*part.shape[:-1], width)
            whole[..., columns] = part
            return whole

        return Affine(wide(self.right), wide(self.left), wide(self.shift))

    def read_by(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What is left to read along some rows afterwards: (h edited) rows^T = h X^T + c.

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
    """
    if not operator.is_affine():
        return None
    per_row = operator.tensors
    scale = strength.double().reshape(1, 1, 1)
    if not isinstance(operator, LowRank):  # one that reads nothing adds a constant
        return Affine.adding(operator.delta(scale.new_zeros(1, 1, operator.width), scale, per_row).flatten().cpu())
    right, write = (rows[0].double() for rows in operator.read_and_write(per_row))
    rank = right.shape[0]
    basis = torch.cat([right.new_zeros(1, rank), torch.eye(rank).to(right)])[None]
    change = operator.change(basis, scale, per_row).double().expand(1, rank + 1, -1)[0]
    return Affine(right.cpu(), ((change[1:] - change[0]) @ write).cpu(), (change[0] @ write).cpu())
