"""Drift statistics: what a monitor wants to know of an activation, in one read.

Mathematics, over tokens t with weight w_t > 0 (the others may hold anything, nan too):

    n = sum w_t      sum_d = sum w_t h_td      m2_d = sum w_t (h_td - sum_d / n)^2
    |h_t|            p_tk = h_t.u_k            histogram_kb = number of tokens with p_tk in bin b of [low_k, high_k), the outer bins open

Squares are centred: a sum of squares minus the square of a sum is wrong in the first digit in fp32 where a channel's mean is 3,000 times
its deviation, and such channels are common in the residual stream. Each tile of tokens is centred on its own mean, in registers, and the
tiles are merged in fp64 by the formula of Chan, Golub and LeVeque (1983), so two results can be merged in the same way.

Shapes: h [batch, tokens, D] (fp32, bf16 or fp16; any row strides, any D; offsets in int64), u [K, D], w [batch or 1, tokens or 1]; sum,
m2 [D] fp64; norms [batch, tokens], projections [batch, tokens, K] fp32, 0 where w is 0; histogram [K, bins] int64.

Bytes per token in bf16: 2 D read once; D / 8 written and read again for the tiles' sums (8 D for each tile of 64 tokens), 4 K + 4 for
norms and projections. Projections go through the tensor cores with fp32 directions kept to 2^-16, see `edit_tiles`.

Deterministic: tiles in a fixed order, and the only atomics count integers. Sources: Chan et al. for the merging; the column sums in two
stages are those of fused norm backward kernels (Hsu et al. 2024, arXiv 2410.10989).
"""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.kernels.available import KERNELS
from steer.kernels.dispatch import choose, runs_triton
from steer.kernels.edit_tiles import product
from steer.kernels.jit import jit
from steer.kernels.layout import power_of_two, readable, rows, strides, vectors, weights

if TYPE_CHECKING:
    import triton.language as tl

MOST = 64  # directions, all of whose projections of a tile are held in registers
TILE = 64  # tokens of a program


class DriftStats(NamedTuple):
    """What was read; None where it was not asked for."""

    n: Tensor  # [] fp64, sum of the weights
    sum: Tensor | None  # [width] fp64
    m2: Tensor | None  # [width] fp64, centred squares
    norms: Tensor | None  # [...] fp32
    projections: Tensor | None  # [..., K] fp32
    histogram: Tensor | None  # [K, bins] int64


@KERNELS.register("drift_stats")
def drift_stats(
    h: Tensor,
    directions: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    channels: bool = True,
    norms: bool = True,
    bins: int = 0,
    low: Tensor | float = -1.0,
    high: Tensor | float = 1.0,
) -> DriftStats:
    """Channel sums and centred squares, token norms, projections and their histograms in one read of an activation.

    Args:
        h: [..., width]; never differentiated.
        directions: [K, width] to project on.
        mask: weights that broadcast to [..., 1]; tokens of weight 0 are not looked at.
        channels, norms: whether sums and squares, and norms, are wanted.
        bins: of the histogram of each direction's projections, from `low` to `high`, one number or [K]; 0 for none.

    Raises:
        WidthError, ConfigError: shapes that do not fit, or a histogram without directions or with an empty range.
    """
    if directions is not None:
        directions = vectors(directions, 2, h, "directions to project on")
    start, step = _range(directions, bins, low, high) if bins else (None, None)
    x, weight = rows(h), weights(h, 1.0, mask)
    few = directions is None or len(directions) <= MOST
    way = choose(h, opaque=True) if few else "aten"
    read_out = reference if way == "aten" else run if way == "triton" else torch.ops.steer.drift_stats
    with torch.no_grad():
        n, total, m2, lengths, read, counts = read_out(x, directions, weight, start, step, bins, channels, norms)
    return DriftStats(
        n,
        total if channels else None,
        m2 if channels else None,
        lengths.view(h.shape[:-1]) if norms else None,
        read.view(*h.shape[:-1], len(directions)) if directions is not None else None,
        counts if bins else None,
    )


