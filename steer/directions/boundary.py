"""Activation boundaries: the ranges that harmless text has, fitted to a budget of loss on neutral text (arXiv 2412.17034)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steer.checks import finite_number, of_type
from steer.directions.contrast import text_digest
from steer.errors import ConfigError, ContrastError
from steer.intervene import Intervention, Plan
from steer.intervene.operators.bound import Bound
from steer.model.anatomy import Anatomy
from steer.model.capture import capture
from steer.model.likelihood import response_logprobs
from steer.model.site import Site
from steer.model.tokens import Row, check_rows

WIDTHS = (0.6, 0.8, 1.0, 1.25, 1.6, 2.5)  # of a range, in parts of that of harmless text


@dataclass(frozen=True)
class Boundary:
    """Bounds that were fitted.

    Attributes:
        plan: a `bound` at every site. widths: of the range at each site, in parts of that of harmless text.
        loss, bounded_loss: of the neutral text without and with the plan, nat per token.

    Example:
        >>> boundary = steer.fit_boundary(model, harmless, neutral, ["layers.12.output"], max_nats=0.5)
        >>> with boundary.plan.attached(model):
        ...     model.generate(**prompt, max_new_tokens=2)
    """

    plan: Plan
    widths: dict[str, float]
    loss: float
    bounded_loss: float

    def __repr__(self) -> str:
        cost = self.bounded_loss - self.loss
        narrow, wide = min(self.widths.values()), max(self.widths.values())
        return f"Boundary({len(self.widths)} sites, widths {narrow:g} to {wide:g}, {cost:+.3g} nat per token on neutral text)"


class _Range:
    """Accumulator: least and largest value of every dimension over the tokens of the span."""

    low: Tensor | None = None
    high: Tensor | None = None

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        used = h[weight > 0].float()  # [tokens, width]
        low, high = used.amin(0).cpu(), used.amax(0).cpu()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def bound(self, width: float, softness: float) -> Bound:
        """The range about its middle, so many times as wide."""
        assert self.low is not None and self.high is not None
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        return Bound(middle - width * half, middle + width * half, softness)


def fit_boundary(
    model: nn.Module,
    harmless: Sequence[Row],
    neutral: Sequence[Row],
    sites: Sequence[str | Site],
    *,
    max_nats: float = 0.02,
    softness: float = 0.1,
    widths: Sequence[float] = WIDTHS,
    progress: bool = True,
) -> Boundary:
    """Fits the tightest ranges that cost little: every site first by itself, with its share of the budget, then all together.

    Args:
        model: a causal language model, raw or wrapped.
        harmless: texts whose activations, at every token, are the range of width 1.
        neutral: other texts, on whose responses the loss may rise.
        sites: sites or patterns such as `layers.10-20.output`.
        max_nats: the most that the loss may rise, nat per token.
        widths: that are tried, in parts of the range of harmless text.
        softness: of the bounds, see `steer.Bound`.

    Raises:
        ContrastError: no texts, or a text that is both. ConfigError: no width is wide enough; a budget or a width that is not above 0.

    Example:
        >>> boundary = steer.fit_boundary(model, harmless, neutral, ["layers.12.output"], max_nats=0.5)
        >>> boundary.widths, boundary.bounded_loss - boundary.loss  # at most 0.5 nat per token
    """
    for what, rows in (("the harmless texts", harmless), ("the neutral texts", neutral)):
        check_rows(rows, what)
    if not harmless or not neutral or (shared := len(set(map(text_digest, harmless)) & set(map(text_digest, neutral)))):
        raise _texts_error(len(harmless), len(neutral), shared if harmless and neutral else 0)
    of_type(widths, (list, tuple), "the widths of a boundary", "pass a list of numbers, e.g. [0.8, 1.0, 1.5]")
    for value, what in ((max_nats, "the budget of a boundary"), *((width, "a width of a boundary") for width in widths)):
        finite_number(value, what, above=0)
    if not widths:
        raise ConfigError("no widths to try", expected="at least one", found="none", remedy="e.g. widths=[1.0, 1.5]")
    steps = sorted(widths)
    chosen = list(dict.fromkeys(Anatomy.find(model).sites(*map(str, sites))))
    if not chosen:
        raise ConfigError("no sites to bound", expected="at least one", found="none", remedy="e.g. sites=['layers.10-20.output']")
    ranges = {site: _Range() for site in chosen}
    capture(model, harmless, dict(ranges), span="all", progress="reading ranges" if progress else None)

    def plan_of(steps_of: dict[Site, int]) -> Plan:
        return Plan([Intervention(ranges[site].bound(steps[step], softness), site) for site, step in steps_of.items()])

    def loss_of(plan: Plan | None) -> float:
        if plan is None:
            return -float(response_logprobs(model, neutral, pad=0).mean())
        with plan.attached(model, stack=True):
            return loss_of(None)

    loss = loss_of(None)
    last = len(steps) - 1
    widened = {}
    for site in chosen:
        alone = (step for step in range(last) if loss_of(plan_of({site: step})) - loss <= max_nats / len(chosen))
        widened[site] = next(alone, last)
    while True:
        plan = plan_of(widened)
        bounded = loss_of(plan)
        if bounded - loss <= max_nats:
            return Boundary(plan, {str(site): steps[step] for site, step in widened.items()}, loss, bounded)
        if all(step == last for step in widened.values()):
            raise _budget_error(bounded - loss, max_nats, steps[last])
        widened = {site: min(step + 1, last) for site, step in widened.items()}


# ---- errors


def _texts_error(harmless: int, neutral: int, shared: int) -> ContrastError:
    return ContrastError(
        "texts do not fit a boundary",
        expected="harmless and neutral texts, none of them both: on those that it was fitted to, a boundary costs nothing",
        found=f"{harmless} harmless and {neutral} neutral ones, {shared} both",
        remedy="split the texts first",
    )


def _budget_error(cost: float, most: float, width: float) -> ConfigError:
    return ConfigError(
        "no boundary keeps the loss on neutral text within the budget",
        expected=f"at most {most:g} nat per token",
        found=f"{cost:.3g} at the largest width, {width:g}",
        remedy="give more harmless texts, larger widths, fewer sites, or a larger max_nats",
    )
