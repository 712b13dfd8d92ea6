"""The page of edits: what was measured before and after, what the model writes, each fact, and where a trace finds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer.checks import of_type
from steer.edits.edit import Edit
from steer.edits.evaluation import EditEvaluation
from steer.edits.tracing import TraceResult
from steer.edits.tracing.result import PROBABILITY
from steer.errors import ConfigError
from steer.report.edit_view import continuations, edit_facts_shown, fact_tables, measured_tables, side_by_side
from steer.report.render import write_page
from steer.report.trace_page import trace_content


def write_edits(
    path: str | Path,
    evaluations: Sequence[EditEvaluation],
    *,
    edits: Sequence[Edit] = (),
    trace: TraceResult | None = None,
    title: str | None = None,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Writes evaluations of edits as one HTML page that works offline, light or dark as the reader's system is.

    Args:
        evaluations: of one or more editors on the same facts.
        edits: that were kept, with their layers and sizes.
        trace: of the same facts before the edit, which is drawn.
        title: by default the editors and the number of facts.
        facts: what else the head of the page says, by name.

    Raises:
        ConfigError: jinja2 is missing, or no evaluations. StorageFullError.

    Example:
        >>> steer.report.write_edits("edits.html", [evaluation], edits=[edit])
        PosixPath('edits.html')
    """
    of_type(evaluations, (list, tuple), "the evaluations of a page", "pass a list of what steer.edits.evaluate_edits gives")
    for found in evaluations:
        of_type(found, EditEvaluation, "an evaluation of a page", "make it with steer.edits.evaluate_edits")
    if not evaluations:
        raise _no_evaluations()
    first = evaluations[0]
    head = {
        "Facts": str(len(first)),
        "Mode": {"single": "one at a time, each undone", "batch": "all in one edit", "sequence": "one after the other"}[first.mode],
        "Model": str(first.facts.get("model", "")),
        **(facts or {}),
    }
    return write_page(
        path,
        "edits.html",
        title=title or f"{len(first)} fact{'s' * (len(first) != 1)} edited by {', '.join(found.editor for found in evaluations)}",
        facts=head,
        tables=measured_tables(evaluations),
        comparison=side_by_side(evaluations),
        continuations=continuations(evaluations),
        fact_tables=fact_tables(evaluations),
        edits=edit_facts_shown(edits),
        trace=None if trace is None else trace_content(trace, PROBABILITY, 1),
    )


# ---- errors


def _no_evaluations() -> ConfigError:
    remedy = "pass what steer.edits.evaluate_edits gives"
    return ConfigError("a page of edits needs an evaluation", expected="one or more", found="none", remedy=remedy)
