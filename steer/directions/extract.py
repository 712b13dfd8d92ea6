"""Extraction: directions at many sites from one streaming pass, and their separation on texts that were held out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.directions.contrast import ContrastSet
from steer.directions.direction import Direction, Directions
from steer.directions.extractor import EXTRACTORS, extractor_of
from steer.directions.heldout import heldout_metrics
from steer.directions.moments import ContrastMoments
from steer.errors import ConfigError, ContrastError
from steer.model.anatomy import Anatomy
from steer.model.capture import capture
from steer.model.site import Site


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
        contrast: the texts; a share `holdout` of them is kept out of the direction and used for its metrics. With groups it is a share of
            these, of which no text has a part in the direction.
        sites: sites or patterns such as `layers.*.output`.
        name: what the direction stands for.
        method: a key of `EXTRACTORS`.
        span: which tokens of a text are averaged: response, prompt, all, last, prompt_last, or an index.

    Raises:
        ContrastError: too few texts or groups, an empty span, classes that do not differ, or no pairs for a method that needs them.
        ConfigError, SiteError, NonFiniteError.

    Example:
        >>> directions = steer.extract(model, contrast, ["layers.*.output"], name="kind")
        >>> direction = directions.best()
        >>> plan = steer.Plan(steer.Intervention(steer.Add(direction.vector), direction.site, strength=direction.strength_of(0.2)))
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
    """`extract` for several methods from the same pass.

    Args:
        methods: keys of `EXTRACTORS`.
        contrast, sites, span, holdout: as of `extract`.

    Returns:
        The directions by method.

    Raises:
        ConfigError: no sites, no methods. Otherwise as `extract`.

    Example:
        >>> by_method = steer.extract_all(model, contrast, ["layers.12.output"], name="kind", methods=["mean_difference", "pca"])
        >>> {method: directions.best().metrics["auc"] for method, directions in by_method.items()}
    """
    of_type(contrast, ContrastSet, "the contrast set", "make it with ContrastSet.from_pairs(tokenizer, pairs) or from_sets")
    of_type(sites, (list, tuple), "the sites", "pass a list such as ['layers.*.output']")
    if not sites:
        raise ConfigError("no sites to read", expected="at least one", found="none", remedy="e.g. sites=['layers.*.output']")
    of_type(methods, (list, tuple), "the methods", f"pass a list of some of {', '.join(EXTRACTORS)}")
    if not methods:
        raise ConfigError("no methods to read with", expected="at least one", found="none", remedy="e.g. methods=['mean_difference']")
    extractors = {method: extractor_of(method) for method in methods}
    for method, extractor in extractors.items():
        extractor.check(method, contrast.paired)
    anatomy = Anatomy.find(model)
    chosen_sites = list(dict.fromkeys(anatomy.sites(*map(str, sites))))
    train, held_out = contrast.split(holdout, seed)
    needs = {need for extractor in extractors.values() for need in extractor.needs}
    moments = read_moments(model, train, chosen_sites, span, needs, progress)
    vectors: dict[Site, Tensor] = {}
    for site, at_site in moments.items():
        raw = {method: extractor.read(method, at_site) for method, extractor in extractors.items()}
        vectors[site] = torch.stack([scaled(vector, at_site, site, method) for method, vector in raw.items()])  # [methods, width]
    metrics = heldout_metrics(model, held_out, vectors, span, progress)
    provenance = provenance_of(anatomy, contrast, train, holdout, seed)
    by_method = {}
    for k, method in enumerate(extractors):
        entries = []
        for site in chosen_sites:
            vector = vectors[site][k].float().cpu()
            known = {**moments[site].along(vector), "n_train": float(len(train))}
            entries.append(Direction(site, vector, method, span, {**metrics[site][k], **known}, train.digests()))
        by_method[method] = Directions(entries, name, {**provenance, "method": method})
    return by_method


def read_moments(
    model: nn.Module, contrast: ContrastSet, sites: Sequence[Site], span: str | int, needs: set[str], progress: bool
) -> dict[Site, ContrastMoments]:
    """Moments of all texts of a contrast at every site, from one pass. needs: keys of `moments.NEEDS`."""
    rows, sides = contrast.rows()
    moments = {site: ContrastMoments(torch.tensor(sides), contrast.paired, needs) for site in sites}
    capture(model, rows, dict(moments), span=span, group=2 if contrast.paired else 1, progress="extracting" if progress else None)
    return moments


def provenance_of(anatomy: Anatomy, contrast: ContrastSet, train: ContrastSet, holdout: float, seed: int) -> dict[str, Any]:
    """What a direction was made from, but for the method. `fitted_on` lists the texts that had a part in it."""
    return {
        "model": anatomy.fingerprint(),
        "data_sha256": contrast.digest(),
        "fitted_on": sorted(train.digests()),
        "paired": contrast.paired,
        "held_out": "groups" if contrast.groups else "texts",
        **({"groups_fitted_on": sorted(set(train.groups))} if contrast.groups else {}),
        "holdout": holdout,
        "seed": seed,
    }


def scaled(raw: Tensor, moments: ContrastMoments, site: Site, method: str | None = None) -> Tensor:
    """Points the vector at the positive class and gives it the length of the class gap along it.

    Args:
        method: the extractor that gave the vector, for the error.

    Raises:
        ContrastError: there is no gap along it.
    """
    unit = raw / raw.norm()
    along = torch.dot(moments.gap, unit)
    if not bool(torch.isfinite(along)) or float(along.abs()) <= 1e-9 * moments.activation_norm:
        apart = float(moments.gap.norm())
        if method is not None and apart > 1e-6 * moments.activation_norm:
            raise _right_angle_error(site, method, apart)
        raise _gap_error(site, along, moments)
    return unit * along


def _right_angle_error(site: Site, method: str, apart: float) -> ContrastError:
    return ContrastError(
        f"the extractor '{method}' gives a vector along which the two classes do not differ at '{site}'",
        expected="one that is not at right angles to the difference of the class means",
        found=f"no gap along it, where the class means are {apart:.3g} apart",
        remedy="use another method, site or span; correct the extractor if it is your own",
    )


def _gap_error(site: Site, along: Tensor, moments: ContrastMoments) -> ContrastError:
    return ContrastError(
        f"the two classes do not differ at '{site}'",
        expected="class means that are apart",
        found=f"a gap of {float(along.abs().nan_to_num()):.3g} beside activations of length {moments.activation_norm:.3g}",
        remedy="use another site or span, or texts that differ there",
    )
