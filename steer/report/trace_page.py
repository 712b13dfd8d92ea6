"""The page of a causal trace: averages over facts, a heat map of each fact, what was left out, and how all of it was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer.checks import of_type, one_of, whole_number
from steer.edits.tracing import FactTrace, TraceResult
from steer.edits.tracing.averages import Mean
from steer.edits.tracing.result import MEASURES, NOT_A_CHOICE, PROBABILITY
from steer.report.canvas import both_widths
from steer.report.numbers import estimate, number
from steer.report.render import markup, write_page
from steer.report.trace_plot import KINDS, draw_averages, draw_trace


def write_trace(path: str | Path, result: TraceResult, *, measure: str = PROBABILITY, most: int = 12) -> Path:
    """Writes a causal trace as one HTML page that works offline, light or dark as the reader's system is.

    Args:
        measure: of the drawings and the table of averages, `probability` or `logit difference`; both stand beside each fact.
        most: facts whose heat map is drawn, the first ones.
        result: what `steer.causal_trace` gave.

    Raises:
        ConfigError: matplotlib or jinja2 is missing, or an unknown measure. StorageFullError.

    Example:
        >>> steer.report.write_trace("trace.html", traced)
        PosixPath('trace.html')
    """
    of_type(result, TraceResult, "the trace of a page", "make one with steer.edits.causal_trace")
    one_of(measure, MEASURES, "the measure of a trace")
    whole_number(most, "the number of facts on a page")
    return write_page(path, "trace.html", **trace_content(result, measure, most))


def trace_content(result: TraceResult, measure: str, most: int) -> dict[str, Any]:
    """What the template is given."""
    averages = [result.average_effects(kind, measure) for kind in result.kinds]
    title = f"Causal trace of {len(result)} facts" if len(result) > 1 else f"Causal trace: {result[0].fact.prompt}"
    words = f"Average indirect effect by layer and role of the token, of {', '.join(KINDS[kind] for kind in result.kinds)}."
    drawn = both_widths(draw_averages, averages, key="averages", title="Average indirect effects", description=words)
    rows = [
        {"role": role, "n": n, "peaks": [(layer, _estimate(mean)) for layer, mean in (average.peak(role) for average in averages)]}
        for role, n in zip(averages[0].roles, averages[0].n, strict=True)
    ]
    return {
        "title": title,
        "note": NOT_A_CHOICE,
        "facts": _setting(result),
        "ends": [(name.replace("_", " "), *(_estimate(result.average(name, each)) for each in MEASURES)) for name in _ENDS],
        "measure": measure,
        "measures": MEASURES,
        "kinds": [KINDS[kind] for kind in result.kinds],
        "several": len(result) > 1,
        "rows": rows,
        "averages": markup()(drawn),
        "traces": [_trace(trace, result.kinds, measure, place) for place, trace in enumerate(result.traces[:most])],
        "not_shown": max(0, len(result) - most),
        "left_out": [(entry.fact.prompt, entry.fact.true or entry.fact.target, entry.reason) for entry in result.left_out],
    }


_ENDS = ("clean", "corrupted", "total_effect")


def _estimate(mean: Mean) -> str:
    return estimate(mean.value, None if mean.low is None else (mean.low, mean.high))


def _setting(result: TraceResult) -> dict[str, str]:
    about, corruption = result.about, result.about["corruption"]
    several = sum(trace.answer_tokens > 1 for trace in result)
    settings = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in corruption.items() if isinstance(value, float))
    found = {
        "Corruption": f"{corruption['name']}{f', {settings}' if settings else ''}",
        "Samples": str(about["samples"]),
        "Window": f"{about['window']} layers" if set(result.kinds) - {"hidden"} else "",
        "Severed": f"{about['severed']} at the restored token, in all layers" if about["severed"] else "",
        "Answers of several tokens": f"{several} of {len(result)}; their first token is traced" if several else "",
        "Model": f"{about['model']['model_type']}, {result.n_layers} blocks of width {about['model']['width']}",
    }
    return {name: value for name, value in found.items() if value}


def _trace(trace: FactTrace, kinds: tuple[str, ...], measure: str, place: int) -> dict[str, Any]:
    description = f"Indirect effects of {len(trace.tokens)} tokens in {trace.restored.shape[-1]} layers; * marks the subject."
    title = f"{trace.fact.prompt}{trace.answer}"
    drawn = both_widths(draw_trace, trace, kinds, measure, key=f"fact-{place}", title=title, description=description)
    ends = [(number(float(clean)), number(float(corrupted))) for clean, corrupted in zip(trace.clean, trace.corrupted, strict=True)]
    return {
        "prompt": trace.fact.prompt,
        "answer": trace.answer,
        "other": trace.other,
        "ends": list(zip(MEASURES, ends, strict=True)),
        "replaced_by": trace.corruption.get("replaced_by"),
        "drawn": markup()(drawn),
    }
