"""Probes: directions that read labels off activations, judged on held-out texts or groups, beside probes of random labels.

What a probe fits of labels that mean nothing is what it can fit by its size alone (Hewitt and Liang 2019, arXiv 1909.03368); `selectivity`
is what it reads beyond that. A new probe is a file with one registered function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import scipy.stats
import torch
from torch import Tensor, nn

from steer.checks import errors_of, of_type, one_of, whole_number
from steer.directions.contrast import text_digest
from steer.directions.direction import Direction, Directions
from steer.directions.extractor import EXTRACTORS, extractor_of
from steer.directions.heldout import auc, group_separation, separation
from steer.directions.moments import ContrastMoments
from steer.errors import ConfigError, ContrastError
from steer.lens.labelled import LabelledTexts
from steer.model.accumulator import TextAccumulator, pool
from steer.model.anatomy import Anatomy
from steer.model.capture import capture
from steer.model.site import Site
from steer.registry import Registry

Target = Literal["number", "class"]
MAIN = {"number": "rank_correlation", "class": "auc"}  # the metric that controls are compared by; R2 of random labels has no lower bound


@dataclass(frozen=True)
class Probe:
    """A method that fits labels.

    Attributes:
        fit: takes activations [texts, width] and labels [texts], both fp64, the activations about their mean and of mean square 1; gives
            weights [width] and an intercept.
        target: `number`, or `class` for labels 1 and 0.
    """

    fit: Callable[[Tensor, Tensor], tuple[Tensor, float]]
    target: Target

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.fit.__doc__


PROBES: Registry[Probe] = Registry("probe", "steer.lens.probes", "steer.probes", instance_of=Probe)


def probe(name: str, *, target: Target) -> Callable[[Callable[[Tensor, Tensor], tuple[Tensor, float]]], Probe]:
    """Registers a function as the probe of that name; the options are those of `Probe`."""
    register = PROBES.register(name)
    one_of(target, list(MAIN), f"`target` of the probe '{name}'")
    return lambda fit: register(Probe(fit, target))


def fit_probe(
    model: nn.Module,
    texts: LabelledTexts,
    sites: Sequence[str | Site],
    *,
    name: str,
    method: str,
    span: str | int = "response",
    holdout: float = 0.25,
    seed: int = 0,
    controls: int = 5,
    progress: bool = True,
) -> Directions:
    """Fits a probe at every site, from one pass.

    Args:
        model: a decoder, raw or wrapped.
        texts: a share `holdout` of them, or of their groups, is kept out of the fit and used for the metrics.
        sites: sites or patterns such as `layers.*.output`.
        method: a key of `PROBES`; for two classes also one of `EXTRACTORS` that needs no pairs.
        span: which tokens of a text are averaged, see `extract`.
        controls: how many probes of random labels are fitted beside it.

    Returns:
        Directions that point to larger labels. Adding one once moves a text by the class gap along it, by one standard deviation of the
        texts for numbers. Metrics, all on what was held out:
        `auc`, `dprime` of classes as of `extract`; `r2`, `rank_correlation` (Spearman) of numbers;
        `control`: mean `auc` or `rank_correlation` of the probes of random labels, `selectivity`: how much more it is with the real ones,
        `control_fit`: the same of the random labels that they were fitted on, 1 where the probe can fit anything;
        `slope`, `intercept`: the label is intercept + slope * (h on the direction at length 1), for classes its log-odds up to a constant.

    Raises:
        ContrastError: too few texts, groups or classes, or a probe without any direction. ConfigError, SiteError, NonFiniteError.

    Example:
        >>> probes = steer.fit_probe(model, labelled, ["layers.12.output"], name="it or us", method="logistic", controls=2)
        >>> probes.best().metrics["selectivity"]
    """
    of_type(texts, LabelledTexts, "the labelled texts of a probe", "make them with LabelledTexts(rows, labels), from_texts or from_answers")
    of_type(sites, (list, tuple), "the sites", "pass a list such as ['layers.*.output']")
    whole_number(controls, "the number of probes of random labels")
    chosen = probe_of(method)
    fitted, held = texts.split(holdout, seed, classes=chosen.target == "class")
    anatomy = Anatomy.find(model)
    pooled = {site: _Pooled(len(texts.rows)) for site in dict.fromkeys(anatomy.sites(*map(str, sites)))}
    if not pooled:
        raise ConfigError("no sites to probe", expected="at least one", found="none", remedy="e.g. sites=['layers.*.output']")
    capture(model, texts.rows, dict(pooled), span=span, progress="probing" if progress else None)
    labels = torch.tensor(texts.labels, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [labels[torch.randperm(len(labels), generator=generator)] for _ in range(controls)]
    digests = frozenset(text_digest(texts.rows[i]) for i in fitted)
    entries = []
    for site, states in pooled.items():
        trial = _Trial(method, chosen, states.values, fitted, held, texts.groups)
        weights, intercept = trial.weights(labels)
        metrics = {**trial.judged(labels, weights), **trial.against_chance(labels, weights, shuffled)}
        vector, known = _scaled(trial, site, labels, weights, intercept)
        known |= {"activation_norm": float(states.norms[fitted].mean()), "n_train": float(len(fitted))}
        entries.append(Direction(site, vector, method, span, {**metrics, **known}, digests))
    provenance = {
        "model": anatomy.fingerprint(),
        "method": method,
        "fitted_on": sorted(digests),
        "held_out": "groups" if texts.groups else "texts",
        **({"groups_fitted_on": sorted({texts.groups[i] for i in fitted})} if texts.groups else {}),
        **({"token": texts.token} if texts.token else {}),
        "holdout": holdout,
        "seed": seed,
    }
    return Directions(entries, name, provenance)


def probe_of(method: str) -> Probe:
    """The probe of that name, or an extractor as one. Raises ConfigError for an unknown name, ContrastError for one that needs pairs."""
    if method in PROBES or method not in EXTRACTORS:
        found = PROBES.get(method)
        of_type(found, Probe, f"probe '{method}'", f"register its function with @probe('{method}', target=...)")
        return found
    extractor = extractor_of(method)
    extractor.check(method, paired=False)

    def fit(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
        moments = ContrastMoments(y > 0.5, False, extractor.needs)
        moments.update(x[:, None].float(), torch.ones(len(x), 1), torch.arange(len(x)))
        vector = extractor.read(method, moments)
        return (vector if float(vector @ moments.gap) >= 0 else -vector), 0.0

    return Probe(fit, "class")


class _Pooled(TextAccumulator):
    """Accumulator: mean activation of each text's span, and mean length of its tokens. values: [texts, width] fp64; norms: [texts]."""

    def __init__(self, texts: int) -> None:
        self.values = torch.empty(texts, 0, dtype=torch.float64)
        self.norms = torch.zeros(texts, dtype=torch.float64)

    def reduce(self, h: Tensor, weight: Tensor) -> Tensor:
        """[batch, width + 1]."""
        lengths = (torch.linalg.vector_norm(h, dim=-1, dtype=torch.float32) * weight).sum(1) / weight.sum(1)
        return torch.cat([pool(h, weight), lengths[:, None]], 1)

    def add(self, values: Tensor, rows: Tensor) -> None:
        if not self.values.shape[1]:
            self.values = torch.empty(len(self.norms), values.shape[1] - 1, dtype=torch.float64)
        self.values[rows] = values[:, :-1].double()
        self.norms[rows] = values[:, -1].double()


