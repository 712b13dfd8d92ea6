"""Result of an experiment: what `analyse` found, with the scores behind it; prints, plots, is saved, and writes the page."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from steer.drift.records import DriftRecord
from steer.drift.store import DriftStore
from steer.experiment.scores import Scores
from steer.files import atomic_write, sealed
from steer.report import comparison_figure, summary_table, write_report

METRICS = "metrics.json"


class Result:
    """What was found.

        print(result)                 # a table
        result.verdict                # a sentence
        result.metrics["contrasts"]   # the tree of metrics.json
        result.plot()                 # a matplotlib figure
        result.report("page.html")
        result.save("folder")         # metrics.json, scores.parquet and the page

    Attributes:
        metrics: the tree of `metrics.json`, see docs/metrics.md.
        scores: the value of each item.
        drift: records of what was tracked while the arms were trained, by cell; empty where nothing was.
    """

    def __init__(self, metrics: Mapping[str, Any], scores: Scores, drift: Mapping[str, Sequence[DriftRecord]] | None = None) -> None:
        self.metrics = dict(metrics)
        self.scores = scores
        self.drift = dict(drift or {})

    @property
    def verdict(self) -> str:
        """At most 20 words."""
        return self.metrics["verdict"]

    def __repr__(self) -> str:
        return f"Result({self.verdict})"

    def __rich__(self) -> Table:
        return summary_table(self.metrics)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100, force_jupyter=False, force_terminal=False).print(self)
        return text.getvalue()

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), width=100, record=True)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def plot(self) -> Any:
        """A figure of the primary outcome in every arm, with intervals, control draws and seeds. Raises ConfigError without matplotlib."""
        return comparison_figure(self.metrics)

    def report(self, path: str | Path) -> Path:
        """Writes the page. Raises as `steer.report.write_report`."""
        return write_report(path, self.metrics, self.drift)

    def save(self, folder: str | Path) -> Path:
        """Writes `metrics.json`, the tidy table of scores and the page into a folder, each in one step."""
        folder = Path(folder)
        table = self.scores.save(folder / "scores.parquet")
        atomic_write(folder / METRICS, json.dumps(sealed(self.metrics | {"scores": table.name}), indent=1, allow_nan=False))
        self.report(folder / "report.html")
        return folder


def drift_records(folder: Path, metrics: Mapping[str, Any]) -> dict[str, list[DriftRecord]]:
    """Drift records by the name of the cell, read from the stores that metrics.json names."""
    records = {}
    for cell, name in metrics["drift"]["stores"].items():
        with DriftStore(folder / name) as store:
            records[cell] = list(store.records())
    return records
