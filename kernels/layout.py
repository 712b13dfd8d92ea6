"""Shapes that all kernels share: activations as [batch, tokens, width], weights and slots per token, and the checks of both.

A kernel reads memory by address, so a tensor that does not have the promised shape must not reach it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.errors import ConfigError, WidthError


def as_3d(h: Tensor) -> Tensor:
    """View of an activation of any dimension as [batch, tokens, width]; its first dimension is the batch."""
    if h.dim() == 3:
        return h
    if h.dim() < 2:
        return h.view(1, 1, -1)  # [width] -> [1, 1, width]
    return h.unsqueeze(1) if h.dim() == 2 else h.reshape(h.shape[0], h[0, ..., 0].numel(), h.shape[-1])


def token_weights(h: Tensor, strength: Tensor | float, mask: Tensor | None) -> Tensor:
    """strength x mask, the factor of each token's change: [batch or 1, tokens or 1], fp32 (fp64 for a mask in fp64)."""
    weight = _per_token(strength, h, "strength")
    weight = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
    return weight if mask is None else weight * _per_token(mask, h, "mask")


def _per_token(value: Tensor | float, h: Tensor, what: str) -> Tensor:
    """[batch or 1, tokens or 1] of a number, or of a tensor that broadcasts to the shape of h with 1 for the width."""
    if not isinstance(value, Tensor):
        return torch.full((1, 1), float(value), dtype=torch.float32, device=h.device)
    if value.dim() == 0:
        return value.view(1, 1)
    shape = (*h.shape[:-1], 1)
    if value.dim() > len(shape) or any(size not in (1, full) for size, full in zip(value.shape[::-1], shape[::-1], strict=False)):
        raise _per_token_error(value, shape, what)
    if h.dim() == value.dim() == 3:
        return value.squeeze(-1)
    return as_3d(value.expand(shape)).squeeze(-1)


def slots_as_2d(slots: Tensor | None, h: Tensor) -> Tensor | None:
    """Slots of rows as [batch, 1], slots of tokens as [batch, tokens]."""
    if slots is None:
        return None
    batch = as_3d(h).shape[0]
    by_row = slots.dim() == 1 and slots.shape[0] == batch
    if slots.is_floating_point() or not (by_row or slots.shape == h.shape[:-1]):
        raise _slots_error(slots, h)
    return slots.reshape(batch, -1)


def is_per_token(slots: Tensor | None) -> bool:
    """Tokens of a row have different slots."""
    return slots is not None and slots.shape[1] > 1


def bank_with_slots(bank: Tensor, dims: int, h: Tensor, what: str) -> Tensor:
    """A bank of vectors as `dims` dimensions, slots first and width last. Raises WidthError when it does not fit the activation."""
    bank = bank[None] if bank.dim() == dims - 1 else bank
    if bank.dim() != dims or 0 in bank.shape or bank.shape[-1] != h.shape[-1] or bank.device != h.device:
        raise _bank_error(bank, dims, h, what)
    return bank


def gather_slots(bank: Tensor, slots: Tensor | None) -> Tensor:
    """Entries of a bank for each row or token, [batch or 1, tokens or 1, ...]; a slot out of range gets any entry that exists."""
    if slots is None or bank.shape[0] == 1:
        return bank[:1, None]
    return bank[slots.clamp(0, bank.shape[0] - 1)]


def zero_unknown_slots(weight: Tensor, slots: Tensor | None, n_slots: int) -> Tensor:
    """The weights, 0 where the slot is out of range."""
    return weight if slots is None else torch.where((slots >= 0) & (slots < n_slots), weight, 0)


def broadcast_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides from row to row and from token to token, 0 in a dimension of length 1."""
    if x is None:
        return 0, 0
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)


def slot_stride(bank: Tensor) -> int:
    """Stride from slot to slot, 0 in a bank of one slot."""
    return bank.stride(0) if bank.shape[0] > 1 else 0


def contiguous_rows(x: Tensor) -> Tensor:
    """The tensor, or a copy of it when the numbers of a token do not lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_output(x: Tensor) -> Tensor:
    """Contiguous memory for a result of the shape and dtype of x."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def sum_to_broadcast(x: Tensor, like: Tensor) -> Tensor:
    """[batch, tokens] summed to the shape and dtype of the tensor that was broadcast to it."""
    dims = [dim for dim in (0, 1) if like.shape[dim] == 1 and x.shape[dim] > 1]
    return (x.sum(dims, keepdim=True) if dims else x).to(like.dtype)


def sum_per_slot(x: Tensor, slots: Tensor | None, n_slots: int) -> Tensor:
    """[batch, tokens, ...] summed over the tokens of each slot, [n_slots, ...]; in a fixed order, so always to the same bits."""
    if slots is None or n_slots == 1:
        in_slot = x if slots is None else torch.where((slots == 0).view(*slots.shape, *[1] * (x.dim() - 2)), x, 0)
        total = in_slot.sum((0, 1)).unsqueeze(0)  # [1, ...]
        return total if n_slots == 1 else torch.cat([total, total.new_zeros(n_slots - 1, *x.shape[2:])])
    if slots.shape[1] == 1:
        x = x.sum(1, keepdim=True)  # [batch, 1, ...]
    is_member = torch.arange(n_slots, device=x.device)[:, None] == slots.reshape(1, -1)  # [n_slots, batch * tokens]
    return (is_member.double() @ x.flatten(0, 1).flatten(1).double()).view(n_slots, *x.shape[2:]).to(x.dtype)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


# ---- errors


def _per_token_error(value: Tensor, shape: tuple[int, ...], what: str) -> ConfigError:
    return ConfigError(
        f"{what} does not fit the activation",
        expected=f"a number, or a tensor that broadcasts to {list(shape)}",
        found=list(value.shape),
        remedy="give one for all, one for each row of the batch, or one for each token, with a last dimension of 1",
    )


def _slots_error(slots: Tensor, h: Tensor) -> ConfigError:
    return ConfigError(
        "slots do not fit the activation",
        expected=f"whole numbers, [{as_3d(h).shape[0]}] for rows or {list(h.shape[:-1])} for tokens",
        found=f"{slots.dtype} {list(slots.shape)}",
        remedy="give the slot of each row of the batch, or of each of its tokens; -1 leaves a token alone",
    )


def _bank_error(bank: Tensor, dims: int, h: Tensor, what: str) -> WidthError:
    return WidthError(
        f"{what} do not fit the activation",
        expected=f"{dims - 1} dimensions, or {dims} with slots, the last one {h.shape[-1]}, on {h.device}",
        found=f"{list(bank.shape)} on {bank.device}",
        remedy="use vectors of this site, on the device of the model",
    )
