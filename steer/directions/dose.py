"""Dose-response curves: how strongly to steer.

The relative dose is |strength x v| / mean |h| at the site. The curve over a range of doses tells how far the edit shifts the answers of
pairs that the direction was not read from, and what it breaks in neutral text. The dose with the largest effect usually lies where the
model falls apart; the one that is chosen does least damage among those that work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import finite_number, number_within, of_type
from steer.directions.contrast import ContrastSet
from steer.directions.direction import Direction, check_direction
from steer.directions.sweep import Predictions, pair_gaps, sweep, sweep_plan
from steer.errors import ConfigError, ContrastError
from steer.model.tokens import Row, check_rows

_NEUTRAL = "give running text made with steer.model.tokens.plain"
DOSES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class DosePoint:
    """One dose.

    Attributes:
        dose, strength: |strength x v| / mean |h|, and the strength that gives it.
        effect, effect_se: how much the log-probability of the positive answers gains on that of the negative ones over the unsteered
            model, mean over pairs and its standard error, in nat per token.
        wrong_way: share of pairs that move the other way.
        kl: mean KL divergence of the next token on neutral text, from the unsteered to the steered model, in nat.
        perplexity_ratio: perplexity of neutral text over that of the unsteered model.
    """

    dose: float
    strength: float
    effect: float
    effect_se: float
    wrong_way: float
    kl: float
    perplexity_ratio: float


@dataclass(frozen=True)
class DoseCurve:
    """Effect and damage over doses.

    Attributes:
        points: in order of dose.
        max_kl, max_perplexity_ratio: the side-effect budget: KL from the unsteered model in nat per token, and the ratio of perplexities.
        share: of the largest effect within the budget that a dose must reach to work well enough.
        gap: the unsteered model's preference for the positive answers, nat per token; perplexity: its perplexity on the neutral text.
        site, method, scope: where the direction was added, how it was made, and on which tokens it was added.
        n_pairs, n_neutral: numbers of texts that were measured.

    Example:
        >>> curve = steer.dose_curve(model, direction, held_out, neutral, doses=[0.1, 0.3], max_kl=5.0, max_perplexity_ratio=5.0)
        >>> len(curve.working), curve.to_dict()["chosen"]
    """

    site: str
    method: str
    scope: str
    points: tuple[DosePoint, ...]
    max_kl: float
    max_perplexity_ratio: float
    share: float
    gap: float
    perplexity: float
    n_pairs: int
    n_neutral: int

    def __repr__(self) -> str:
        doses = ", ".join(f"{point.dose:.3g}" for point in self.working) or "none"
        return f"DoseCurve({self.method} at {self.site} on {self.scope} tokens, {len(self.points)} doses, working: {doses})"

    @property
    def working(self) -> tuple[DosePoint, ...]:
        """The working range: doses below the first that breaks the budget, whose effect exceeds two standard errors and `share` of the
        largest effect among them. Empty when there is none."""
        within: list[DosePoint] = []
        for point in self.points:
            if point.kl > self.max_kl or point.perplexity_ratio > self.max_perplexity_ratio:
                break
            within.append(point)
        acting = [point for point in within if point.effect > 2 * point.effect_se]
        best = max((point.effect for point in acting), default=0.0)
        return tuple(point for point in acting if point.effect >= self.share * best)

    @property
    def chosen(self) -> DosePoint:
        """The point of the working range that does the least damage. Raises ConfigError when the range is empty."""
        if not self.working:
            raise _budget_error(self)
        return min(self.working, key=lambda point: (point.kl, point.dose))

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `chosen` is None when no dose works."""
        return {**asdict(self), "points": [asdict(point) for point in self.points], "chosen": asdict(self.chosen) if self.working else None}


