"""The unified edit in PyTorch operations, forward and backward; mathematics in `edit.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.kernels.layout import inside, picked
from steer.kernels.steer_add import kept_norm

FUSED = 8  # directions up to which Inductor keeps one pass over memory when products are written as sums
Numbers = tuple[Tensor | None, ...]  # bias, scale, shift, low, high, threshold: each [1 or slots, M]
Options = tuple[float, bool, bool, bool]  # s - 1 where it is one number, relative, gated, norm


def slots_in(read: Tensor, write: Tensor, numbers: Numbers) -> int:
    """Number of slots: that of every bank which has more than one. Raises ConfigError when they differ."""
    counts = {one.shape[0] for one in (read, write, *numbers) if one is not None} - {1}
    if len(counts) > 1:
        raise ConfigError(
            "the banks of an edit differ in slots",
            expected="one number of slots, or 1",
            found=", ".join(map(str, sorted(counts))),
            remedy="give every bank as many slots as the others, or one for all rows",
        )
    return counts.pop() if counts else 1


class Change(NamedTuple):
    """phi of the numbers that were read, and what its derivatives follow from; all [batch, tokens, M]."""

    phi: Tensor
    on: Tensor | None  # over the threshold; None without one
    z: Tensor
    under: Tensor | None  # held up by the lower bound
    over: Tensor | None  # held down by the upper one
    slope: Tensor | float  # s - 1


def changed(p: Tensor, numbers: Numbers, gain: float, gated: bool, length: Tensor | None) -> Change:
    """phi for p [batch, tokens, M]. numbers: what broadcasts to it; length: |h|, [batch, tokens, 1], for a relative threshold."""
    _, scale, shift, low, high, threshold = numbers
    on, z, under, over = None, p, None, None
    if threshold is not None:
        on = p > (threshold if length is None else threshold * length)
        z = torch.where(on, p, 0)
    slope = gain if scale is None else scale - 1
    phi = slope * z
    phi = phi if shift is None else phi + shift
    if low is not None:
        under = phi < low - z
        phi = torch.where(under, low - z, phi)
    if high is not None:
        over = phi > high - z
        phi = torch.where(over, high - z, phi)
    return Change(phi if on is None or not gated else torch.where(on, phi, 0), on, z, under, over, slope)


def formula(
    x: Tensor, read: Tensor, write: Tensor, weight: Tensor, slots: Tensor | None, numbers: Numbers, options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The edit in PyTorch operations, differentiable as often as one likes; Inductor makes one kernel of it up to `FUSED` directions.

    Returns:
        (o, p, |h|): |h| [batch, tokens, 1] where a threshold is relative to it; p in compiled code that of the last direction alone.
    """
    gain, relative, gated, norm = options
    wide = torch.promote_types(x.dtype, torch.float32)
    full, u, v = x.to(wide), picked(read, slots).to(wide), picked(write, slots).to(wide)
    chosen = tuple(None if one is None else picked(one, slots).to(wide) for one in numbers)
    length = torch.linalg.vector_norm(full, dim=-1, keepdim=True) if relative else None
    weight = inside(weight, slots, slots_in(read, write, numbers)).unsqueeze(-1)
    if torch.compiler.is_compiling() and read.shape[1] <= FUSED:  # sums of products, one direction at a time: matrix products end a kernel
        p, y = full, full
        for j in range(read.shape[1]):
            own = tuple(None if one is None else one[..., j : j + 1] for one in chosen)
            p = (full * u[:, :, j]).sum(-1, keepdim=True)
            p = p if own[0] is None else p + own[0]
            y = y + weight * changed(p, own, gain, gated, length).phi * v[:, :, j]
    else:
        p = _read(full, u)
        p = p if chosen[0] is None else p + chosen[0]
        y = full + _write(weight * changed(p, chosen, gain, gated, length).phi, v)
    return (y * kept_norm(full, y) if norm else y).to(x.dtype), p, length


def formula_backward(
    g: Tensor,
    x: Tensor | None,
    read: Tensor,
    write: Tensor,
    weight: Tensor,
    slots: Tensor | None,
    numbers: Numbers,
    options: Options,
    p: Tensor,
    length: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, q, dy) from what the forward pass has read."""
    gain, _, gated, norm = options
    wide = torch.promote_types(g.dtype, torch.float32)
    u, v = picked(read, slots).to(wide), picked(write, slots).to(wide)
    here = changed(p, tuple(None if one is None else picked(one, slots).to(wide) for one in numbers), gain, gated, length)
    w = inside(weight, slots, slots_in(read, write, numbers)).unsqueeze(-1)
    dy = base = g.to(wide)
    if norm and x is not None:
        full = x.to(wide)
        y = full + _write(w * here.phi, v)
        hn, yn = (torch.linalg.vector_norm(one, dim=-1, keepdim=True) for one in (full, y))
        safe, gy = torch.where(yn > 0, yn, 1), (base * y).sum(-1, keepdim=True)
        dy = (base - gy / safe.square() * y) * (hn / safe)
        base = dy + gy / (torch.where(hn > 0, hn, 1) * safe) * full
    q = _read(dy, v)
    return (base + _write(w * slope(here) * q, u)).to(g.dtype), q, dy


def slope(here: Change) -> Tensor:
    """d phi / d p."""
    free = torch.zeros_like(here.z) + here.slope
    for held in (here.under, here.over):
        free = free if held is None else torch.where(held, -1, free)
    return free if here.on is None else torch.where(here.on, free, 0)


def _read(x: Tensor, u: Tensor) -> Tensor:
    """x [batch, tokens, width] on u [batch or 1, tokens or 1, M, width]: [batch, tokens, M]. Autocast would round it to bf16."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ u[:, 0].mT if u.shape[1] == 1 else (u @ x.unsqueeze(-1)).squeeze(-1)


def _write(phi: Tensor, v: Tensor) -> Tensor:
    with torch.autocast(phi.device.type, enabled=False):
        return phi @ v[:, 0] if v.shape[1] == 1 else (phi.unsqueeze(-2) @ v).squeeze(-2)
