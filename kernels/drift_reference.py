"""Drift statistics in PyTorch operations; mathematics in `drift_stats.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StatsTensors(NamedTuple):
    """Results of the kernels and of the reference; what is not asked for is empty, since operators return tensors only."""

    n: Tensor
    sum: Tensor
    m2: Tensor
    norms: Tensor
    projections: Tensor
    histogram: Tensor


def drift_stats_reference(
    h: Tensor,
    directions: Tensor | None,
    weight: Tensor,
    low: Tensor | None,
    bins_per_unit: Tensor | None,
    bins: int,
    channels: bool,
    norms: bool,
) -> StatsTensors:
    """The statistics in PyTorch operations, from the same arguments as `drift_stats.launch`.

    Sums are of differences from one of the tokens that count: one pass over memory, and squares that are nearly centred.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    exact = torch.float32 if h.device.type == "mps" else torch.float64
    w = weight.to(wide).expand(h.shape[:2])  # [batch, tokens]
    is_live = (w > 0).unsqueeze(-1)
    x = torch.where(is_live, h, 0).to(wide)
    n = w.sum(dtype=exact)
    total = m2 = torch.zeros(h.shape[-1] if channels else 0, dtype=exact, device=h.device)
    if channels and h.numel():
        first_live = is_live.flatten().to(torch.int8).argmax(0, keepdim=True)  # as an index tensor: the host need not wait for it
        origin = x.flatten(0, 1)[first_live].squeeze(0)  # [width]
        offset = torch.where(is_live, x - origin, 0)
        shift = (w.unsqueeze(-1) * offset).sum((0, 1), dtype=exact)
        squares = (w.unsqueeze(-1) * offset.square()).sum((0, 1), dtype=exact)
        total = shift + n * origin
        m2 = (squares - shift.square() / torch.where(n > 0, n, 1)).clamp(min=0)
    projections = w.new_empty(0)
    if directions is not None:
        with torch.autocast(h.device.type, enabled=False):
            # contiguous: a product with a transposed view has other last bits at another place in memory, and a resumed run must not
            projections = x @ directions.to(wide).mT.contiguous()  # [batch, tokens, K]
    histogram = torch.empty(0, dtype=torch.long, device=h.device)
    if low is not None and bins_per_unit is not None:
        is_counted = is_live & (projections == projections)
        bin = torch.where(is_counted, ((projections - low) * bins_per_unit).clamp(0, bins - 1), 0).long()
        bin = bin + bins * torch.arange(len(low), device=h.device)
        histogram = torch.zeros(len(low) * bins, dtype=torch.long, device=h.device)
        histogram = histogram.index_add(0, bin.flatten(), is_counted.flatten().long()).view(-1, bins)
    token_norms = torch.linalg.vector_norm(x, dim=-1) if norms else w.new_empty(0)
    return StatsTensors(n, total, m2, token_norms, projections, histogram)
