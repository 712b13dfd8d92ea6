"""The table of drift metrics in docs/drift.md, see make_tables.py."""

from __future__ import annotations

from collections.abc import Callable

from steer.drift import METRICS
from steer.drift.measurement import MODES
from steer.drift.metric import metrics_of


def metrics(markdown: Callable[..., str]) -> str:
    """Every registered metric: unit, modes in which it is defined, directions that have it, first line of its docstring."""
    in_mode = {mode: [metric.name for metric in metrics_of(mode)] for mode in MODES}
    rows = []
    for name, what in METRICS.table():
        metric = METRICS.get(name)
        modes = ", ".join(mode for mode in MODES if name in in_mode[mode])
        rows.append((f"`{name}`", metric.unit, modes, "all" if metric.controls else "named", what))
    return markdown(("metric", "unit", "modes", "directions", "says"), rows)
