"""Extraction: directions at many sites from one streaming pass, and their separation on texts that were held out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.directions.contrast import ContrastSet
from steer.directions.direction import Direction, Directions
from steer.directions.extractor import EXTRACTORS
from steer.directions.moments import ContrastMoments
from steer.errors import ContrastError
from steer.model.anatomy import Anatomy
from steer.model.capture import capture, pool
from steer.model.site import Site


class Projections:
    """Accumulator: projection of every text's pooled activation onto fixed vectors.

    Args:
        vectors: [k, width].
        texts: number of texts.
    """

    def __init__(self, vectors: Tensor, texts: int) -> None:
        self.vectors = vectors
        self.values = torch.full((texts, vectors.shape[0]), float("nan"), dtype=torch.float64)

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        self.values[rows] = (pool(h, weight) @ self.vectors.to(h.device).float().mT).double().cpu()


def auc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive text projects higher than a negative one, ties counting half."""
    difference = positive[:, None] - negative
    return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)


def extract(
    model: nn.Module,
    contrast: ContrastSet,
    sites: Sequence[str | Site],
    *,
    name: str,
    method: str = "mean_difference",
    span: str | int = "response",
    holdout: float = 0.25,
    seed: int = 0,
    progress: bool = True,
) -> Directions:
    """Reads a direction at every site.

    Args:
        model: a decoder, raw or wrapped.
        contrast: the texts; a share `holdout` of them is kept out of the direction and used for its metrics.
        sites: sites or patterns such as `layers.*.output`.
        name: what the direction stands for.
        method: a key of `EXTRACTORS`.
        span: which tokens of a text are averaged: response, prompt, all, last, prompt_last, or an index.

    Raises:
        ContrastError: too few texts, an empty span, or classes that do not differ.
        ConfigError, SiteError, NonFiniteError.
    """
    return extract_all(model, contrast, sites, name=name, methods=[method], span=span, holdout=holdout, seed=seed, progress=progress)[
        method
    ]


def extract_all(
    model: nn.Module,
    contrast: ContrastSet,
    sites: Sequence[str | Site],
    *,
    name: str,
    methods: Sequence[str],
    span: str | int = "response",
    holdout: float = 0.25,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Directions]:
    """`extract` for several methods from the same pass."""
    extractors = {method: EXTRACTORS.get(method) for method in methods}
    anatomy = Anatomy.find(model)
    chosen = anatomy.sites(*map(str, sites))
    train, held = contrast.split(holdout, seed)
    moments = _moments(model, train, chosen, span, any(one.second for one in extractors.values()), progress)
    vectors = {
        site: torch.stack([_scaled(one.direction(moments[site]), moments[site], site) for one in extractors.values()]) for site in chosen
    }
    metrics = _metrics(model, held, vectors, span, progress)
    provenance: dict[str, Any] = {
        "model": anatomy.fingerprint(),
        "data_sha256": contrast.digest(),
        "paired": contrast.paired,
        "holdout": holdout,
        "seed": seed,
    }
    made = {}
    for k, method in enumerate(methods):
        entries = []
        for site in chosen:
            counts = {"n_train": float(len(train.positive) + len(train.negative)), "activation_norm": moments[site].activation_norm}
            entries.append(Direction(site, vectors[site][k].float().cpu(), method, span, {**metrics[site][k], **counts}))
        made[method] = Directions(entries, name, {**provenance, "method": method})
    return made


def _moments(
    model: nn.Module, contrast: ContrastSet, sites: list[Site], span: str | int, second: bool, progress: bool
) -> dict[Site, ContrastMoments]:
    rows, sides = contrast.rows()
    moments = {site: ContrastMoments(torch.tensor(sides), contrast.paired, second) for site in sites}
    capture(model, rows, dict(moments), span=span, group=2 if contrast.paired else 1, progress="extracting" if progress else None)
    return moments


def _scaled(raw: Tensor, moments: ContrastMoments, site: Site) -> Tensor:
    """Points the vector at the positive class and gives it the length of the class gap along it."""
    unit = raw / raw.norm()
    along = torch.dot(moments.gap, unit)
    if not bool(torch.isfinite(along)) or float(along.abs()) <= 1e-9 * moments.activation_norm:
        raise ContrastError(
            f"the two classes do not differ at '{site}'",
            expected="class means that are apart",
            found=f"a gap of {float(along.abs().nan_to_num()):.3g} beside activations of length {moments.activation_norm:.3g}",
            remedy="use another site or span, or texts that differ there",
        )
    return unit * along


def _metrics(
    model: nn.Module, held: ContrastSet, vectors: dict[Site, Tensor], span: str | int, progress: bool
) -> dict[Site, list[dict[str, float]]]:
    rows, sides = held.rows()
    readers = {site: Projections(v / v.norm(dim=-1, keepdim=True), len(rows)) for site, v in vectors.items()}
    capture(model, rows, dict(readers), span=span, group=2 if held.paired else 1, progress="held-out check" if progress else None)
    side = torch.tensor(sides)
    made: dict[Site, list[dict[str, float]]] = {}
    for site, reader in readers.items():
        made[site] = []
        for k in range(reader.values.shape[1]):
            p, q = reader.values[side, k], reader.values[~side, k]
            sd = float(((p.var() + q.var()) / 2).sqrt())
            made[site].append(
                {
                    "auc": auc(p, q),
                    "dprime": float(p.mean() - q.mean()) / max(sd, 1e-12),
                    "sd": sd,
                    "gap": float(vectors[site][k].norm()),
                    "n_heldout": float(len(rows)),
                }
            )
    return made
