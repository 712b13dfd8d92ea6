"""Angular steering: rotation in a plane (Vu & Nguyen 2025, arXiv 2510.26243)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steer.checks import of_type, tensor_of
from steer.errors import ConfigError
from steer.intervene.low_rank import LowRank, listed, numbers, orthonormal
from steer.intervene.operator import OPERATORS, RowTensors


@OPERATORS.register("rotate")
class Rotate(LowRank):
    """h - proj(h) + rotated(proj(h)): turns h in a plane by strength * angle, or towards an angle, and keeps its norm (angular steering).

    With the coordinates (x, y) = (h·b1, h·b2) in the plane and a = strength * angle:

        h + (x cos a - y sin a - x) b1 + (x sin a + y cos a - y) b2

    With `towards`, a is strength times the shorter way from atan2(y, x) to the angle. Strength 1 is then the form of the paper,
    h - proj(h) + |proj(h)| (cos angle b1 + sin angle b2). Its adaptive variant, which turns only tokens with h·b1 > 0, is this one with
    the gate `ProbeGate(b1)`.

    Args:
        plane: [2, width] or [slots, 2, width], a direction of the concept and another; b1 is the first, b2 what the second has beside it.
        angle: in radians, from b1 towards b2, a number or one per row slot; it can be learned.
        towards: turn to the angle instead of by it.

    Raises:
        ConfigError: anything but two vectors that span a plane.

    Example:
        >>> plane = torch.stack([vector, torch.roll(vector, 1)])  # [2, width]
        >>> plan = steer.Plan(steer.Intervention(steer.Rotate(plane, angle=torch.pi / 4), "layers.12.output"))
    """

    parts = ("plane", "angle")
    settings = ("towards",)
    learnable = ("angle",)
    reads = writes = "plane"

    def __init__(self, plane: Tensor, angle: float | Tensor, towards: bool = False) -> None:
        of_type(towards, bool, "`towards` of 'rotate'", "pass True or False")
        plane = tensor_of(plane, "the plane of 'rotate'", "stack two vectors")
        if plane.dim() < 2 or plane.shape[-2] != 2:
            raise ConfigError(
                "'rotate' needs a plane", expected="[2, width], or [slots, 2, width]", found=list(plane.shape), remedy="stack two vectors"
            )
        rows = orthonormal(plane, "the two vectors of the plane")
        self.towards = towards
        super().__init__({"plane": rows, "angle": numbers(angle, "angle")}, rows.shape[-1])

    def change(self, x: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        angle, (x, y) = per_row["angle"], x.split(1, dim=-1)
        if self.towards:
            angle = torch.remainder(angle - torch.atan2(y, x) + math.pi, 2 * math.pi) - math.pi
        turn = strength * angle
        sine, less = torch.sin(turn), torch.cos(turn) - 1.0
        return torch.cat([torch.addcmul(less * x, sine, y, value=-1), torch.addcmul(sine * x, less, y)], dim=-1)

    def is_affine(self) -> bool:
        return not self.towards

    def describe(self) -> str:
        return f"rotate {'to' if self.towards else 'by'} {listed(self.tensors['angle'].rad2deg())} degrees in a plane"
