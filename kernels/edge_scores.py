"""Edge scores of attribution patching for one pair of layers: the heads that write, and the q, k, v inputs that read.

Mathematics: s[h, r] = sum_t u[t, h] . r[t, r] with u[t, h] = W_O[h] dz[t, h], the change of what head h writes to the residual stream, and
r[t, r] the gradient of the metric with respect to the input of reader r (before the norm). Writers without W_O (MLPs, the embedding) give u
itself.

Shapes: dz [..., H, D], W_O [width, H D], r [..., R, width]; s [H, R] fp32. Any float dtypes and strides; offsets of rows in int64.

Which order of the products: per token, forming u and contracting it takes 2 H width (D + R) operations. Reading r through W_O first, or
summing dz x r over the tokens before W_O comes in, takes 2 R H D width, and products of W_O with the readers' weights, D x D for each pair
of heads, save nothing (2 H R D^2) and would need the norm's derivative as a correction.

Why u lies in memory for some tokens at a time: a program that formed tiles of u itself would hold 16 heads, 16 tokens and 64 columns, all
the registers of 4 warps, and read W_O and dz from the L2 cache again for each tile: H D width (1 / 16 + 1 / 64) numbers for a token, 2.6 MB
at H 32, D 128, width 4,096, where u written and read once is 1.0 MB. So the product with W_O is the library's, for as many tokens as
`max_bytes` allows, and never for all; the kernel reads u and r once and adds up [H, R] over tokens and columns in registers.

Bytes per token in bf16: 2 H D read, 4 H width written and read again, 2 R width read, and W_O once for each chunk of tokens; u is in fp32,
so that scores are exact to 2^-16. In the example with 48 readers 1.7 MB and 59 million operations on tensor cores; the PyTorch operations
widen r and W_O and move twice as much, without tensor cores. Readers of several layers can be given at once, which shares u among them,
and writers of several layers as u.

Not differentiable: scores are read, as drift statistics are. There is no backward kernel, and the result has no gradient.

Deterministic: each program adds up its share of the tokens in order, and the shares are added in order; no atomics. Sources: edge
attribution patching is arXiv 2310.10348; sums in two stages as in `weighted_sum`.
"""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from steer.errors import ConfigError, WidthError
from steer.kernels.available import KERNELS
from steer.kernels.device_functions import dot_exact
from steer.kernels.dispatch import choose_path, runs_kernel
from steer.kernels.layout import contiguous_rows, next_power_of_2
from steer.kernels.lazy_triton import tl, triton

MAX_BYTES = 1 << 26  # of u at a time: 128 tokens of 32 heads of width 4,096, whose products outlast the host's work for two launches
MAX_PROGRAMS = 264  # two for each of the 132 multiprocessors of a H100
MAX_WRITERS, MAX_READERS = 64, 128  # of a program: 64 sums for each thread of 4 warps


