"""The table of an experiment for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from steer.report.numbers import NOT_MEASURED, common_digits, estimate, interval, number, p_value
from steer.report.rows import better_label, is_change, primary_outcome, readable
from steer.report.schema import read
from steer.report.view import badges, decided_by, spoken


def summary_table(metrics: Mapping[str, Any]) -> Table:
    """Question and verdict, a row for each arm (primary outcome with its 95 % interval, contrast with its corrected p), and what else was
    tested: the rank among the controls and the guardrails, each in a sentence.

    Fits into 80 columns where arms have short names.

    Args:
        metrics: the content of metrics.json.

    Raises:
        WrongKindError: metrics of another schema.

    Example:
        >>> print(steer.report.summary_table(result.metrics))
    """
    tree = read(metrics)
    outcome = primary_outcome(tree)
    table = Table(title=_title(tree), title_justify="left", box=SIMPLE_HEAD, min_width=60, caption=_caption(tree), caption_justify="left")
    table.add_column("arm", overflow="fold")
    if outcome is None:
        return table
    change = is_change(tree, outcome)
    unit = (tree["outcomes"][outcome]).get("unit")
    head = [readable(outcome), unit, better_label(tree, outcome), "[95 % interval]"]
    table.add_column(Text("\n".join(filter(None, head))), justify="right")
    if change:
        table.add_column(Text("change from\nthe base model\n[95 % interval]"), justify="right")
    table.add_column(Text("contrast\n[its interval]\ncorrected p"), justify="right")
    values = [(arm.get("outcomes") or {}).get(outcome) or {} for arm in tree.get("arms") or []]
    digits = common_digits([(each.get("mean"), each.get("ci")) for each in values])
    of_change = common_digits([(each.get("change"), each.get("change_ci")) for each in values])
    for arm, each in zip(tree.get("arms") or [], values, strict=True):
        cells = [_estimate(each.get("mean"), each.get("ci"), digits)]
        if change:
            cells.append(_estimate(each.get("change"), each.get("change_ci"), of_change, signed=True))
        drawn = f"\nfor these {arm['draws']} draws" if arm.get("control_of") and (arm.get("draws") or 1) > 1 else ""
        table.add_row(Text(f"{arm['name']}{drawn}"), *map(Text, cells), Text(_contrast(tree, str(arm["name"]), outcome)))
    return table


def _title(metrics: Mapping[str, Any]) -> Text:
    question = (metrics.get("question") or {}).get("text") or metrics.get("experiment") or "experiment"
    return Text.assemble((f"{question}\n", "default"), (spoken(metrics, metrics.get("verdict")), "bold default"))


def _caption(metrics: Mapping[str, Any]) -> Text:
    standing = "; ".join(badge.text for badge in badges(metrics))
    specific = metrics.get("specificity") or {}
    among_controls = f"{specific.get('arm')}: {specific['verdict']}" if specific.get("verdict") else ""
    guardrails = [spoken(metrics, each.get("verdict")) for each in metrics.get("guardrails") or []]
    return Text("\n".join(filter(None, (decided_by(metrics), among_controls, *guardrails, standing))))


def _estimate(value: Any, ci: Any, digits: int | None, *, signed: bool = False) -> str:
    if value is None:
        return NOT_MEASURED
    return "\n".join(filter(None, (number(value, signed=signed, digits=digits), interval(ci, signed=signed, digits=digits))))


def _contrast(metrics: Mapping[str, Any], arm: str, outcome: str) -> str:
    """The first contrast of an arm in the primary outcome: the primary one, or the one that was planned beside it."""
    own = [each for each in metrics.get("contrasts") or [] if each.get("a") == arm and each.get("metric") == outcome]
    if not own:
        return ""
    each = own[0]
    p = p_value(each.get("p_adjusted", each.get("p")))
    sign = "" if p.startswith("<") else "= "
    role = "" if each.get("role") == "primary" else f", {each.get('role')}"
    return f"against {each['b']}\n{estimate(each.get('difference'), each.get('ci'), signed=True)}\np {sign}{p}{role}"
