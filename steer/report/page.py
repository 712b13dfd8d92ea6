"""One self-contained HTML page from metrics and drift records. It loads nothing: a content security policy inside it forbids that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.drift.records import DriftRecord
from steer.report import numbers, view
from steer.report.caveats import caveats
from steer.report.charts import Charts
from steer.report.circuit_view import circuit_content
from steer.report.completions import completion_rows, largest_projection
from steer.report.drift_view import drift_content
from steer.report.items_plot import is_wrong_way, moved
from steer.report.render import markup, write_page
from steer.report.schema import read
from steer.report.trade_off_plot import equal_damage_words, trade_off_words, trade_offs

SECTIONS = ("result", "cost", "circuits", "dose", "drift", "completions", "items", "contrasts", "training", "reading", "provenance")
MOVED_MOST = 4  # items shown on either side


def write_report(path: str | Path, metrics: Mapping[str, Any], drift: Mapping[str, Sequence[DriftRecord]]) -> Path:
    """Writes the report of an experiment.

    Args:
        path: of the HTML file; its folder is made, and an existing file is replaced as a whole.
        metrics: the content of metrics.json.
        drift: records by name of the cell, or of the arm; may be empty.

    Raises:
        ConfigError: matplotlib or jinja2 is missing. WrongKindError: metrics of another schema. StorageFullError.

    Example:
        >>> steer.report.write_report("report.html", result.metrics, drift={})
        PosixPath('report.html')
    """
    return write_page(path, "page.html", **_content(read(metrics), drift, markup()))


def _content(metrics: Mapping[str, Any], drift: Mapping[str, Sequence[DriftRecord]], markup: Any) -> dict[str, Any]:
    table = view.arm_table(metrics)
    curves = drift_content(metrics, drift, markup)
    return {
        "metrics": metrics,
        "sections": _sections(metrics, has_drift=bool(curves["main"] or curves["features"]["rows"])),
        "question": metrics.get("question") or {},
        "lock": view.lock_of(metrics),
        "badges": view.badges(metrics),
        "decided": view.decided_by(metrics),
        "verdict": view.spoken(metrics, metrics.get("verdict")),
        "specificity": metrics.get("specificity") or {},
        "wrong_way": metrics.get("wrong_way") or {},
        "model": metrics.get("model") or {},
        "trait": view.direction_of(metrics),
        "columns": table["columns"],
        "arms": table["rows"],
        "seeds": view.seeds_of(metrics),
        "contrasts": view.contrast_rows(metrics),
        "equal_damage": equal_damage_words(metrics),
        "trade_offs": [{**point, "words": trade_off_words(point)} for point in trade_offs(metrics)],
        "guardrails": [{**each, "verdict": view.spoken(metrics, each.get("verdict"))} for each in view.guardrail_rows(metrics)],
        "drift": curves,
        "charts": Charts(metrics, markup),
        "circuits": circuit_content(metrics, markup),
        "completions": completion_rows(metrics),
        "projections": _projections(metrics),
        "items": _items(metrics),
        "costs": view.training_costs(metrics),
        "caveats": [view.spoken(metrics, text) for text in caveats(metrics, drift)],
    }


def _sections(metrics: Mapping[str, Any], *, has_drift: bool) -> list[str]:
    """Sections in their order. Training and its drift are left out where nothing was trained, doses where nothing was swept."""
    is_trained = (metrics.get("design") or {}).get("trained") is not False
    left_out = set() if metrics.get("sweep") else {"dose"}
    left_out |= set() if metrics.get("circuits") else {"circuits"}
    left_out |= set() if is_trained or has_drift else {"drift"}
    left_out |= set() if is_trained or metrics.get("training") or view.direction_of(metrics) else {"training"}
    return [name for name in SECTIONS if name not in left_out]


def _projections(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the colours of tokens mean; None when no token has a value."""
    most = largest_projection(metrics)
    if most is None:
        return None
    said = metrics["projections"]
    return {key: said.get(key) or "" for key in ("direction", "site", "unit")} | {"most": numbers.number(most)}


def _items(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The items that moved most either way, best first."""
    better = view.primary_better(metrics)
    items = moved(metrics)
    ordered = items if better == "lower" else items[::-1]
    shown = ordered if len(ordered) <= 2 * MOVED_MOST else [*ordered[:MOVED_MOST], *ordered[-MOVED_MOST:]]
    rows = [
        {
            "id": item["id"],
            "text": item.get("text") or "",
            "difference": numbers.number(item["difference"], signed=True),
            "wrong": is_wrong_way(item["difference"], better),
        }
        for item in shown
    ]
    return {"rows": rows, "count": len(items), "left_out": len(items) - len(rows)}
