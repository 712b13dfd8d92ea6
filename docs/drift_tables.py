"""The table of drift metrics in docs/drift.md, see make_tables.py."""

from __future__ import annotations

from collections.abc import Callable

from steer.drift import METRICS
from steer.drift.measurement import MODES
from steer.drift.metric import THINGS, metrics_of


def metrics(markdown: Callable[..., str]) -> str:
    """Every registered metric: unit, what it is of, modes in which it is defined, whether controls have it, first line of its docstring."""
    in_mode = {mode: [metric.name for of in THINGS for metric in metrics_of(mode, of)] for mode in MODES}
    rows = []
    for name, what in METRICS.table():
        metric = METRICS.get(name)
        modes = ", ".join(mode for mode in MODES if name in in_mode[mode])
        of = ", ".join(f"{thing[:-1]}ies" if thing.endswith("y") else f"{thing}s" for thing in metric.of)
        controls = "" if metric.of == ("dictionary",) else "yes" if metric.controls else "no"
        rows.append((f"`{name}`", metric.unit, of, modes, controls, what))
    return markdown(("metric", "unit", "of", "modes", "controls", "says"), rows)
