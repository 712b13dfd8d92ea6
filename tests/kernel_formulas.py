"""What the kernels compute, written once more by hand: in float64, token by token, without the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INF = float("inf")


def slot_of(slots: Tensor | None, b: int, t: int) -> int:
    return 0 if slots is None else int(slots[b] if slots.dim() == 1 else slots[b, t])


def added(h: Tensor, bank: Tensor, strength: Tensor, mask: Tensor, slots: Tensor | None, norm: bool) -> Tensor:
    """h [batch, tokens, width], bank [slots, width], strength and mask what broadcasts to [batch, tokens, 1]."""
    weight = (strength * mask).expand(*h.shape[:2], 1)
    rows = []
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            x, slot = h[b, t], slot_of(slots, b, t)
            y = x + weight[b, t] * bank[slot] if 0 <= slot < len(bank) else x
            rows.append(y * (x.norm() / y.norm()) if norm else y)
    return torch.stack(rows).view(h.shape)


def edited(
    h: Tensor, read: Tensor, write: Tensor, numbers: dict[str, Tensor], strength: Tensor, mask: Tensor, slots: Tensor | None, **flags: bool
) -> Tensor:
    """read, write [1 or slots, M, width]; numbers [1 or slots, M] by name."""
    weight = (strength * mask).expand(*h.shape[:2], 1)
    count = max(len(bank) for bank in (read, write, *numbers.values()))
    rows = []
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            x, slot = h[b, t], slot_of(slots, b, t)
            y = x
            for j in range(read.shape[1]) if 0 <= slot < count else ():
                own = {name: number[min(slot, len(number) - 1), j] for name, number in numbers.items()}
                u, v = (bank[min(slot, len(bank) - 1), j] for bank in (read, write))
                y = y + weight[b, t] * step(x, u, own, **flags) * v
            rows.append(y * (x.norm() / y.norm()) if flags.get("preserve_norm") else y)
    return torch.stack(rows).view(h.shape)


def step(x: Tensor, u: Tensor, own: dict[str, Tensor], relative: bool = False, gated: bool = False, preserve_norm: bool = False) -> Any:
    """Length of the move along one direction: the feature's target minus its present value."""
    p = x @ u + own.get("bias", 0.0)
    on = bool(p > own.get("threshold", torch.tensor(-INF)) * (x.norm() if relative else 1.0)) if "threshold" in own else True
    z = p if on else p * 0
    expected = own.get("scale", 1.0) * z + own.get("shift", 0.0)
    if "low" in own:
        expected = torch.maximum(expected, own["low"])
    if "high" in own:
        expected = torch.minimum(expected, own["high"])
    return (expected - z) * (1.0 if on or not gated else 0.0)


def statistics(h: Tensor, directions: Tensor, weight: Tensor, low: float, high: float, bins: int) -> dict[str, Tensor]:
    """weight [batch, tokens]; tokens of weight 0 do not count."""
    live = weight > 0
    x, w = h[live].double(), weight[live].double()
    mean = (w[:, None] * x).sum(0) / w.sum() if len(x) else x.new_zeros(h.shape[-1])
    read = torch.zeros(*h.shape[:2], len(directions), dtype=torch.float64)
    norms = torch.zeros(h.shape[:2], dtype=torch.float64)
    read[live], norms[live] = x @ directions.double().mT, x.norm(dim=-1)
    places = ((read[live] - low) / (high - low) * bins).floor().clamp(0, bins - 1).long()
    counts = torch.stack([torch.bincount(column, minlength=bins) for column in places.unbind(-1)])
    return {
        "n": w.sum(),
        "sum": (w[:, None] * x).sum(0),
        "m2": (w[:, None] * (x - mean).square()).sum(0),
        "norms": norms,
        "projections": read,
        "histogram": counts,
    }


def error(result: Tensor, expected: Tensor) -> float:
    """Error relative to the norm of the tensor."""
    assert result.shape == expected.shape, (result.shape, expected.shape)
    result, expected = result.detach().double(), expected.detach().double()
    assert bool(torch.isfinite(result).all()), "memory that nothing was written to"
    return float((result - expected).norm() / expected.norm().clamp(min=1e-30)) if expected.numel() else 0.0


def surrounded(x: Tensor) -> Tensor:
    """The same numbers, rows far apart and not-a-number all around them; a stray read shows."""
    wide = torch.full((*x.shape[:-2], 2 * x.shape[-2] + 1, x.shape[-1] + 6), torch.nan, dtype=x.dtype)
    inner = wide[..., 1 : 2 * x.shape[-2] + 1 : 2, 3:-3]
    inner.copy_(x.detach())
    return inner


def decoded(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Token by token the sum of rows. values, indices [..., k]; weight [features, width]."""
    rows = [
        sum((v * weight[int(i)] for v, i in zip(own, which, strict=True)), weight.new_zeros(weight.shape[1]))
        for own, which in _rows(values, indices)
    ]
    return torch.stack(rows).view(*values.shape[:-1], -1)


def _rows(values: Tensor, indices: Tensor) -> Any:
    k = values.shape[-1]
    return zip(values.reshape(-1, k), indices.reshape(-1, k), strict=True)


def best_features(pre: Tensor, k: int) -> Tensor:
    """[..., k] the features with the largest numbers, growing; of equal ones the first, a nan before all."""
    rows = []
    for row in pre.reshape(-1, pre.shape[-1]).tolist():
        order = sorted(range(len(row)), key=lambda j, row=row: (row[j] == row[j], -row[j] if row[j] == row[j] else 0.0, j))
        rows.append(sorted(order[:k]))
    return torch.tensor(rows).view(*pre.shape[:-1], k)


def scored(dz: Tensor, w_o: Tensor | None, r: Tensor) -> Tensor:
    """Edge scores [heads, readers], token by token and pair by pair. dz [..., heads, D or width], r [..., readers, width]."""
    dz, r = dz.double().reshape(-1, *dz.shape[-2:]), r.double().reshape(-1, *r.shape[-2:])
    scores = torch.zeros(dz.shape[1], r.shape[1], dtype=torch.float64)
    for t in range(len(dz)):
        for h in range(dz.shape[1]):
            columns = slice(h * dz.shape[2], (h + 1) * dz.shape[2])
            u = dz[t, h] if w_o is None else w_o.double()[:, columns] @ dz[t, h]
            for reader in range(r.shape[1]):
                scores[h, reader] += u @ r[t, reader]
    return scores