@triton.jit
def _contract_kernel(
    u_ptr, r_ptr, sums_ptr, n_tokens, n_writers, n_readers, u_stride_t, u_stride_w, r_stride_t, r_stride_r,
    WIDTH: tl.constexpr, TILES_PER_PART: tl.constexpr,
    BLOCK_WRITERS: tl.constexpr, BLOCK_READERS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """sums[part] += the products of a part of the tokens and columns; program (block of writers and readers, part)."""
    n_blocks: tl.constexpr = (WIDTH + BLOCK_SIZE - 1) // BLOCK_SIZE
    reader_blocks = tl.cdiv(n_readers, BLOCK_READERS)
    writer = (tl.program_id(0) // reader_blocks).to(tl.int64) * BLOCK_WRITERS + tl.arange(0, BLOCK_WRITERS)
    reader = (tl.program_id(0) % reader_blocks).to(tl.int64) * BLOCK_READERS + tl.arange(0, BLOCK_READERS)
    u_rows, r_rows = u_ptr + writer * u_stride_w, r_ptr + reader * r_stride_r
    sums = tl.zeros((BLOCK_READERS, BLOCK_WRITERS), tl.float32)
    for step in range(TILES_PER_PART):
        tile = tl.program_id(1) * TILES_PER_PART + step
        t, d = (tile // n_blocks).to(tl.int64), (tile % n_blocks) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        is_there = (d < WIDTH) & (t < n_tokens)
        r = tl.load(r_rows[:, None] + t * r_stride_t + d[None, :], mask=(reader < n_readers)[:, None] & is_there[None, :], other=0.0)
        u = tl.load(u_rows[None, :] + t * u_stride_t + d[:, None], mask=(writer < n_writers)[None, :] & is_there[:, None], other=0.0)
        sums = dot_exact(r, u, sums)  # r [BLOCK_READERS, BLOCK_SIZE], u [BLOCK_SIZE, BLOCK_WRITERS]
    offsets = (tl.program_id(1).to(tl.int64) * n_writers + writer)[None, :] * n_readers + reader[:, None]
    mask = (writer < n_writers)[None, :] & (reader < n_readers)[:, None]
    sums += tl.load(sums_ptr + offsets, mask=mask, other=0.0)  # of the tokens before
    tl.store(sums_ptr + offsets, sums, mask=mask)


class Contraction:
    """Adds up u . r over tokens that come in several chunks, in fp32 and in a fixed order."""

    def __init__(self, n_writers: int, n_readers: int, width: int, chunk: int, r: Tensor) -> None:
        self.block_writers, self.block_readers = (
            min(max(next_power_of_2(n), 16), most) for n, most in ((n_writers, MAX_WRITERS), (n_readers, MAX_READERS))
        )
        self.block_size = 32 if r.dtype == torch.float32 else 64  # columns of a tile: 128 bytes of r
        self.n_pairs = -(-n_writers // self.block_writers) * -(-n_readers // self.block_readers)
        self.tiles_per_token = -(-width // self.block_size)
        n_tiles = chunk * self.tiles_per_token
        # a power of two, so that few kernels are compiled
        self.tiles_per_part = next_power_of_2(-(-n_tiles // max(1, MAX_PROGRAMS // self.n_pairs)))
        self.sums = torch.empty((-(-n_tiles // self.tiles_per_part), n_writers, n_readers), dtype=torch.float32, device=r.device).zero_()

    def add(self, u: Tensor, r: Tensor) -> None:
        """u [tokens, H, width], r [tokens, R, width], of at most `chunk` tokens."""
        u, r = contiguous_rows(u), contiguous_rows(r)
        if u.dtype != r.dtype and torch.float32 not in (u.dtype, r.dtype):
            u = u.float()  # bf16 does not become fp16
        tokens, n_writers, width = u.shape
        _contract_kernel[(self.n_pairs, -(-tokens * self.tiles_per_token // self.tiles_per_part))](
            u_ptr=u,
            r_ptr=r,
            sums_ptr=self.sums,
            n_tokens=tokens,
            n_writers=n_writers,
            n_readers=r.shape[1],
            u_stride_t=u.stride(0),
            u_stride_w=u.stride(1),
            r_stride_t=r.stride(0),
            r_stride_r=r.stride(1),
            WIDTH=width,
            TILES_PER_PART=self.tiles_per_part,
            BLOCK_WRITERS=self.block_writers,
            BLOCK_READERS=self.block_readers,
            BLOCK_SIZE=self.block_size,
            num_warps=4,
            num_stages=3,
        )


def launch(dz: Tensor, w_o: Tensor | None, r: Tensor, max_bytes: int) -> Tensor:
    """The scores by the kernel. dz [tokens, H, D], w_o [width, H D] or None, r [tokens, R, width]."""
    (tokens, n_writers), (_, n_readers, width) = dz.shape[:2], r.shape
    chunk = min(tokens, tokens_at_a_time(n_writers, width, torch.float32, max_bytes))
    if not (dz.numel() and r.numel()):
        return torch.zeros(n_writers, n_readers, dtype=torch.float32, device=r.device)
    contraction = Contraction(n_writers, n_readers, width, chunk, r)
    for part, r_part in _chunks(dz, r, chunk):
        contraction.add(part if w_o is None else _outputs_in_fp32(part, w_o), r_part)
    return contraction.sums.sum(0)


def _outputs_in_fp32(dz: Tensor, w_o: Tensor) -> Tensor:
    """[tokens, H, width] by the library, from products in the dtype of both where it can add them up in fp32."""
    heads = _weight_of_heads(w_o, dz)
    can_widen = dz.is_cuda and torch.version.hip is None and hasattr(torch.ops.aten.bmm, "dtype")
    if dz.dtype == w_o.dtype and dz.dtype != torch.float32 and can_widen:
        return torch.bmm(dz.transpose(0, 1), heads, out_dtype=torch.float32).transpose(0, 1)
    return torch.bmm(dz.float().transpose(0, 1), heads.float()).transpose(0, 1)


# ---- reference


def writer_outputs(dz: Tensor, w_o: Tensor) -> Tensor:
    """What each head writes to the residual stream, in PyTorch operations: [..., H, D] -> [..., H, width], fp32 at least.

    Args:
        dz: [..., H, D] inputs of the output projection by head, or differences of two runs.
        w_o: [width, H D], the weight of a torch.nn.Linear; of a Conv1D the transposed one. Its bias belongs to no head.

    Raises:
        WidthError: shapes that do not fit.

    Example:
        >>> steer.kernels.writer_outputs(torch.randn(2, 7, 4, 8), torch.randn(32, 4 * 8)).shape
        torch.Size([2, 7, 4, 32])
    """
    _check_writers(dz, w_o)
    flat = _as_rows(dz)
    with torch.autocast(dz.device.type, enabled=False):
        outputs = _outputs_reference(flat, w_o, torch.promote_types(torch.promote_types(dz.dtype, w_o.dtype), torch.float32))
    return outputs.view(*dz.shape[:-1], len(w_o))


def _outputs_reference(dz: Tensor, w_o: Tensor, dtype: torch.dtype) -> Tensor:
    """[tokens, H, D] -> [tokens, H, width]; the numbers of a head lie together."""
    return torch.bmm(dz.to(dtype).transpose(0, 1), _weight_of_heads(w_o, dz).to(dtype)).transpose(0, 1)


def edge_scores_reference(dz: Tensor, w_o: Tensor | None, r: Tensor, max_bytes: int) -> Tensor:
    """The scores in PyTorch operations, from the same arguments as `launch`; in fp32 at least."""
    dtype = torch.promote_types(torch.promote_types(dz.dtype, r.dtype), torch.float32)
    dtype = dtype if w_o is None else torch.promote_types(dtype, w_o.dtype)
    (_, n_writers, _), (_, n_readers, width) = dz.shape, r.shape
    scores = torch.zeros(n_writers, n_readers, dtype=dtype, device=r.device)
    w_o = None if w_o is None else w_o.to(dtype)
    for part, r_part in _chunks(dz, r, tokens_at_a_time(n_writers, width, dtype, max_bytes)):
        u = part.to(dtype) if w_o is None else _outputs_reference(part, w_o, dtype)  # [chunk, H, width]
        scores += torch.bmm(u, r_part.to(dtype).mT).sum(0)  # [chunk, H, R], whatever order tokens and readers lie in
    return scores


def tokens_at_a_time(n_writers: int, width: int, dtype: torch.dtype, max_bytes: int) -> int:
    """How many tokens' writer outputs fit in so many bytes; at least one."""
    return max(1, max_bytes // max(1, n_writers * width * dtype.itemsize))


def _chunks(dz: Tensor, r: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(dz), chunk):
        yield dz[start : start + chunk], r[start : start + chunk]


def _weight_of_heads(w_o: Tensor, dz: Tensor) -> Tensor:
    """View of [width, H D] as [H, D, width]."""
    return w_o.unflatten(1, dz.shape[1:]).permute(1, 2, 0)


def _as_rows(x: Tensor) -> Tensor:
    """View of [..., n, m] as [tokens, n, m]; a copy where the leading dimensions cannot be joined."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


# ---- dispatch


@torch.library.custom_op("steer::edge_scores", mutates_args=(), schema="(Tensor dz, Tensor? w_o, Tensor r, int max_bytes) -> Tensor")
def _edge_scores(dz: Tensor, w_o: Tensor | None, r: Tensor, max_bytes: int) -> Tensor:
    by_kernel = runs_kernel(dz, r) and (w_o is None or runs_kernel(w_o))
    return (launch if by_kernel else edge_scores_reference)(dz, w_o, r, max_bytes)


@_edge_scores.register_fake
def _(dz: Tensor, w_o: Tensor | None, r: Tensor, max_bytes: int) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(dz.dtype, r.dtype), torch.float32)
    return r.new_empty((dz.shape[1], r.shape[1]), dtype=dtype if w_o is None else torch.promote_types(dtype, w_o.dtype))


@KERNELS.register("edge_scores")
def edge_scores(dz: Tensor, w_o: Tensor | None, r: Tensor, *, max_bytes: int = MAX_BYTES) -> Tensor:
    """sum_t <dz[t, h] W_O[h], r[t, r]>: the scores of the edges from heads to readers, [H, R] in fp32 at least, without a gradient.

    Args:
        dz: [..., H, D] difference of two runs at the input of the output projection, by head.
        w_o: [width, H D] the weight of that projection, a torch.nn.Linear; of a Conv1D the transposed one. None: `dz` is what the writers
            write, [..., H, width], as for MLPs and the embedding.
        r: [..., R, width] gradients at the readers' inputs, before the norm; its leading dimensions are those of dz.
        max_bytes: of the heads' outputs that exist at a time; those of one token at least.

    Raises:
        WidthError: shapes that do not fit. ConfigError: tensors on different devices, or a `max_bytes` below 1.

    Example:
        >>> edge_scores(torch.randn(2, 7, 4, 8), torch.randn(32, 4 * 8), torch.randn(2, 7, 9, 32)).shape
        torch.Size([4, 9])
    """
    _check(dz, w_o, r, max_bytes)
    tensors = [x for x in (dz, r, w_o) if x is not None]
    paths = {choose_path(x, opaque=True) for x in tensors}
    path = next(path for path in ("aten", "op", "triton") if path in paths)  # what one of them cannot do, none does
    run = edge_scores_reference if path == "aten" else launch if path == "triton" else torch.ops.steer.edge_scores
    with torch.no_grad(), torch.autocast(r.device.type, enabled=False):
        scores: Tensor = run(_as_rows(dz), w_o, _as_rows(r), max_bytes)
    return scores


def _check(dz: Tensor, w_o: Tensor | None, r: Tensor, max_bytes: int) -> None:
    if w_o is not None:
        _check_writers(dz, w_o)
    width = None if dz.dim() < 2 else dz.shape[-1] if w_o is None else w_o.shape[0]
    if r.dim() < 2 or r.dim() != dz.dim() or r.shape[:-2] != dz.shape[:-2] or r.shape[-1] != width:
        raise _readers_error(dz, r, width)
    if r.device != dz.device or (w_o is not None and w_o.device != r.device):
        raise _device_error(dz, w_o, r)
    if max_bytes < 1:
        raise _max_bytes_error(max_bytes)


def _check_writers(dz: Tensor, w_o: Tensor) -> None:
    if dz.dim() < 2 or w_o.dim() != 2 or w_o.shape[1] != dz.shape[-2] * dz.shape[-1]:
        raise _writers_error(dz, w_o)


# ---- errors


def _writers_error(dz: Tensor, w_o: Tensor) -> WidthError:
    columns = dz.shape[-2] * dz.shape[-1] if dz.dim() > 1 else "heads x head width"
    return WidthError(
        "the output projection does not fit the heads",
        expected=f"dz [..., heads, head width] and a weight [width, {columns}]",
        found=f"dz {list(dz.shape)} and {list(w_o.shape)}",
        remedy="split the input of the projection by head; pass the weight of a torch.nn.Linear as it is, that of a Conv1D transposed",
    )


def _readers_error(dz: Tensor, r: Tensor, width: int | None) -> WidthError:
    leading = "".join(f"{n}, " for n in dz.shape[:-2])
    return WidthError(
        "the gradients at the readers do not fit the writers",
        expected=f"[{leading}readers, {width or 'width'}], the tokens of dz and the width of the residual stream",
        found=f"{list(r.shape)} for dz {list(dz.shape)}",
        remedy="take both from the same tokens; gradients are those of the residual stream, before the readers' norm and weights",
    )


def _device_error(dz: Tensor, w_o: Tensor | None, r: Tensor) -> ConfigError:
    return ConfigError(
        "edge scores need writers and readers on one device",
        expected=f"all on {r.device}, where the gradients are",
        found=f"dz on {dz.device}, the projection on {'none' if w_o is None else w_o.device}",
        remedy="move the difference and the weight of the writing layer to the device of the reading one",
    )


def _max_bytes_error(max_bytes: int) -> ConfigError:
    return ConfigError(
        "max_bytes leaves no room for a token", expected="at least 1; one token is always taken", found=max_bytes, remedy="leave it out"
    )