def _range(directions: Tensor | None, bins: int, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    """Start of the first bin and bins per unit, [K] fp32."""
    if directions is None or bins < 1:
        raise ConfigError(
            "a histogram of projections needs directions and bins",
            expected="directions=[K, width], and at least one bin",
            found=f"{'no directions' if directions is None else 'directions'}, {bins} bins",
            remedy="pass both, or bins=0",
        )
    k, device = len(directions), directions.device
    numbers = isinstance(low, float | int) and isinstance(high, float | int)
    if numbers and not low < high:
        raise ConfigError(
            "the range of a histogram is empty", expected="low < high", found=f"{low}, {high}", remedy="exchange them, or widen the range"
        )
    ends = [torch.as_tensor(one, dtype=torch.float32, device=device) for one in (low, high)]
    if any(one.dim() > 1 or one.numel() not in (1, k) for one in ends):
        raise ConfigError(
            "the range of a histogram does not fit the directions",
            expected=f"numbers, or [{k}]",
            found=[list(one.shape) for one in ends],
            remedy="give one number for all directions, or one for each",
        )
    return ends[0].expand(k).contiguous(), (bins / (ends[1] - ends[0])).expand(k).contiguous()


Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def reference(
    x: Tensor, u: Tensor | None, weight: Tensor, start: Tensor | None, step: Tensor | None, bins: int, channels: bool, norms: bool
) -> Results:
    """The same in PyTorch operations; what is not asked for is empty.

    Sums are of differences from one of the tokens that count: one pass over memory, and squares that are nearly centred.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    w = weight.to(wide).expand(x.shape[:2])
    live = (w > 0).unsqueeze(-1)
    full = torch.where(live, x, 0).to(wide)
    n, lengths, read = w.sum(dtype=exact), w.new_empty(0), w.new_empty(0)
    total = m2 = torch.zeros(x.shape[-1] if channels else 0, dtype=exact, device=x.device)
    counts = torch.empty(0, dtype=torch.long, device=x.device)
    if channels and x.numel():
        origin = full.flatten(0, 1)[live.flatten().to(torch.int8).argmax(0, keepdim=True)].squeeze(0)  # no wait for a number
        off = torch.where(live, full - origin, 0)
        shift, squares = (w.unsqueeze(-1) * off).sum((0, 1), dtype=exact), (w.unsqueeze(-1) * off.square()).sum((0, 1), dtype=exact)
        total = shift + n * origin
        m2 = (squares - shift.square() / torch.where(n > 0, n, 1)).clamp(min=0)
    if norms:
        lengths = torch.linalg.vector_norm(full, dim=-1)
    if u is not None:
        with torch.autocast(x.device.type, enabled=False):
            # the product with a transposed matrix is not the same to the bit for each place in memory, and a resumed run must be
            read = full @ u.to(wide).mT.contiguous()
    if start is not None and step is not None:
        at = ((read - start) * step).clamp(0, bins - 1)
        seen = live & (read == read)
        at = torch.where(seen, at, 0).long() + bins * torch.arange(len(start), device=x.device)
        counts = torch.zeros(len(start) * bins, dtype=torch.long, device=x.device)
        counts = counts.index_add(0, at.flatten(), seen.flatten().long()).view(-1, bins)
    return n, total, m2, lengths, read, counts


@jit
def _stats(
    x, u, weight, start, step, counts, sums, squares, norms, projections, histogram,
    tokens, batch_tokens, x_b, x_t, weight_b, weight_t,
    D: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, DIRECTIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each tile of tokens."""
    tile = tl.program_id(0)
    token = tile * TILE + tl.arange(0, TILE)
    kept = token < batch_tokens
    b, t = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    w = tl.load(weight + b * weight_b + t * weight_t, mask=kept, other=0.0).to(tl.float32)
    live = w > 0
    n = tl.sum(w, 0)
    tl.store(counts + tile, n)
    at = (b * x_b + t * x_t)[:, None]
    place = tile.to(tl.int64) * D
    lengths = tl.zeros((TILE,), tl.float32)
    read = tl.zeros((TILE, DIRECTIONS), tl.float32)
    j = tl.arange(0, DIRECTIONS)
    for begin in range(0, D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        given = tl.load(x + at + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        full = given.to(tl.float32)
        if sums is not None:
            total = tl.sum(w[:, None] * full, 0)
            off = full - (total / tl.where(n > 0, n, 1.0))[None, :]
            tl.store(sums + place + d, total, mask=d < D)
            tl.store(squares + place + d, tl.sum(w[:, None] * off * off, 0), mask=d < D)
        if norms is not None:
            lengths += tl.sum(full * full, 1)
        if u is not None:
            read = product(given, tl.load(u + j[None, :] * D + d[:, None], mask=(j < K)[None, :] & (d < D)[:, None], other=0.0), read)
    if norms is not None:
        tl.store(norms + token, tl.sqrt(lengths), mask=kept)
    if u is not None:
        tl.store(projections + token.to(tl.int64)[:, None] * K + j[None, :], read, mask=kept[:, None] & (j < K)[None, :])
    if histogram is not None:
        low, scale = tl.load(start + j, mask=j < K, other=0.0), tl.load(step + j, mask=j < K, other=0.0)
        bin = tl.minimum(tl.maximum((read - low[None, :]) * scale[None, :], 0.0), BINS - 1).to(tl.int32)
        tl.atomic_add(histogram + j[None, :] * BINS + bin, 1, mask=live[:, None] & (j < K)[None, :] & (read == read))


@jit
def _merge(
    counts, sums, squares, total, m2, tiles, D: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Tiles merged into one, in fp64; one program for some columns."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.zeros((BLOCK,), tl.float64)
    s = tl.zeros((BLOCK,), tl.float64)
    for step in range(STEPS):
        i = step * TILES + tl.arange(0, TILES)
        both = (i < tiles)[:, None] & (d < D)[None, :]
        s += tl.sum(tl.load(sums + i.to(tl.int64)[:, None] * D + d[None, :], mask=both, other=0.0).to(tl.float64), 0)
        n += tl.sum(tl.load(counts + i, mask=i < tiles, other=0.0).to(tl.float64), 0)
    mean = s / tl.where(n > 0, n, 1.0)
    m = tl.zeros((BLOCK,), tl.float64)
    for step in range(STEPS):
        i = step * TILES + tl.arange(0, TILES)
        both = (i < tiles)[:, None] & (d < D)[None, :]
        c = tl.load(counts + i, mask=i < tiles, other=0.0).to(tl.float64)
        own = tl.load(sums + i.to(tl.int64)[:, None] * D + d[None, :], mask=both, other=0.0).to(tl.float64)
        off = own / tl.where(c > 0, c, 1.0)[:, None] - mean[None, :]
        q = tl.load(squares + i.to(tl.int64)[:, None] * D + d[None, :], mask=both, other=0.0).to(tl.float64)
        m += tl.sum(q + c[:, None] * off * off, 0)
    tl.store(total + d, s, mask=d < D)
    tl.store(m2 + d, m, mask=d < D)


def run(
    x: Tensor, u: Tensor | None, weight: Tensor, start: Tensor | None, step: Tensor | None, bins: int, channels: bool, norms: bool
) -> Results:
    """The same by the kernels."""
    x = readable(x)
    (batch, tokens, width), k = x.shape, 0 if u is None else len(u)
    tiles, block = -(-batch * tokens // TILE), min(max(power_of_two(width), 16), 32 if x.dtype == torch.float32 else 128)

    def blank(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    counts = blank(tiles)
    sums, squares = (blank(tiles, width) if channels else None for _ in range(2))
    total, m2 = (torch.zeros(width if channels else 0, dtype=torch.float64, device=x.device) for _ in range(2))
    lengths = blank(batch, tokens) if norms else None
    read = blank(batch, tokens, k) if u is not None else None
    histogram = torch.zeros(k, bins, dtype=torch.int32, device=x.device) if bins else None
    if x.numel():
        _stats.launch(
            (tiles,),
            x, None if u is None else u.contiguous(), weight, start, step, counts, sums, squares, lengths, read, histogram,
            tokens, batch * tokens, x.stride(0), x.stride(1), *strides(weight),
            width, k, max(bins, 1), TILE, max(power_of_two(k), 16), block,
            num_warps=8, num_stages=3,
        )  # fmt: skip
        if channels:
            steps = power_of_two(-(-tiles // 64))
            _merge.launch((-(-width // 32),), counts, sums, squares, total, m2, tiles, width, steps, 64, 32, num_warps=4)
    none = x.new_empty(0, dtype=torch.float32)
    long = torch.empty(0, dtype=torch.long, device=x.device) if histogram is None else histogram.long()
    return counts.sum(dtype=torch.float64), total, m2, none if lengths is None else lengths, none if read is None else read, long


@torch.library.custom_op(
    "steer::drift_stats",
    mutates_args=(),
    schema="(Tensor x, Tensor? u, Tensor weight, Tensor? start, Tensor? step, int bins, bool channels, bool norms)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _drift_stats(
    x: Tensor, u: Tensor | None, weight: Tensor, start: Tensor | None, step: Tensor | None, bins: int, channels: bool, norms: bool
) -> Results:
    made = (run if runs_triton(x) else reference)(x, u, weight, start, step, bins, channels, norms)
    return made[0], *(one.clone() for one in made[1:])  # type: ignore[return-value]


@_drift_stats.register_fake
def _(
    x: Tensor, u: Tensor | None, weight: Tensor, start: Tensor | None, step: Tensor | None, bins: int, channels: bool, norms: bool
) -> Results:
    exact = torch.float64
    wide = torch.promote_types(x.dtype, torch.float32)
    channel = x.shape[-1] if channels else 0
    return (
        x.new_empty((), dtype=exact),
        x.new_empty(channel, dtype=exact),
        x.new_empty(channel, dtype=exact),
        x.new_empty(x.shape[:2] if norms else (0,), dtype=wide),
        x.new_empty((*x.shape[:2], len(u)) if u is not None else (0,), dtype=wide),
        x.new_empty((len(u), bins) if u is not None and bins else (0,), dtype=torch.long),
    )
