"""Top-k encoding: the k largest pre-activations of each token, without those of all features in memory.

Mathematics: p_j = x . W_j + b_j over all features j, and of these the k largest. Of equal ones those with lower indices are taken. A nan is
larger than everything, as in torch.topk, so that a token with one has it among its values.

    dx = sum_i dv_i W[f_i]          dW[f] = sum over (t, i) with f_ti = f of dv_ti x_t          db[f] = sum of the same dv_ti

which are the products of `sparse_decode`. Which features are taken has no gradient.

Shapes: x [..., width], W [features, width], b [features]; values [..., k] fp32, indices [..., k] int64, growing along the last dimension.

Streaming: features come in tiles of 8,192. The product of a tile is a library's, since a kernel of our own would have to reach 86 % of its
speed to gain anything (the epilogue saves 14 % of the time at 65,536 features); then one program for each token merges it with the k that
it has: the k-th largest of both by bisection over the bits of the numbers, in registers, and what is above it moved together. Exact,
whatever the numbers: there is no candidate list that could be too short.

Bytes per token: 8 for each feature, its pre-activation written and read once in fp32; 24 k for each tile. Memory: tokens x 8,192
pre-activations, whatever the number of features, for 2,048 tokens at a time.

Deterministic: no atomics, and no choice among equals. Sources: bisection for a threshold is the radix selection of torch.topk; encoding
without the whole matrix is from arXiv 2406.04093, its tiles are not.
"""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from steer.errors import ConfigError, WidthError
from steer.kernels.available import KERNELS
from steer.kernels.dispatch import choose_path, forced, needs_pytorch_operations, runs_kernel
from steer.kernels.layout import next_power_of_2
from steer.kernels.lazy_triton import tl, triton
from steer.kernels.sparse_decode import times, transposed_times, wanted_gradients
from steer.kernels.sparse_pattern import SparsePattern

TILE_SIZE = 8192  # features at a time: 16 numbers for each thread of 16 warps
MAX_NUMEL = 1 << 24  # pre-activations at a time
MAX_K = 1024  # the k of a token are held in registers beside the tile


class TopFeatures(NamedTuple):
    """The largest pre-activations of each token.

    Example:
        >>> top = steer.kernels.topk_encode(torch.randn(2, 7, 32), torch.randn(100, 32), None, k=4)
        >>> top.values.shape, top.indices.shape
        (torch.Size([2, 7, 4]), torch.Size([2, 7, 4]))
    """

    values: Tensor  # [..., k]
    indices: Tensor  # [..., k] int64, growing


@triton.jit
def _sortable(x):
    """Whole numbers in the order of floats, as uint32: nan above everything, -0 the same as 0. 0 is the number of no float."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == 0, 0, bits)
    bits = tl.where(x != x, 0x7FC00000, bits)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _merge_kernel(
    pre_ptr, old_values_ptr, old_indices_ptr, values_ptr, indices_ptr, n_columns, n_old, n_new, first,
    BLOCK_K: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The n_new largest of a token's n_old and of n_columns pre-activations, which are of features from `first` on."""
    row = tl.program_id(0).to(tl.int64)
    column, place = tl.arange(0, BLOCK_SIZE), tl.arange(0, BLOCK_K)
    pre = tl.load(pre_ptr + row * n_columns + column, mask=column < n_columns, other=0.0)
    old = tl.load(old_values_ptr + row * n_old + place, mask=place < n_old, other=0.0)
    old_index = tl.load(old_indices_ptr + row * n_old + place, mask=place < n_old, other=0)
    key = tl.where(column < n_columns, _sortable(pre), 0)
    old_key = tl.where(place < n_old, _sortable(old), 0)
    kth = tl.zeros((1,), tl.uint32)  # the largest number that n_new keys reach
    for bit in range(32):
        higher = kth | (tl.full((1,), 1, tl.uint32) << (31 - bit))
        count = tl.sum((key >= higher).to(tl.int32), 0) + tl.sum((old_key >= higher).to(tl.int32), 0)
        kth = tl.where(count >= n_new, higher, kth)
    is_old, is_kept = old_key > kth, key > kth
    wanted = n_new - tl.sum(is_old.to(tl.int32), 0) - tl.sum(is_kept.to(tl.int32), 0)  # of those that are equal to it, the first ones
    old_ties, ties = (old_key == kth).to(tl.int32), (key == kth).to(tl.int32)
    is_old = is_old | ((old_ties > 0) & (tl.cumsum(old_ties, 0) <= wanted))
    is_kept = is_kept | ((ties > 0) & (tl.sum(old_ties, 0) + tl.cumsum(ties, 0) <= wanted))
    to = row * n_new + tl.cumsum(is_old.to(tl.int32), 0) - 1
    tl.store(values_ptr + to, old, mask=is_old)
    tl.store(indices_ptr + to, old_index, mask=is_old)
    to = row * n_new + tl.sum(is_old.to(tl.int32), 0) + tl.cumsum(is_kept.to(tl.int32), 0) - 1
    tl.store(values_ptr + to, pre, mask=is_kept)
    tl.store(indices_ptr + to, (first + column).to(tl.int64), mask=is_kept)


