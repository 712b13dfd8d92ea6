"""Streaming moments of projections, on plain tensors.

Never module buffers: DDP overwrites those from rank 0 in every forward pass. Never plain sums in a low precision: the variance from
sum p^2 - (sum p)^2 / n is wrong in the third digit in fp32 and garbage in bf16. Here batches are merged by their means and centred sums of
squares (Chan, Golub and LeVeque 1983), in fp64 where the device has it and in fp32 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from steer.errors import WidthError
from steer.model.devices import accumulation_dtype

Reduce = Callable[[Tensor], Tensor]


def identity(tensor: Tensor) -> Tensor:
    """Sum over ranks where there is a single one."""
    return tensor


class ProjectionMoments:
    """Weighted count, mean and centred sum of squares of k projections.

    Attributes:
        n: [] sum of the weights.
        mean: [k], 0 before the first update.
        m2: [k] sum of weight * (p - mean)^2.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        dtype = accumulation_dtype(device)
        with torch.inference_mode(False):  # created during a validation run, changed during training
            self.n = torch.zeros((), dtype=dtype, device=device)
            self.mean = torch.zeros(k, dtype=dtype, device=device)
            self.m2 = torch.zeros(k, dtype=dtype, device=device)

    def update(self, projections: Tensor, weight: Tensor) -> None:
        """Adds tokens, in place and without waiting for the device.

        Args:
            projections: [tokens, k], any float dtype. Where the weight is 0 they may be anything, nan too.
            weight: [tokens], bool or number.

        Raises:
            WidthError: projections of another shape.
        """
        if projections.dim() != 2 or projections.shape[1] != len(self.mean):
            raise _wrong_projections(len(self.mean), projections)
        weights = weight.to(self.n.dtype)[:, None]  # [tokens, 1]
        projections = torch.where(weights > 0, projections.to(self.n.dtype), 0)
        n = weights.sum()
        mean = (weights * projections).sum(0) / _positive(n)  # [k]
        self._merge(n, mean, (weights * (projections - mean).square()).sum(0))

    def merge(self, moments: ProjectionMoments) -> None:
        """Adds what another accumulator has seen."""
        self._merge(moments.n.to(self.n), moments.mean.to(self.n), moments.m2.to(self.n))

    def _merge(self, n: Tensor, mean: Tensor, m2: Tensor) -> None:
        total = self.n + n
        delta = mean - self.mean
        self.m2.add_(m2 + delta.square() * (self.n * n / _positive(total)))
        self.mean.add_(delta * (n / _positive(total)))
        self.n.copy_(total)

    def reduced(self, reduce: Reduce) -> ProjectionMoments:
        """The moments over all ranks, as a new accumulator.

        Args:
            reduce: sum of a tensor over ranks; every rank must call this at the same time.
        """
        sums = reduce(torch.cat([self.n[None], self.n * self.mean]))  # [1 + k]
        total = ProjectionMoments(len(self.mean), self.n.device)
        total.n.copy_(sums[0])
        total.mean.copy_(sums[1:] / _positive(sums[0]))
        total.m2.copy_(reduce(self.m2 + self.n * (self.mean - total.mean).square()))
        return total

    def to(self, device: torch.device | str) -> ProjectionMoments:
        """A copy on another device, in that device's precision."""
        copy = ProjectionMoments(len(self.mean), device)
        copy.load_state_dict(self.state_dict())
        return copy

    def reset(self) -> None:
        """Forgets everything, in place."""
        for tensor in (self.n, self.mean, self.m2):
            tensor.zero_()

    @property
    def variance(self) -> Tensor:
        """[k], with n - 1; nan for fewer than two tokens."""
        return torch.where(self.n > 1, self.m2 / _positive(self.n - 1), torch.nan)

    @property
    def sd(self) -> Tensor:
        """[k], square root of `variance`."""
        return self.variance.sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the three tensors."""
        return {"n": self.n.clone(), "mean": self.mean.clone(), "m2": self.m2.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over saved tensors. Raises WidthError when the state is of another number of projections."""
        if state["mean"].shape != self.mean.shape:
            raise _wrong_state(self.mean, state["mean"])
        for name, tensor in (("n", self.n), ("mean", self.mean), ("m2", self.m2)):
            tensor.copy_(state[name])


def _positive(x: Tensor) -> Tensor:
    """A denominator that is never 0 (weights may be fractions, so clamping to 1 would be wrong)."""
    return torch.where(x > 0, x, 1)


def _wrong_projections(k: int, projections: Tensor) -> WidthError:
    return WidthError(
        "wrong number of projections",
        expected=f"the shape [tokens, {k}]",
        found=list(projections.shape),
        remedy="give a column for each direction that this accumulator was made for",
    )


def _wrong_state(mean: Tensor, saved: Tensor) -> WidthError:
    return WidthError(
        "state of another accumulator",
        expected=f"means of the shape {list(mean.shape)}",
        found=list(saved.shape),
        remedy="track as many directions and controls as when the state was saved",
    )