def dose_curve(
    model: nn.Module,
    direction: Direction,
    contrast: ContrastSet,
    neutral: Sequence[Row],
    *,
    doses: Sequence[float] = DOSES,
    scope: str = "response",
    max_kl: float = 0.1,
    max_perplexity_ratio: float = 1.1,
    share: float = 0.5,
    progress: bool = True,
) -> DoseCurve:
    """Measures the dose-response curve of adding a direction; all doses of a text run in one batch.

    Args:
        model: a causal language model, raw or wrapped.
        direction: with its metrics, as `extract` gives it.
        contrast: pairs of answers that had no part in the direction. What is reported about the chosen dose belongs on a third part.
        neutral: running text (see `steer.model.tokens.plain`) that has nothing to do with the concept.
        doses: relative doses above 0.
        scope: on which tokens the direction is added, see `steer.intervene.scope`.
        max_kl, max_perplexity_ratio, share: see `DoseCurve`.

    Raises:
        ContrastError: fewer than two pairs, no neutral text, or texts that the direction was made from.
        ConfigError: no doses, or one that is not above 0; a budget or share that is no number; a scope of decoded tokens.

    Example:
        >>> curve = steer.dose_curve(model, direction, held_out, neutral, doses=[0.1, 0.3])
        >>> [(point.dose, point.effect, point.kl) for point in curve.points]
    """
    check_direction(direction)
    of_type(contrast, ContrastSet, "the contrast set", "make it with ContrastSet.from_pairs(tokenizer, pairs)")
    of_type(doses, (list, tuple), "the doses", "pass a list such as [0.1, 0.5]")
    for dose in doses:
        finite_number(dose, "a dose")
    if not doses or min(doses) <= 0:
        raise _doses_error(doses)
    _check_neutral(direction, neutral)
    number_within(max_kl, "max_kl", 0)
    number_within(max_perplexity_ratio, "max_perplexity_ratio", 0)
    number_within(share, "the share of the largest effect", 0, 1)
    if len(contrast.positive) < 2:
        raise ContrastError(
            "one pair has no standard error", expected="two pairs or more", found=len(contrast.positive), remedy="give more pairs"
        )
    doses = sorted(doses)
    strengths = [direction.strength_of(dose) for dose in (0.0, *doses)]
    vectors = torch.tensor(strengths)[:, None] * direction.vector
    gaps = pair_gaps(model, direction, contrast, vectors, "dose: pairs" if progress else None, scope=scope)
    kl, loss = side_effects(model, direction, neutral, vectors, "dose: neutral text" if progress else None, scope=scope)
    gained = gaps[1:] - gaps[0]
    points = tuple(
        DosePoint(
            dose=dose,
            strength=strengths[i + 1],
            effect=float(gained[i].mean()),
            effect_se=float(gained[i].std() / gained.shape[1] ** 0.5),
            wrong_way=float((gained[i] < 0).double().mean()),
            kl=float(kl[i + 1]),
            perplexity_ratio=float((loss[i + 1] - loss[0]).exp()),
        )
        for i, dose in enumerate(doses)
    )
    return DoseCurve(
        site=str(direction.site),
        method=direction.method,
        scope=scope,
        points=points,
        max_kl=max_kl,
        max_perplexity_ratio=max_perplexity_ratio,
        share=share,
        gap=float(gaps[0].mean()),
        perplexity=float(loss[0].exp()),
        n_pairs=gaps.shape[1],
        n_neutral=len(neutral),
    )


def side_effects(
    model: nn.Module, direction: Direction, neutral: Sequence[Row], vectors: Tensor, progress: str | None = None, *, scope: str = "response"
) -> tuple[Tensor, Tensor]:
    """What adding each vector at the direction's site does to text that has nothing to do with it.

    Args:
        vectors: [slots, width]; the first is what the others are compared with, as a rule zero.

    Returns:
        Next-token KL divergence from the first, and loss, both [slots] fp64, mean over the response tokens of all texts, in nat.

    Raises:
        ContrastError: no texts, some without a token to predict, or some that the direction was made from.
    """
    _check_neutral(direction, neutral)
    sums = torch.zeros(2, len(vectors), dtype=torch.float64)
    tokens = 0

    def read(predictions: Predictions) -> None:
        nonlocal tokens
        targets = predictions.targets.to(predictions.logits.device)
        tokens += len(targets)
        before = predictions.logits[0].float().log_softmax(-1)  # [n, vocabulary]
        expected = before.exp()
        for slot, logits in enumerate(predictions.logits):
            after = logits.float().log_softmax(-1)
            sums[0, slot] += (expected * (before - after)).sum(dtype=torch.float64).cpu()
            sums[1, slot] -= after.gather(-1, targets[:, None]).double().sum().cpu()

    sweep(model, sweep_plan(direction.site, vectors, scope), neutral, len(vectors), read, progress=progress)
    kl, loss = sums / tokens
    return kl, loss


def _check_neutral(direction: Direction, neutral: Sequence[Row]) -> None:
    check_rows(neutral, "the neutral texts")
    direction.check_unseen(neutral, "the neutral texts")
    if not neutral:
        raise ContrastError("no neutral text", expected="at least one", found="none", remedy=_NEUTRAL)
    for i, row in enumerate(neutral):
        if len(row.ids) < 2 or row.response == 0:
            raise _short_error(i, row)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL divergence of log-probabilities over the last dimension, in nat, fp64."""
    return (before.exp() * (before - after)).sum(-1, dtype=torch.float64)


def _budget_error(curve: DoseCurve) -> ConfigError:
    return ConfigError(
        f"no dose at '{curve.site}' works within the budget",
        expected=f"an effect beyond two standard errors at KL <= {curve.max_kl} and perplexity ratio <= {curve.max_perplexity_ratio}",
        found="; ".join(f"dose {p.dose:g}: effect {p.effect:.3g} +- {p.effect_se:.2g}, KL {p.kl:.3g}" for p in curve.points),
        remedy="try another site or method, smaller doses, more pairs, or a larger budget",
    )


def _doses_error(doses: Sequence[float]) -> ConfigError:
    return ConfigError(
        "doses must be above 0",
        expected="relative doses such as 0.1 or 0.5; 0 is measured in any case",
        found=list(doses),
        remedy="leave out the others; to steer the other way, swap the two sides of the contrast",
    )


def _short_error(index: int, row: Row) -> ContrastError:
    return ContrastError(
        f"neutral text {index} has no token to predict",
        expected="two tokens or more, of which some are the response",
        found=f"{len(row.ids)} tokens, {row.response} of them response",
        remedy=_NEUTRAL,
    )
