"""Operators: what an intervention does to an activation.

A new one is a file with one registered subclass of `Operator`; plan files, the CLI, the docs table and the tests find it in `OPERATORS`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.errors import ConfigError, NonFiniteError
from steer.registry import Registry

OPERATORS: Registry[type[Operator]] = Registry("operator")


class Operator:
    """A pure, differentiable function of the activation, driven by tensors that may change between calls without recompilation.

    Attributes:
        tensors: named fp32 tensors, the first dimension being row slots (1 when all rows share one).
        width: size of the activation's last dimension.
    """

    name: ClassVar[str]

    def __init__(self, tensors: dict[str, Tensor], width: int) -> None:
        self.tensors, self.width = tensors, width
        self.slots = max(tensor.shape[0] for tensor in tensors.values())
        for name, tensor in tensors.items():
            check_finite(tensor, f"{name} of operator '{type(self).name}'")

    def apply(self, h: Tensor, strength: Tensor, mask: Tensor | None, pick: Pick) -> Tensor:
        """Edits an activation, in its own dtype.

        Args:
            h: [batch, tokens, width].
            strength: [batch or 1, 1, 1] fp32; 0 leaves h exactly as it is.
            mask: [batch, tokens, 1] of 0 and 1 in the dtype of h, 0 leaves a token exactly as it is; None for every token.
            pick: gives a named tensor for this batch, [batch or 1, ...].
        """
        raise NotImplementedError

    def to(self, device: torch.device) -> None:
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}

    def describe(self) -> str:
        """One phrase for `Plan.explain()`."""
        return type(self).name

    def options(self) -> dict[str, Any]:
        """Constructor arguments beyond the tensors, JSON-able, for the plan file."""
        return {}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Operator:
        """Rebuilds an operator from its file form: its constructor takes the tensors by their names."""
        arguments: dict[str, Any] = {**tensors, **options}
        return cls(**arguments)


class Pick:
    """Row slots: hands each row of a batch its own vector."""

    def __init__(self, operator: Operator, rows: Tensor | None) -> None:
        self.tensors, self.rows = operator.tensors, rows

    def __call__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor if self.rows is None or tensor.shape[0] == 1 else tensor[self.rows]


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises NonFiniteError with the number of bad entries."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise NonFiniteError(
            f"{what} is not finite", expected="finite numbers", found=f"{bad} of {tensor.numel()} entries are NaN or infinite"
        )


def slotted(tensor: Tensor, ndim: int, what: str) -> Tensor:
    """fp32 copy of a tensor with `ndim` dimensions, a slot dimension put in front where it is missing."""
    if tensor.dim() == ndim - 1:
        tensor = tensor[None]
    if tensor.dim() != ndim or 0 in tensor.shape:
        raise ConfigError(
            f"{what} has the wrong shape", expected=f"{ndim - 1} dimensions, or {ndim} with row slots", found=list(tensor.shape)
        )
    check_finite(tensor, what)
    return tensor.detach().to(torch.float32, copy=True).contiguous()
