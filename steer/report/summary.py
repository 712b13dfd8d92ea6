"""The table that the command line prints at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from steer.report.numbers import NOT_MEASURED, duration
from steer.report.view import arm_cells, checked, compared, metric_columns


def summary_table(metrics: Mapping[str, Any]) -> Table:
    """A row per arm: change of each metric with its 95 % confidence interval, and the seconds of training.

    Args:
        metrics: the content of metrics.json.

    Raises:
        WrongKindError: metrics of another schema.
    """
    arms = checked(metrics).get("arms") or []
    metrics_of_arms = metric_columns(arms)
    labels = {arm["name"]: str(arm.get("label") or arm["name"]) for arm in arms}
    statement = " ".join(filter(None, ((metrics.get("specificity") or {}).get("statement"), compared(metrics, labels))))
    table = Table(
        title=Text(f"{metrics.get('experiment', 'experiment')}: change by fine-tuning, 95 % confidence interval"),
        caption=Text(statement) if statement else None,
    )
    table.add_column("arm")
    for words in metrics_of_arms.values():
        table.add_column(Text("\n".join(filter(None, (words.name.lower(), words.unit, words.reading)))), justify="right")
    table.add_column("training", justify="right")
    columns = [arm_cells(arms, key) for key in metrics_of_arms]
    for i, arm in enumerate(arms):
        cells = [column[i] for column in columns]
        texts = [Text("\n".join(filter(None, (cell.change, cell.ci))) if cell else NOT_MEASURED) for cell in cells]
        table.add_row(Text(arm.get("label") or arm["name"]), *texts, duration((arm.get("train") or {}).get("seconds")))
    return table
