"""Sparse decoding: the sum of the decoder rows of the features that are on, with the gradients of values and rows.

Mathematics, over the entries i of a sparse matrix, feature f_i with value v_i at token t_i:

    out[t] = sum over i with t_i = t of v_i W[f_i]          dv_i = g[t_i] . W[f_i]          dW[f] = sum over i with f_i = f of v_i g[t_i]

out and dW are one kernel: rows gathered by a list, weighted and added up, for each token or for each feature. For dW the entries are
sorted by feature.

Shapes: v [..., k], f [..., k], W [features, width] give out [..., width]; or any number of entries for each token, as a `SparsePattern`.
Rows may lie apart; offsets are in int64. Sums are in fp32, and so is the result.

Bytes per token in bf16, for k features: forward 2 k width read and 4 width written; dv 2 k width read and g again from the cache; dW
2 k width read, and 4 width written for each feature, whether it is on or not. Dense decoding reads nothing but W, features / k times as
many products: at 65,536 features, 64 of them on, 1,000 times.

Deterministic: no atomics; each program adds up its entries in order of tokens. A feature that is on everywhere is one program for each
block of columns, which then takes as long as all its tokens one after the other. An index that is in no row of W is refused, except in
compiled code and under the capture of a CUDA graph, where nobody can look: nothing is read for it, and it adds nothing.

Sources: the sparse kernels of Gao et al. (2024, arXiv 2406.04093), which add dW by atomics; here it is the segment sum of an embedding bag.
"""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.errors import ConfigError, WidthError
from steer.kernels.available import KERNELS
from steer.kernels.dispatch import choose_path, forced, needs_pytorch_operations, runs_kernel
from steer.kernels.layout import contiguous_rows, next_power_of_2
from steer.kernels.lazy_triton import tl, triton
from steer.kernels.sparse_pattern import SparsePattern, entries_reference, times_reference, transposed_times_reference

TILE_NUMBERS = 4096  # of the gathered rows that a program holds: 32 for each thread of 4 warps, in loads of 128 bits
MAX_BLOCK_SIZE = 512  # columns of a program
MAX_TILE_SIZE = 16  # entries that it takes in a step


