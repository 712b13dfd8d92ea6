"""Statistics of features on texts: how often they are on, how strongly, and their mean pre-activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.errors import ConfigError
from steer.features.dictionary import Dictionary, Features
from steer.features.encoder import TILE, chosen
from steer.features.provenance import Untrained
from steer.model.capture import capture
from steer.model.site import Site
from steer.model.span import span_of
from steer.model.tokens import Row


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """What features are on texts; tokens that the dictionary was not trained on are left out.

    Attributes:
        density: [chosen] share of tokens on which each feature is on.
        mean: [chosen] mean of each feature over all tokens, 0 where it is off.
        maximum: [chosen] its largest value.
        mean_pre: [chosen] mean pre-activation.
        tokens: number of tokens.

    Example:
        >>> statistics = steer.features.feature_statistics(model, dictionary, rows)
        >>> statistics.density.shape, statistics.tokens
    """

    density: Tensor
    mean: Tensor
    maximum: Tensor
    mean_pre: Tensor
    tokens: int


@torch.no_grad()
def feature_statistics(
    model: nn.Module,
    dictionary: Dictionary,
    rows: Sequence[Row],
    features: Features | None = None,
    *,
    span: str | int = "all",
    max_tokens: int = 4096,
) -> FeatureStatistics:
    """Measures features on texts: density, mean, maximum and mean pre-activation.

    Args:
        model: anything `Plan.attach` takes. Plans that are attached stay in force.
        rows: the texts, from `steer.model.tokens.plain` or `encode`.
        features: which; all when None, one after the other in tiles.
        span: tokens of each text, see `steer.model.span.span_of`.
        max_tokens: padded tokens per batch.

    Raises:
        ConfigError: no dictionary, or texts whose tokens it was all not trained on. Otherwise as `steer.capture`.

    Example:
        >>> statistics = steer.features.feature_statistics(model, dictionary, rows, [3, 40])
        >>> statistics.density, statistics.maximum  # [chosen]
    """
    of_type(dictionary, Dictionary, "the dictionary", "load one with steer.load_dictionary")
    indices = None if features is None else chosen(features, dictionary.width)
    sums = _Sums(dictionary, indices, [span_of(row, span)[0] for row in rows] if isinstance(rows, list | tuple) else [])
    sites = list(dict.fromkeys(dictionary.reads))
    capture(model, rows, {site: _AtSite(sums, site) for site in sites}, span=span, max_tokens=max_tokens)
    if sums.tokens == 0:
        raise _no_trained_tokens(dictionary, len(rows))
    count = sums.tokens
    return FeatureStatistics(
        (sums.on / count).float(), (sums.total / count).float(), sums.largest.float(), (sums.total_pre / count).float(), count
    )


class _Sums:
    """Sums over the tokens of all batches, fp64 on the CPU.

    Attributes:
        starts: place of the first token of the span in each text.
        waiting: activations of the sites of the batch that runs, until all are there.
    """

    def __init__(self, dictionary: Dictionary, features: Tensor | None, starts: list[int]) -> None:
        self.dictionary, self.features, self.starts = dictionary, features, torch.tensor(starts)
        size = dictionary.width if features is None else len(features)
        self.on, self.total, self.total_pre = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
        self.largest = torch.zeros(size, dtype=torch.float64)
        self.tokens = 0
        self.waiting: dict[Site, Tensor] = {}

    def update(self, site: Site, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        reads = self.dictionary.reads
        self.waiting[site] = h.float()
        if len(self.waiting) < len(set(reads)):
            return
        is_meant = weight.bool()
        positions = _positions(weight, self.starts, rows)
        several = len(reads) > 1
        read = torch.stack([self.waiting[each] for each in reads], -2) if several else self.waiting[site]
        self.waiting = {}
        inside = self.dictionary.untrained.trained_on(read, positions.unsqueeze(-1) if several else positions)
        if inside is not None:
            is_meant = is_meant & (inside.all(-1) if several else inside)
        tokens = read[is_meant]  # [tokens, (sites,) width]
        for part in tokens.split(max(1, TILE // self.dictionary.width)):
            self._add(part)

    def _add(self, h: Tensor) -> None:
        f = self.dictionary.encode(h) if self.features is None else self.dictionary.encode_selected(h, self.features)
        pre = self.dictionary.pre_activations(h, self.features)
        self.tokens += len(h)
        self.on += (f != 0).sum(0).double().cpu()
        self.total += f.double().sum(0).cpu()
        self.total_pre += pre.double().sum(0).cpu()
        if len(h):
            self.largest = torch.maximum(self.largest, f.amax(0).double().cpu())


class _AtSite:
    """Accumulator of one of the sites that a dictionary reads."""

    def __init__(self, sums: _Sums, site: Site) -> None:
        self.sums, self.site = sums, site

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        self.sums.update(self.site, h, weight, rows)


def read_tokens(
    model: nn.Module, site: Site, rows: Sequence[Row], *, span: str | int = "all", first: int = 0, max_norm: float | None = None
) -> Tensor:
    """[tokens, width] fp32 activations at a site, on the CPU, but for tokens that a dictionary was not trained on. Raises as `capture`."""
    kept = _Kept(Untrained(first, max_norm), [span_of(row, span)[0] for row in rows])
    capture(model, rows, {site: kept}, span=span)
    return torch.cat(kept.parts)


class _Kept:
    """Accumulator of activations."""

    def __init__(self, untrained: Untrained, starts: list[int]) -> None:
        self.untrained, self.starts = untrained, torch.tensor(starts)
        self.parts: list[Tensor] = []

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        inside = self.untrained.trained_on(h, _positions(weight, self.starts, rows))
        is_meant = weight.bool() if inside is None else weight.bool() & inside
        self.parts.append(h[is_meant].float().cpu())


def _positions(weight: Tensor, starts: Tensor, rows: Tensor) -> Tensor:
    """[batch, tokens] place of each token in its text. weight: as `Accumulator.update` gets it; starts: of the span in each text."""
    columns = torch.arange(weight.shape[1], device=weight.device) - weight.argmax(1, keepdim=True)  # from the first token of the span
    return columns + starts[rows.cpu()].to(weight.device)[:, None]


# ---- errors


def _no_trained_tokens(dictionary: Dictionary, texts: int) -> ConfigError:
    untrained = dictionary.untrained
    return ConfigError(
        "the texts have no token of the kind that this dictionary was trained on",
        expected=f"tokens after the first {untrained.first}" + (f", no longer than {untrained.max_norm:.4g}" if untrained.max_norm else ""),
        found=f"none in {texts} texts",
        remedy="give longer texts, or another span",
    )
