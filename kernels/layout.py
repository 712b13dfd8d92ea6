"""What the kernels of this room share on the way in: activations as [batch, tokens, width], weights and slots per token, checks.

A kernel reads memory by address, so nothing may reach it that has not the promised shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.errors import ConfigError, WidthError


def rows(h: Tensor) -> Tensor:
    """[batch, tokens, width] of an activation of any dimension; the first one is the batch."""
    if h.dim() == 3:
        return h
    if h.dim() < 2:
        return h.view(1, 1, -1)
    return h.unsqueeze(1) if h.dim() == 2 else h.reshape(h.shape[0], h[0, ..., 0].numel(), h.shape[-1])


def per_token(value: Tensor | float, h: Tensor, what: str) -> Tensor:
    """[batch or 1, tokens or 1] of a number, or of a tensor that broadcasts to the shape of h with 1 for the width."""
    if not isinstance(value, Tensor):
        return torch.full((1, 1), float(value), dtype=torch.float32, device=h.device)
    if value.dim() == 0:
        return value.view(1, 1)
    shape = (*h.shape[:-1], 1)
    fits = value.dim() <= len(shape) and all(a in (1, b) for a, b in zip(value.shape[::-1], shape[::-1], strict=False))
    if not fits:
        raise ConfigError(
            f"{what} does not fit the activation",
            expected=f"a number, or a tensor that broadcasts to {list(shape)}",
            found=list(value.shape),
            remedy="give one for all, one for each row of the batch, or one for each token, with a last dimension of 1",
        )
    if h.dim() == value.dim() == 3:
        return value.squeeze(-1)
    return rows(value.expand(shape)).squeeze(-1)


def weights(h: Tensor, strength: Tensor | float, mask: Tensor | None) -> Tensor:
    """What each token's change is multiplied by, [batch or 1, tokens or 1], fp32 (fp64 for a mask in fp64)."""
    weight = per_token(strength, h, "strength")
    weight = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
    return weight if mask is None else weight * per_token(mask, h, "mask")


def slots_of(slots: Tensor | None, h: Tensor) -> Tensor | None:
    """[batch, 1 or tokens] slots of rows or tokens."""
    if slots is None:
        return None
    x = rows(h)
    by_row = slots.dim() == 1 and slots.shape[0] == x.shape[0]
    if slots.is_floating_point() or not (by_row or slots.shape == h.shape[:-1]):
        raise ConfigError(
            "slots do not fit the activation",
            expected=f"whole numbers, [{x.shape[0]}] for rows or {list(h.shape[:-1])} for tokens",
            found=f"{slots.dtype} {list(slots.shape)}",
            remedy="give the slot of each row of the batch, or of each of its tokens; -1 leaves a token alone",
        )
    return slots.reshape(x.shape[0], -1)


def vectors(bank: Tensor, dims: int, h: Tensor, what: str) -> Tensor:
    """A bank of vectors with `dims` dimensions, slots first."""
    bank = bank[None] if bank.dim() == dims - 1 else bank
    if bank.dim() != dims or 0 in bank.shape or bank.shape[-1] != h.shape[-1] or bank.device != h.device:
        raise WidthError(
            f"{what} do not fit the activation",
            expected=f"{dims - 1} dimensions, or {dims} with slots, the last one {h.shape[-1]}, on {h.device}",
            found=f"{list(bank.shape)} on {bank.device}",
            remedy="use vectors of this site, on the device of the model",
        )
    return bank


def picked(bank: Tensor, slots: Tensor | None) -> Tensor:
    """The entries of a bank for each row or token, [batch or 1, tokens or 1, ...]; those of slots out of range are any that exist."""
    if slots is None or bank.shape[0] == 1:
        return bank[:1, None]
    return bank[slots.clamp(0, bank.shape[0] - 1)]


def inside(weight: Tensor, slots: Tensor | None, count: int) -> Tensor:
    """The weights, 0 where the slot is out of range."""
    return weight if slots is None else torch.where((slots >= 0) & (slots < count), weight, 0)


def strides(x: Tensor | None) -> tuple[int, int]:
    """Steps from row to row and from token to token, 0 where there is one for all."""
    if x is None:
        return 0, 0
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)


def readable(x: Tensor) -> Tensor:
    """The tensor, or a copy of it when the numbers of a row do not lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def blank(x: Tensor) -> Tensor:
    """Memory for a result of the shape and dtype of x, rows side by side."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def sum_to(x: Tensor, like: Tensor) -> Tensor:
    """[batch, tokens] summed to the shape and dtype of what was broadcast to it."""
    dims = [i for i in (0, 1) if like.shape[i] == 1 and x.shape[i] > 1]
    return (x.sum(dims, keepdim=True) if dims else x).to(like.dtype)


def per_slot(x: Tensor, slots: Tensor | None, count: int) -> Tensor:
    """[batch, tokens, ...] summed over the tokens of each slot, [count, ...]; in a fixed order, so always to the same bits."""
    if slots is None or count == 1:
        kept = x if slots is None else torch.where(_wide(slots == 0, x), x, 0)
        return _first(kept.sum((0, 1), keepdim=True).squeeze(0), count)
    if slots.shape[1] == 1:
        x = x.sum(1, keepdim=True)
    member = torch.arange(count, device=x.device)[:, None] == slots.reshape(1, -1)
    return (member.double() @ x.flatten(0, 1).flatten(1).double()).view(count, *x.shape[2:]).to(x.dtype)


def _wide(condition: Tensor, x: Tensor) -> Tensor:
    return condition.view(*condition.shape, *[1] * (x.dim() - 2))


def _first(x: Tensor, count: int) -> Tensor:
    return x if count == 1 else torch.cat([x, x.new_zeros(count - 1, *x.shape[1:])])


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
