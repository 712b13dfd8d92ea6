"""Drift record: what one measurement says about one direction, feature or dictionary at one site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from steer.drift.measurement import Measurement
from steer.drift.metric import METRICS
from steer.drift.metric_names import metric_name
from steer.drift.site_directions import CONTROLS


@dataclass(frozen=True)
class DriftRecord:
    """One direction, dictionary feature or dictionary at one site at one optimiser step.

    A metric can be read as an attribute too: `record.effect_sd` is `record.metrics["effect_sd"]`, or None where the mode or kind of the
    record has no such value. A value is nan where it is not defined (fewer than two observations, activations that are not finite).

    Attributes:
        step: optimiser steps done before the measurement.
        mode: `probe` (fixed prompts, compared with their own first measurement) or `stream` (training tokens since the check before,
            compared with the first such window).
        direction, site: which vector, feature (`<name>/<index>`) or dictionary, and where.
        kind: `named`, or `control` for a random direction of the same site; `feature`, or `feature_control` for a random one of the same
            dictionary; `dictionary`.
        n: prompts (probe) or labelled tokens (stream); tokens of a dictionary.
        metrics: value of each drift metric, by its name in `steer.drift.METRICS`.

    Example:
        >>> record = DriftRecord(10, "probe", "rude", "layers.3.output", "named", 20, {"effect_sd": 1.5})
        >>> record.effect_sd, record.p
        (1.5, None)
    """

    step: int
    mode: str
    direction: str
    site: str
    kind: str
    n: int
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __getattr__(self, name: str) -> Any:
        """The metric of that name. Raises AttributeError when it is neither in the record nor registered."""
        if name.startswith("_") or name == "metrics":  # copies and pickles ask for these before there are any fields
            raise AttributeError(name)
        if name not in self.metrics and name not in METRICS:
            raise AttributeError(f"a drift record has no '{name}'; its metrics are {', '.join(self.metrics) or 'none'}")
        return self.metrics.get(name)


def records_of(step: int, measurement: Measurement) -> list[DriftRecord]:
    """One record per column of a measurement, the named ones first; its metrics must have been computed."""
    tracked = measurement.tracked
    columns = {name: values.tolist() for name, values in measurement.values.items()}
    site = str(tracked.site)
    records = []
    for i, name in enumerate(tracked.names):
        metrics = {metric: column[i] for metric, column in columns.items() if i < len(column)}  # controls stand last and have fewer
        records.append(DriftRecord(step, measurement.mode, name, site, tracked.kind(i), measurement.n, metrics))
    return records


def log_values(records: Iterable[DriftRecord]) -> dict[str, float]:
    """Records for a logger: `drift/<direction>/<site>/<metric>` of all but controls, `drift_stream/...` in stream mode.

    Names are spelt as `metric_name` spells them. It has the metrics that are registered as logged, where they are finite; records and
    stores keep nan and infinity too.
    """
    logged = {name for name in METRICS if METRICS.get(name).logged}
    values = {}
    for record in records:
        mode = "drift" if record.mode == "probe" else "drift_stream"
        for name, value in record.metrics.items() if record.kind not in CONTROLS else ():
            if name in logged and math.isfinite(value):
                values[metric_name(mode, record.direction, record.site, name)] = value
    return values