@dataclass(frozen=True, eq=False)
class _Trial:
    """One site, and one way to hold texts out. states: [texts, width] fp64; fitted, held: indices of texts."""

    method: str
    probe: Probe
    states: Tensor
    fitted: list[int]
    held: list[int]
    groups: tuple[str, ...]

    def weights(self, labels: Tensor) -> tuple[Tensor, float]:
        """[width] and intercept for activations as they are, fitted to labels [texts]. Raises ConfigError, ContrastError."""
        x = self.states[self.fitted]
        mean, unit = x.mean(0), (x - x.mean(0)).square().mean().sqrt().clamp_min(1e-12)
        with errors_of(f"the probe '{self.method}'", "let its function give weights [width] and an intercept"):
            weights, intercept = self.probe.fit((x - mean) / unit, labels[self.fitted])
        if not isinstance(weights, Tensor) or weights.shape != mean.shape or not bool(torch.isfinite(weights).all()):
            raise _weights_error(self.method, weights, len(mean))
        weights = weights.double() / unit
        return weights, float(intercept) - float(weights @ mean)

    def judged(self, labels: Tensor, weights: Tensor) -> dict[str, float]:
        """Metrics on what was held out."""
        values, own = self.states[self.held] @ weights / weights.norm().clamp_min(1e-30), labels[self.held]
        groups = [self.groups[i] for i in self.held] if self.groups else []
        if self.probe.target == "class":
            side = own > 0.5
            return {**separation(values[side], values[~side]), **group_separation(values, side, groups)}
        known = {"rank_correlation": _rank_correlation(values, own), "n_heldout": float(len(self.held))}
        return known | ({"n_heldout_groups": float(len(set(groups)))} if groups else {})

    def against_chance(self, labels: Tensor, weights: Tensor, shuffled: Sequence[Tensor]) -> dict[str, float]:
        """`control`, `selectivity` and `control_fit`; nothing without controls."""
        if not shuffled:
            return {}
        held, fitted = [], []
        for random in shuffled:
            own, _ = self.weights(random)
            held.append(self._main(random, own, self.held))
            fitted.append(self._main(random, own, self.fitted))
        control = sum(held) / len(held)
        real = self._main(labels, weights, self.held)
        return {"control": control, "selectivity": real - control, "control_fit": sum(fitted) / len(fitted)}

    def _main(self, labels: Tensor, weights: Tensor, part: list[int]) -> float:
        values, own = self.states[part] @ weights, labels[part]
        if self.probe.target == "number":
            return _rank_correlation(values, own)
        side = own > 0.5
        return 0.5 if bool(side.all()) or not bool(side.any()) else auc(values[side], values[~side])