def launch_merge(pre: Tensor, old: TopFeatures, first: int, k: int) -> TopFeatures:
    """The k largest of those so far and of a tile of pre-activations, or all while they are fewer; values in fp32."""
    (tokens, columns), n_old = pre.shape, old.values.shape[1]
    n_new = min(k, n_old + columns)
    values = torch.empty((tokens, n_new), dtype=torch.float32, device=pre.device)
    indices = torch.empty((tokens, n_new), dtype=torch.int64, device=pre.device)
    if tokens:
        block_size = max(next_power_of_2(columns), 16)
        _merge_kernel[(tokens,)](
            pre_ptr=pre.contiguous(),
            old_values_ptr=old.values,
            old_indices_ptr=old.indices,
            values_ptr=values,
            indices_ptr=indices,
            n_columns=columns,
            n_old=n_old,
            n_new=n_new,
            first=first,
            BLOCK_K=max(next_power_of_2(k), 16),
            BLOCK_SIZE=block_size,
            num_warps=min(max(block_size // 512, 1), 16),
        )
    return TopFeatures(values, indices)


def merge_reference(pre: Tensor, old: TopFeatures, first: int, k: int) -> TopFeatures:
    """The same in PyTorch operations."""
    candidates = torch.cat([old.values, pre], 1)
    places = largest(candidates, min(k, candidates.shape[1]))
    n_old = old.values.shape[1]
    indices = torch.cat([old.indices, torch.arange(first, first + pre.shape[1], device=pre.device).expand(len(pre), -1)], 1)
    return (
        TopFeatures(candidates.gather(1, places), indices.gather(1, places))
        if n_old
        else TopFeatures(candidates.gather(1, places), places + first)
    )


def largest(x: Tensor, k: int) -> Tensor:
    """[rows, k] places of the k largest numbers of each row, growing; of equal ones the first."""
    if torch.compiler.is_compiling() or x.numel() == 0:
        return x.sort(stable=True, dim=1, descending=True).indices[:, :k].sort(1).values
    values, places = x.topk(k, 1, sorted=False)
    # which of equal ones topk takes is not said: where there are more than fit, as for a nan, rows are sorted
    is_tied = (~(x < values.amin(1, keepdim=True))).sum(1) > k
    if bool(is_tied.any()):
        places[is_tied] = x[is_tied].sort(stable=True, dim=1, descending=True).indices[:, :k]
    return places.sort(1).values


def select(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> TopFeatures:
    """The k largest of x [tokens, width] in the form that runs, tile by tile."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    by_kernel = runs_kernel(x) and dtype is torch.float32 and k <= MAX_K
    merge = launch_merge if by_kernel else merge_reference
    tile_size = min(TILE_SIZE, len(weight))
    parts = []
    for part in x.split(max(1, MAX_NUMEL // tile_size)) if len(x) else [x]:
        best = TopFeatures(part.new_empty((len(part), 0), dtype=dtype), part.new_empty((len(part), 0), dtype=torch.int64))
        for first in range(0, len(weight), tile_size):
            rows = weight[first : first + tile_size].to(dtype)
            pre = linear(part.to(dtype), rows, None if bias is None else bias[first : first + tile_size].to(dtype))
            best = merge(pre, best, first, k)
        parts.append(best)
    return parts[0] if len(parts) == 1 else TopFeatures(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class TopKEncode(torch.autograd.Function):
    """`select`, with the gradients of what was selected; a second time by PyTorch operations, with [tokens, k, width] in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        values, indices = select(x, weight, bias, k)
        ctx.save_for_backward(x, weight, bias, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, indices = ctx.saved_tensors
        if torch.is_grad_enabled():
            values = (x.unsqueeze(1) * weight[indices]).sum(-1).to(g.dtype)
            values = values if bias is None else values + bias[indices]
            return *wanted_gradients(values, g, (x, weight, bias), ctx.needs_input_grad[:3]), None
        return *gradients(g, x, weight, bias, indices, *ctx.needs_input_grad[:3]), None


def gradients(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, weight and bias, where they are wanted. g: [tokens, k] that of the values."""
    pattern, g = SparsePattern.of_rows(indices, len(weight)), g.reshape(-1)
    d_bias = transposed_times(pattern, g, x.new_ones(len(x), 1))[:, 0] if of_bias and bias is not None else None
    return (
        times(pattern, g, weight).to(x.dtype) if of_x else None,
        transposed_times(pattern, g, x).to(weight.dtype) if of_weight else None,
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def topk_encode_reference(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> TopFeatures:
    """The same in PyTorch operations that a compiler can follow, of all features at once."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    pre = linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    places = largest(pre.detach(), k)
    return TopFeatures(pre.gather(1, places), places)


@torch.library.custom_op("steer::topk_encode", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias, int k) -> (Tensor, Tensor)")
def _topk_encode(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    values, indices = select(x, weight, bias, k)
    return values, indices


@_topk_encode.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return x.new_empty((len(x), k), dtype=dtype), x.new_empty((len(x), k), dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """Of what was selected, as the gather of a compiler would: PyTorch operations and the operator of sparse decoding."""
    x, weight, bias, indices = ctx.saved_tensors
    of_x, of_weight, of_bias, _ = ctx.needs_input_grad
    d_x = torch.ops.steer.sparse_decode(g, indices, weight).to(x.dtype) if of_x else None
    d_weight = torch.ops.steer.sparse_decode_backward(x, g, indices, weight, False, True)[1] if of_weight else None
    ones = x.new_ones(len(x), 1)
    like = weight.new_empty(len(weight), 1)
    d_bias = torch.ops.steer.sparse_decode_backward(ones, g, indices, like, False, True)[1][:, 0] if of_bias else None
    return d_x, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None


_topk_encode.register_autograd(_differentiate, setup_context=_setup_context)


@KERNELS.register("topk_encode")
def topk_encode(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> TopFeatures:
    """The k largest of x @ weight.T + bias for each token, exactly, in memory that does not depend on the number of features.

    Args:
        x: [..., width]. weight: [features, width]. bias: [features] or None. All are differentiable.
        k: at least 1 and at most the number of features.

    Returns:
        values [..., k] in fp32 at least and their indices [..., k], which grow. Of equal ones the lower indices are taken; nan is the
        largest of all.

    Raises:
        WidthError: shapes that do not fit. ConfigError: a k that cannot be.

    Example:
        >>> values, indices = topk_encode(torch.randn(2, 7, 32), torch.randn(100, 32), None, k=4)
        >>> values.shape, bool((indices.diff() > 0).all())
        (torch.Size([2, 7, 4]), True)
    """
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise _shape_error(x, weight, bias)
    if not 1 <= k <= len(weight):
        raise _k_error(k, len(weight))
    path = choose_path(x, opaque=True)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        if path == "aten" and (torch.compiler.is_compiling() or forced() == "aten" or needs_pytorch_operations(x)):
            values, indices = topk_encode_reference(flat, weight, bias, k)
        elif path == "op":
            values, indices = torch.ops.steer.topk_encode(flat, weight, bias, k)
        else:
            values, indices = TopKEncode.apply(flat, weight, bias, k)
    return TopFeatures(values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k))


# ---- errors


def _shape_error(x: Tensor, weight: Tensor, bias: Tensor | None) -> WidthError:
    return WidthError(
        "the encoder does not fit the activations",
        expected=f"a weight [features, {x.shape[-1] if x.dim() else '?'}] and a bias [features] or none",
        found=f"{list(weight.shape)} and {'none' if bias is None else list(bias.shape)}",
        remedy="pass the rows of an encoder for this site; torch.nn.Linear has them as they are needed",
    )


def _k_error(k: int, features: int) -> ConfigError:
    return ConfigError(
        "k does not fit the encoder", expected=f"1 to {features}, its number of features", found=k, remedy="choose a k among these"
    )
