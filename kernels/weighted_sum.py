"""Gradients of banks of vectors: weighted sums of activations over the tokens of each slot.

Mathematics: out[s, m] = sum over tokens t with slot(t) = s of c[t, m] * x[t], the gradient of y[t] = sum_m c[t, m] v[slot(t), m] with
respect to v, for x = dL/dy.

Shapes: x [batch, tokens, D] in any float dtype and row stride, c [batch, tokens, M] fp32, slots [batch, 1 or tokens]; out [slots, M, D]
fp32.

Bytes per token: 2 D read once for M = 1 in bf16 (the M programs on one tile follow one another, so that the others find it in the L2
cache), and nothing written but the sums. A call costs slots x tokens looks at slot numbers, which are read in tiles of 32.

Deterministic: no atomics; each program adds its tokens in order, and the partial sums of the programs are added in order. The division of
work depends on shapes alone, so the bits are the same on every GPU of one kind.

Source: the transpose of an embedding bag; the division into partial sums is that of the weight gradient of Liger Kernel's RMSNorm (Hsu et
al. 2024, arXiv 2410.10989, section 3.2).
"""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer.kernels.jit import jit
from steer.kernels.layout import power_of_two, readable, strides

if TYPE_CHECKING:
    import triton.language as tl

TILE = 32  # tokens that a program looks at together
PROGRAMS = 512  # about four for each of the 132 multiprocessors of a H100


def reference(x: Tensor, c: Tensor, slots: Tensor | None, count: int) -> Tensor:
    """The sums in plain PyTorch, in the precision of fp32 at least."""
    wide = torch.promote_types(x.dtype, c.dtype)
    chosen = torch.zeros(x.shape[0], 1, dtype=torch.long, device=x.device) if slots is None else slots
    member = (chosen[..., None] == torch.arange(count, device=x.device)).to(wide)
    return torch.einsum("bts,btm,btd->smd", member.expand(*x.shape[:2], count), c.to(wide), x.to(wide))


@jit
def _sum(
    x, c, slots, out, tokens, batch_tokens, x_b, x_t, c_b, c_t, slots_b, slots_t,
    D: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (which vector, which part of the tokens, which columns)."""
    which = tl.program_id(0)
    slot, m = which // M, which % M
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((TILE, BLOCK), tl.float32)
    for step in range(STEPS):
        token = (tl.program_id(1) * STEPS + step) * TILE + tl.arange(0, TILE)
        b, t = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
        mine = token < batch_tokens
        if slots is not None:
            mine = mine & (tl.load(slots + b * slots_b + t * slots_t, mask=mine, other=-1) == slot)
        if tl.max(mine.to(tl.int32), 0) > 0:
            share = tl.load(c + b * c_b + t * c_t + m, mask=mine, other=0.0)
            at = (b * x_b + t * x_t)[:, None] + d[None, :]
            sums += share[:, None] * tl.load(x + at, mask=mine[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    place = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + which) * D
    tl.store(out + place + d, tl.sum(sums, 0), mask=d < D)


def plan(tokens: int, vectors: int, width: int) -> tuple[int, int, int]:
    """(columns of a program, parts of the tokens, tiles of a part); a power of two of tiles, so that few kernels are compiled."""
    block = min(power_of_two(width), 256)
    columns = -(-width // block)
    tiles = -(-tokens // TILE)
    parts = max(1, min(-(-tiles // 8), PROGRAMS // (vectors * columns)))
    steps = power_of_two(-(-tiles // parts))
    return block, -(-tiles // steps), steps


def weighted_sum(x: Tensor, c: Tensor, slots: Tensor | None, count: int) -> Tensor:
    """Sums of x weighted by c over the tokens of each slot, [count, M, D] fp32, on a GPU; see the top of this file."""
    (batch, tokens, width), m = x.shape, c.shape[-1]
    if slots is None and count > 1:  # all tokens have the first slot
        return torch.cat([weighted_sum(x, c, None, 1), torch.zeros(count - 1, m, width, dtype=torch.float32, device=x.device)])
    x, c = readable(x), readable(c.float())
    block, parts, steps = plan(batch * tokens, count * m, width)
    out = torch.empty(parts, count, m, width, dtype=torch.float32, device=x.device)
    _sum.launch(
        (count * m, parts, -(-width // block)),
        x, c, slots, out, tokens, batch * tokens, x.stride(0), x.stride(1), *strides(c), *strides(slots),
        width, m, steps, TILE, block,
        num_warps=4,
    )  # fmt: skip
    return out.sum(0)