def _rank_correlation(values: Tensor, labels: Tensor) -> float:
    """Spearman's; 0 where one of them does not vary."""
    if float(values.std()) == 0 or float(labels.std()) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(values.numpy(), labels.numpy()).statistic)


def _scaled(trial: _Trial, site: Site, labels: Tensor, weights: Tensor, intercept: float) -> tuple[Tensor, dict[str, float]]:
    """[width] fp32 of the length that `fit_probe` says, and what is known of it. Raises ContrastError when nothing was found."""
    size = float(weights.norm())
    along = trial.states[trial.fitted] @ (weights / max(size, 1e-300))  # [texts]
    side = labels[trial.fitted] > 0.5
    gap = float(along[side].mean() - along[~side].mean()) if trial.probe.target == "class" else float(along.std())
    if size == 0 or not gap > 0:
        raise _nothing_error(trial.method, site)
    known = {"gap": gap, "mean": float(along.mean()), "slope": size, "intercept": intercept}
    if trial.probe.target == "number":
        predicted, own = intercept + trial.states[trial.held] @ weights, labels[trial.held]
        known["r2"] = 1 - float((own - predicted).square().sum() / (own - own.mean()).square().sum())
        known["sd"] = float((trial.states[trial.held] @ (weights / size)).std())
    return (weights / size * gap).float(), known


# ---- errors


def _weights_error(method: str, weights: Any, width: int) -> ConfigError:
    return ConfigError(
        f"the probe '{method}' gives no weights of this site",
        expected=f"a finite tensor [{width}], and an intercept",
        found=f"{list(weights.shape)} of {weights.dtype}" if isinstance(weights, Tensor) else type(weights).__name__,
        remedy="correct its function, or use another method",
    )


def _nothing_error(method: str, site: Site) -> ContrastError:
    return ContrastError(
        f"the probe '{method}' found nothing at '{site}'",
        expected="activations that vary with the labels on the texts it was fitted on",
        found="no direction along which they do",
        remedy="use another site, span or token, or more texts",
    )
