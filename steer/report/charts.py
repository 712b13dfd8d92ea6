"""Charts of the page, each drawn when the page asks for it, with words for those who do not see it; None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer.report import numbers, run_plots, view
from steer.report.canvas import both_widths
from steer.report.curves import natural
from steer.report.dose_plot import draw_sweep, sweep_curves, sweep_outcomes
from steer.report.items_plot import draw_items, moved
from steer.report.numbers import number
from steer.report.primary_plot import draw_primary, has_rows
from steer.report.rows import arm_rows, axis_label, is_change, primary_outcome, readable
from steer.report.trade_off_plot import draw_guardrails, draw_trade_off, trade_off_words, trade_offs


class Charts:
    """The charts of one tree. markup: makes text that the template takes for HTML."""

    def __init__(self, metrics: Mapping[str, Any], markup: Any) -> None:
        self.metrics = metrics
        self.markup = markup

    def _svg(self, draw: Any, *args: Any, key: str, title: str, description: str) -> Any:
        return self.markup(both_widths(draw, *args, key=key, title=title, description=description))

    @property
    def primary(self) -> Any:
        """Arms on the axis of the primary outcome."""
        outcome = primary_outcome(self.metrics)
        if outcome is None or not has_rows(self.metrics):
            return None
        signed = is_change(self.metrics, outcome)
        words = "; ".join(f"{row.name}: {row.words(signed=signed)}" for row in arm_rows(self.metrics, outcome))
        return self._svg(draw_primary, self.metrics, key="primary", title=f"{readable(outcome)} in each arm", description=f"{words}.")

    @property
    def trade_off(self) -> Any:
        """Effect against damage."""
        points = trade_offs(self.metrics)
        if not points:
            return None
        words = "; ".join(trade_off_words(point) for point in points)
        return self._svg(draw_trade_off, self.metrics, key="trade-off", title="Effect against damage", description=f"{words}.")

    @property
    def other_trade_offs(self) -> list[dict[str, Any]]:
        """Effect against damage in every guardrail after the first."""
        drawn = []
        for number_, points in enumerate(self.metrics.get("trade_off_others") or [], 2):
            metrics = {**self.metrics, "trade_off": points}
            if points := trade_offs(metrics):
                words = "; ".join(trade_off_words(point) for point in points)
                title = f"Effect against {readable(str(points[0]['guardrail']))}"
                svg = self._svg(draw_trade_off, metrics, key=f"trade-off-{number_}", title=title, description=f"{words}.")
                drawn.append({"title": title, "svg": svg, "words": [trade_off_words(point) for point in points]})
        return drawn

    @property
    def guardrails(self) -> Any:
        """Harm beside its margin."""
        rows = view.guardrail_rows(self.metrics)
        if not rows:
            return None
        arms = view.indices_of(self.metrics)
        words = " ".join(str(row.get("verdict") or "") for row in rows)
        return self._svg(draw_guardrails, rows, arms, key="guardrails", title="Guardrails and their margins", description=words)

    @property
    def sweep(self) -> Any:
        """Dose and response."""
        outcomes = sweep_outcomes(self.metrics)
        if not outcomes:
            return None
        words = "; ".join(
            f"{readable(outcome)}, {name}: " + ", ".join(f"{number(point['mean'])} at {point['dose']:g}" for point in points)
            for outcome in outcomes
            for name, _, points in sweep_curves(self.metrics, outcome)
        )
        return self._svg(draw_sweep, self.metrics, key="sweep", title="Outcomes by dose", description=f"{words}.")

    @property
    def items(self) -> Any:
        """Difference of every item in the primary contrast."""
        items = moved(self.metrics)
        contrasts = self.metrics.get("contrasts") or []
        if not items or not contrasts:
            return None
        first = contrasts[0]
        label = axis_label(self.metrics, str(first["metric"]), f"{first['a']} \N{MINUS SIGN} {first['b']}")
        ends = [f"{item['id']} {number(item['difference'], signed=True)}" for item in (items[0], items[-1])]
        description = f"{len(items)} items, from {ends[0]} to {ends[1]}."
        better = view.primary_better(self.metrics)
        return self._svg(draw_items, items, better, label, key="items", title="Difference of each item", description=description)

    @property
    def separation(self) -> dict[str, Any] | None:
        """Held-out AUC by site, as a figure and as rows."""
        trait = self.metrics.get("trait") or {}
        auc = {site: float(value) for site, value in (trait.get("auc_by_site") or {}).items() if numbers.measured(value)}
        if not auc:
            return None
        rows = [(site, number(auc[site], digits=3)) for site in sorted(auc, key=natural)]
        used = trait.get("site")
        ends = " to ".join(number(end, digits=3) for end in (min(auc.values()), max(auc.values())))
        description = f"From {ends} over {len(auc)} sites; 0.5 is chance. Site used: {used or 'not recorded'}."
        svg = self._svg(run_plots.draw_separation, auc, used, key="auc", title="Held-out AUC by site", description=description)
        return {"svg": svg, "rows": rows}

    @property
    def losses(self) -> dict[str, Any] | None:
        """Training losses as a figure, with a table of first and last values."""
        runs = view.training_losses(self.metrics)
        if not runs:
            return None
        rows = [(label, len(loss), *(number(float(x)) for x in _ends(loss))) for label, _, loss in runs]
        description = " ".join(f"{label}: from {first} to {last} in {steps} steps." for label, steps, first, last in rows)
        svg = self._svg(run_plots.draw_losses, runs, key="loss", title="Training loss by arm", description=description)
        return {"svg": svg, "rows": rows, "width": max(run_plots.running_width(len(loss)) for _, _, loss in runs)}


def _ends(loss: Sequence[float]) -> tuple[float, float]:
    """First and last value of the running mean."""
    smooth = run_plots.running_mean(loss, run_plots.running_width(len(loss)))
    return smooth[0], smooth[-1]
