"""How well directions separate the classes on texts that had no part in making them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from steer.directions.contrast import ContrastSet
from steer.model.accumulator import TextAccumulator, pool
from steer.model.capture import capture
from steer.model.site import Site


class Projections(TextAccumulator):
    """Accumulator: projection of every text's pooled activation onto fixed vectors.

    Args:
        vectors: [k, width].
        texts: number of texts.
    """

    def __init__(self, vectors: Tensor, texts: int) -> None:
        self.vectors = vectors
        self.values = torch.full((texts, vectors.shape[0]), float("nan"), dtype=torch.float64)

    def reduce(self, h: Tensor, weight: Tensor) -> Tensor:
        """[batch, k]."""
        return pool(h, weight) @ self.vectors.to(h.device).float().mT

    def add(self, values: Tensor, rows: Tensor) -> None:
        self.values[rows] = values.double()


def auc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive text projects higher than a negative one, ties counting half."""
    difference = positive[:, None] - negative
    return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)


def heldout_metrics(
    model: nn.Module, held: ContrastSet, vectors: Mapping[Site, Tensor], span: str | int, progress: bool
) -> dict[Site, list[dict[str, float]]]:
    """`auc`, `dprime`, `sd` and `n_heldout` of every vector, and what is known of groups, see `Direction`.

    Args:
        held: texts that had no part in making the vectors; with groups, none of these had.
        vectors: [k, width] for each site.
    """
    rows, sides = held.rows()
    readers = {site: Projections(v / v.norm(dim=-1, keepdim=True), len(rows)) for site, v in vectors.items()}
    capture(model, rows, dict(readers), span=span, group=2 if held.paired else 1, progress="held-out check" if progress else None)
    side, groups = torch.tensor(sides), held.row_groups()
    return {
        site: [{**separation(values[side], values[~side]), **group_separation(values, side, groups)} for values in reader.values.unbind(1)]
        for site, reader in readers.items()
    }


def group_separation(values: Tensor, is_positive: Tensor, groups: Sequence[str]) -> dict[str, float]:
    """`n_heldout_groups`, and `auc_worst_group` where groups have two texts of either class; nothing without groups.

    Args:
        values: [texts], projections. is_positive: [texts] bool. groups: the name of the group of each text, or none.
    """
    if not groups:
        return {}
    names = sorted(set(groups))
    own = [torch.tensor([group == name for group in groups]) for name in names]  # [texts] each
    sides = [(values[of & is_positive], values[of & ~is_positive]) for of in own]
    known = [auc(positive, negative) for positive, negative in sides if len(positive) >= 2 and len(negative) >= 2]
    return {"n_heldout_groups": float(len(names)), **({"auc_worst_group": min(known)} if known else {})}


def is_at_chance(metrics: Mapping[str, float]) -> bool:
    """An AUC that chance alone would give as many texts in one of 20 draws: within 1.64 standard errors of 0.5, or below."""
    side = max(metrics["n_heldout"] / 2, 1.0)
    return metrics["auc"] <= 0.5 + 1.64 * ((2 * side + 1) / (12 * side * side)) ** 0.5


def separation(positive: Tensor, negative: Tensor) -> dict[str, float]:
    """`auc`, `dprime`, `sd` and `n_heldout` of the projections of the texts of either class, [texts] each."""
    sd = float(((positive.var() + negative.var()) / 2).sqrt())
    return {
        "auc": auc(positive, negative),
        "dprime": float(positive.mean() - negative.mean()) / max(sd, 1e-12),
        "sd": sd,
        "n_heldout": float(len(positive) + len(negative)),
    }
