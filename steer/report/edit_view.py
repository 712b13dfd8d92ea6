"""Edits as a page shows them: what was measured before and after, editors side by side, what the model writes, and each fact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.edits.edit import Edit
from steer.edits.evaluation import EditEvaluation, EditRow, comparison_cells
from steer.report.numbers import number

LISTED = 300  # facts of the table; all are in the file of the evaluation
WRITTEN = 12  # facts whose continuations are shown
COLUMNS = (("efficacy_probability", "p(new)"), ("paraphrase_probability", "p(new), paraphrases"), ("neighbourhood", "NS"))


def measured_tables(evaluations: Sequence[EditEvaluation]) -> list[dict[str, Any]]:
    """A table of each evaluation, as text."""
    tables = []
    for found in evaluations:
        head, *rows = found.cells()
        meanings = {column.title: column.meaning for column in found.columns}
        said = [(title, meanings.get(title.partition(",")[0], meanings.get(title, "")), numbers) for title, *numbers in rows]
        tables.append({"editor": found.editor, "head": head, "rows": said, "problems": found.problems(), "facts": len(found)})
    return tables


def side_by_side(evaluations: Sequence[EditEvaluation]) -> list[list[str]]:
    """Head and rows of editors beside one another; nothing for one editor."""
    return comparison_cells(evaluations) if len(evaluations) > 1 else []


def continuations(evaluations: Sequence[EditEvaluation]) -> list[dict[str, Any]]:
    """What the model writes behind the first prompts before, and after each editor; nothing where no text was generated."""
    shown: dict[str, dict[str, Any]] = {}
    for found in evaluations:
        for row in found.rows[:WRITTEN]:
            if row.written:
                entry = shown.setdefault(row.name, {"prompt": row.prompt, "target": row.target, "answers": []})
                if not entry["answers"]:
                    entry["answers"].append(("before", row.written.get("before", "")))
                entry["answers"].append((f"after {found.editor}", row.written.get("after", "")))
    return list(shown.values())


def fact_tables(evaluations: Sequence[EditEvaluation]) -> list[dict[str, Any]]:
    """The facts of each evaluation, those with the least probable new object first."""
    tables = []
    for found in evaluations:
        rows = sorted(found.rows, key=lambda row: _last(row).get("efficacy_probability", 0.0))
        shown = [_fact_row(row) for row in rows[:LISTED]]
        tables.append({"editor": found.editor, "head": [title for _, title in COLUMNS], "rows": shown, "left_out": len(rows[LISTED:])})
    return tables


def _last(row: EditRow) -> Any:
    """Numbers on the last weights on which a fact was measured."""
    return row.after if row.final is None else row.final


def _fact_row(row: EditRow) -> dict[str, Any]:
    last = _last(row)
    numbers = [
        f"{number(row.before[name], digits=2)} to {number(last[name], digits=2)}" if name in row.before and name in last else ""
        for name, _ in COLUMNS
    ]
    return {"prompt": row.prompt, "subject": row.subject, "target": row.target, "true": row.true or "", "numbers": numbers,
            "change": number(row.change, digits=3), "problem": row.problem}  # fmt: skip


def edit_facts_shown(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Edits: editor, layers, rank, and how large the change of each matrix is."""
    return [
        {
            "name": edit.name,
            "editor": edit.editor,
            "facts": len(edit.facts),
            "layers": ", ".join(str(delta.layer) for delta in edit.deltas) or "none",
            "rank": edit.rank,
            "norm": ", ".join(number(delta.norm, digits=2) for delta in edit.deltas),
        }
        for edit in edits
    ]