@triton.jit
def _gather_sum_kernel(
    matrix_ptr, values_ptr, place_ptr, order_ptr, starts_ptr, out_ptr, n_places, matrix_stride,
    WIDTH: tl.constexpr, TILE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """out[row] = sum of values * matrix[place] over the entries of a row; program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    sums = tl.zeros((TILE_SIZE, BLOCK_SIZE), tl.float32)
    for start in range(begin, end, TILE_SIZE):
        entry = start + tl.arange(0, TILE_SIZE)
        is_there = entry < end
        if order_ptr is not None:
            entry = tl.load(order_ptr + entry, mask=is_there, other=0)
        place = tl.load(place_ptr + entry, mask=is_there, other=-1)
        is_there = (place >= 0) & (place < n_places)
        value = tl.load(values_ptr + entry, mask=is_there, other=0.0).to(tl.float32)
        offsets = (place * matrix_stride)[:, None] + d[None, :]
        rows = tl.load(matrix_ptr + offsets, mask=is_there[:, None] & (d < WIDTH)[None, :], other=0.0)  # [TILE_SIZE, BLOCK_SIZE]
        sums += value[:, None] * rows.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + d, tl.sum(sums, 0), mask=d < WIDTH)


@triton.jit
def _entries_kernel(
    left_ptr, right_ptr, token_ptr, feature_ptr, out_ptr, n_entries, n_features, left_stride, right_stride,
    WIDTH: tl.constexpr, TILE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """out[i] = left[token i] . right[feature i]; one program for each tile of entries."""
    entry = tl.program_id(0).to(tl.int64) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    token = tl.load(token_ptr + entry, mask=entry < n_entries, other=0)
    feature = tl.load(feature_ptr + entry, mask=entry < n_entries, other=-1)
    is_there = (feature >= 0) & (feature < n_features)
    sums = tl.zeros((TILE_SIZE, BLOCK_SIZE), tl.float32)
    for start in range(0, WIDTH, BLOCK_SIZE):
        d = start + tl.arange(0, BLOCK_SIZE)
        mask = is_there[:, None] & (d < WIDTH)[None, :]
        left = tl.load(left_ptr + (token * left_stride)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        right = tl.load(right_ptr + (feature * right_stride)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += left * right
    tl.store(out_ptr + entry, tl.sum(sums, 1), mask=entry < n_entries)


def _tile(width: int) -> dict[str, int]:
    block_size = min(next_power_of_2(width), MAX_BLOCK_SIZE)
    return {"TILE_SIZE": min(max(TILE_NUMBERS // block_size, 1), MAX_TILE_SIZE), "BLOCK_SIZE": block_size, "num_warps": 4}


def launch_gather_sum(matrix: Tensor, values: Tensor, places: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
    """[len(starts) - 1, width] fp32 sums of rows of a matrix.

    Args:
        values, places: [n] weight and row of each entry. order: [n] in which they are taken; None as they are.
        starts: where the entries of each sum begin.
    """
    matrix = contiguous_rows(matrix)
    n_rows, width = len(starts) - 1, matrix.shape[1]
    out = torch.empty((n_rows, width), dtype=torch.float32, device=matrix.device)
    tile = _tile(width)
    if out.numel():
        _gather_sum_kernel[(n_rows, -(-width // tile["BLOCK_SIZE"]))](
            matrix_ptr=matrix,
            values_ptr=values.contiguous(),
            place_ptr=places.contiguous(),
            order_ptr=order,
            starts_ptr=starts,
            out_ptr=out,
            n_places=len(matrix),
            matrix_stride=matrix.stride(0),
            WIDTH=width,
            **tile,
        )
    return out


def launch_entries(pattern: SparsePattern, left: Tensor, right: Tensor) -> Tensor:
    """[n] fp32 products of the rows of each entry."""
    left, right = contiguous_rows(left), contiguous_rows(right)
    out = torch.empty((len(pattern),), dtype=torch.float32, device=left.device)
    tile = _tile(left.shape[1])
    if len(pattern):
        _entries_kernel[(-(-len(pattern) // tile["TILE_SIZE"]),)](
            left_ptr=left,
            right_ptr=right,
            token_ptr=pattern.token.contiguous(),
            feature_ptr=pattern.feature.contiguous(),
            out_ptr=out,
            n_entries=len(pattern),
            n_features=len(right),
            left_stride=left.stride(0),
            right_stride=right.stride(0),
            WIDTH=left.shape[1],
            **tile,
        )
    return out


# ---- the three products, in the form that runs


def times(pattern: SparsePattern, values: Tensor, matrix: Tensor) -> Tensor:
    """values @ matrix: [tokens, features] @ [features, width] -> [tokens, width], fp32 at least."""
    if runs_kernel(values, matrix):
        return launch_gather_sum(matrix, values, pattern.feature, None, pattern.token_starts)
    return times_reference(pattern, *_widened(values, matrix))


def transposed_times(pattern: SparsePattern, values: Tensor, matrix: Tensor) -> Tensor:
    """values.T @ matrix: [features, tokens] @ [tokens, width] -> [features, width], fp32 at least."""
    if runs_kernel(values, matrix):
        order, starts = pattern.by_feature
        return launch_gather_sum(matrix, values, pattern.token, order, starts)
    return transposed_times_reference(pattern, *_widened(values, matrix))


def entries(pattern: SparsePattern, left: Tensor, right: Tensor) -> Tensor:
    """[n] entries of left @ right.T, [tokens, width] and [features, width], at the places of the pattern alone; fp32 at least."""
    if runs_kernel(left, right):
        return launch_entries(pattern, left, right)
    return entries_reference(pattern, *_widened(left, right))


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In one dtype, fp32 at least."""
    dtype = torch.promote_types(torch.promote_types(tensors[0].dtype, tensors[1].dtype), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


class SparseDecode(torch.autograd.Function):
    """values @ weight over a pattern, differentiable in both; a second time by PyTorch operations, with [n, width] in memory."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, pattern: SparsePattern) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.pattern = pattern
        return times(pattern, values, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            wide_values, wide_weight = _widened(values, weight)
            rows = wide_values[:, None] * wide_weight[ctx.pattern.feature]  # [n, width]
            out = g.new_zeros(g.shape).index_add(0, ctx.pattern.token, rows)
            return *wanted_gradients(out, g, (values, weight), ctx.needs_input_grad[:2]), None
        of_values, of_weight = gradients(g, values, weight, ctx.pattern, *ctx.needs_input_grad[:2])
        return of_values, of_weight, None


def gradients(
    g: Tensor, values: Tensor, weight: Tensor, pattern: SparsePattern, of_values: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the values, [n], and of the weight, where they are wanted."""
    d_values = entries(pattern, g, weight).to(values.dtype) if of_values else None
    d_weight = transposed_times(pattern, values, g).to(weight.dtype) if of_weight else None
    return d_values, d_weight


def wanted_gradients(out: Tensor, g: Tensor, inputs: tuple[Any, ...], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of some inputs that can be differentiated again, None for the others."""
    slopes = iter(torch.autograd.grad(out, [x for x, is_wanted in zip(inputs, wanted, strict=True) if is_wanted], g, create_graph=True))
    return tuple(next(slopes) if is_wanted else None for is_wanted in wanted)


def decode_pattern(values: Tensor, weight: Tensor, pattern: SparsePattern) -> Tensor:
    """[tokens, width] values @ weight, differentiable in both. values: [n] of the entries. weight: [features, width]."""
    with torch.autocast(weight.device.type, enabled=False):
        result: Tensor = SparseDecode.apply(values, weight, pattern)
    return result


def sparse_decode_reference(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """The same in PyTorch operations that a compiler can follow; Inductor makes one kernel of them. Eagerly they make [..., k, width]."""
    values, weight = _widened(values, weight)
    is_there = (indices >= 0) & (indices < len(weight))
    rows = weight[torch.where(is_there, indices, 0)]  # [..., k, width]
    return (torch.where(is_there, values, 0).unsqueeze(-1) * torch.where(is_there.unsqueeze(-1), rows, 0)).sum(-2)


@torch.library.custom_op("steer::sparse_decode", mutates_args=(), schema="(Tensor values, Tensor indices, Tensor weight) -> Tensor")
def _sparse_decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    if not runs_kernel(values, weight):
        return sparse_decode_reference(values, indices, weight)
    return times(SparsePattern.of_rows(indices, len(weight)), values.reshape(-1), weight)


@_sparse_decode.register_fake
def _(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(values.dtype, weight.dtype), torch.float32)
    return values.new_empty(len(values), weight.shape[1], dtype=dtype)


@torch.library.custom_op(
    "steer::sparse_decode_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor values, Tensor indices, Tensor weight, bool of_values, bool of_weight) -> (Tensor, Tensor)",
)
def _sparse_decode_backward(
    g: Tensor, values: Tensor, indices: Tensor, weight: Tensor, of_values: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    flat = values.reshape(-1)
    if not runs_kernel(values, weight):  # an index that is in no row has no part in a CSR matrix
        is_there = ((indices >= 0) & (indices < len(weight))).reshape(-1)
        pattern = SparsePattern.of_rows(torch.where(is_there.view_as(indices), indices, 0), len(weight))
        d_values, d_weight = gradients(g, torch.where(is_there, flat, 0), weight, pattern, of_values, of_weight)
        d_values = None if d_values is None else torch.where(is_there, d_values, 0)
    else:
        pattern = SparsePattern.of_rows(indices, len(weight))
        d_values, d_weight = gradients(g, flat, weight, pattern, of_values, of_weight)
    return (
        values.new_empty(0) if d_values is None else d_values.view(values.shape),
        weight.new_empty(0) if d_weight is None else d_weight,
    )


@_sparse_decode_backward.register_fake
def _(g: Tensor, values: Tensor, indices: Tensor, weight: Tensor, of_values: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape if of_values else (0,)), weight.new_empty(weight.shape if of_weight else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    of_values, _, of_weight = ctx.needs_input_grad
    d_values, d_weight = torch.ops.steer.sparse_decode_backward(g, *ctx.saved_tensors, of_values, of_weight)
    return d_values if of_values else None, None, d_weight if of_weight else None


_sparse_decode.register_autograd(_differentiate, setup_context=_setup_context)


@KERNELS.register("sparse_decode")
def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """sum_i values_i * weight[indices_i]: decodes k features of each token at the cost of k rows, [..., width] in fp32 at least.

    Args:
        values: [..., k], differentiable. indices: [..., k] whole numbers; an index twice counts twice.
        weight: [features, width], differentiable: its gradient is dense, and has the same bits every time.

    Raises:
        ConfigError: indices that are no rows of the weight, or do not fit the values. WidthError: a weight of another shape.

    Example:
        >>> sparse_decode(torch.rand(2, 7, 4), torch.randint(100, (2, 7, 4)), torch.randn(100, 32)).shape
        torch.Size([2, 7, 32])
    """
    if weight.dim() != 2:
        raise _weight_error(weight)
    if values.shape != indices.shape or values.dim() == 0 or indices.is_floating_point() or indices.dtype is torch.bool:
        raise _indices_error(values, indices)
    path = choose_path(weight, opaque=True)
    if not torch.compiler.is_compiling():
        check_range(indices, len(weight))
    if path == "aten" and (torch.compiler.is_compiling() or forced() == "aten" or needs_pytorch_operations(values)):
        return sparse_decode_reference(values, indices, weight)
    lead, k = values.shape[:-1], values.shape[-1]
    values, indices = values.reshape(lead.numel(), k), indices.reshape(lead.numel(), k)
    if path == "op":
        out = torch.ops.steer.sparse_decode(values, indices, weight)
    else:
        out = decode_pattern(values.reshape(-1), weight, SparsePattern.of_rows(indices, len(weight)))
    return out.view(*lead, weight.shape[1])


def check_range(indices: Tensor, features: int) -> None:
    """Raises ConfigError for an index outside 0 to features - 1; while a CUDA graph is captured nobody can look."""
    if indices.numel() == 0 or (indices.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    least, most = (int(bound) for bound in torch.aminmax(indices))
    if least < 0 or most >= features:
        raise _range_error(least, most, features)


# ---- errors


def _weight_error(weight: Tensor) -> WidthError:
    return WidthError(
        "the decoder does not fit features",
        expected="[features, width]",
        found=list(weight.shape),
        remedy="pass its rows; torch.nn.Linear has them the other way round",
    )


def _indices_error(values: Tensor, indices: Tensor) -> ConfigError:
    return ConfigError(
        "indices do not fit the values of features",
        expected=f"whole numbers {list(values.shape)}, the feature of each value",
        found=f"{indices.dtype} {list(indices.shape)}",
        remedy="pass both as topk_encode returns them",
    )


def _range_error(least: int, most: int, features: int) -> ConfigError:
    return ConfigError(
        "an index of a feature is outside the decoder",
        expected=f"0 to {features - 1}",
        found=f"{least} to {most}",
        remedy="use the decoder of the dictionary that the features are of",
    )
