"""How well directions separate the classes on texts that had no part in making them."""

from __future__ import annotations

from collections.abc import Mapping

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
    """`auc`, `dprime`, `sd` and `n_heldout` of every vector, see `Direction`.

    Args:
        held: texts that had no part in making the vectors.
        vectors: [k, width] for each site.
    """
    rows, sides = held.rows()
    readers = {site: Projections(v / v.norm(dim=-1, keepdim=True), len(rows)) for site, v in vectors.items()}
    capture(model, rows, dict(readers), span=span, group=2 if held.paired else 1, progress="held-out check" if progress else None)
    side = torch.tensor(sides)
    return {site: [separation(values[side], values[~side]) for values in reader.values.unbind(1)] for site, reader in readers.items()}


def separation(positive: Tensor, negative: Tensor) -> dict[str, float]:
    """`auc`, `dprime`, `sd` and `n_heldout` of the projections of the texts of either class, [texts] each."""
    sd = float(((positive.var() + negative.var()) / 2).sqrt())
    return {
        "auc": auc(positive, negative),
        "dprime": float(positive.mean() - negative.mean()) / max(sd, 1e-12),
        "sd": sd,
        "n_heldout": float(len(positive) + len(negative)),
    }
