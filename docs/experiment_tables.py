"""The table of metrics in docs/experiments.md, see make_tables.py."""

from __future__ import annotations

from collections.abc import Callable

from steer.experiment.metric import METRICS


def metrics(markdown: Callable[..., str]) -> str:
    """Every registered metric: unit, better direction, what it needs, first line of its docstring."""
    rows = []
    for name, what in METRICS.table():
        metric = METRICS.get(name)
        rows.append((f"`{name}`", metric.unit, metric.better or "", metric.needs, what))
    return markdown(("metric", "unit", "better", "needs", "says of each item"), rows)
