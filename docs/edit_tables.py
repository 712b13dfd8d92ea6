"""Tables of docs/results/editing.md, made from the figures that benchmarks/edit_results.py and edit_fine_tune.py measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
Markdown = Callable[[Sequence[str], Iterable[Sequence[str]]], str]
SCORES = (("ES", "efficacy"), ("PS", "paraphrase"), ("NS", "neighbourhood"))
ACCURACIES = (("ES accuracy", "efficacy_accuracy"), ("PS accuracy", "paraphrase_accuracy"))


def read(what: str) -> list[dict[str, Any]]:
    """The files of one kind of run, in the order of their names; a run may be spread over several."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob(f"*_cpu_edit_{what}*.json"))]


def available() -> list[str]:
    """Names of the tables for which there are figures."""
    return [name for name in TABLES if read(name)]


def edits(what: str, markdown: Markdown) -> str:
    """A row for each editor, and the model before."""
    files = read(what)
    when = "final" if what == "sequence" else "after"
    runs = [run for file in files for run in file["editors"]]
    head = ["editor", "layers", "facts", *(title for title, _ in (*SCORES, *ACCURACIES)), "S", "NS kept"]
    head += ["retained"] if what == "sequence" else []
    head += ["neutral loss per edit, nat per token", "CPU s per edit"]
    first = runs[0]
    before = ["none", "", str(first["records"]), *(_estimate(first["summary"][name]["before"]) for _, name in (*SCORES, *ACCURACIES))]
    before += [_estimate(first["made_of_several"]["score_before"])]
    rows = [before + [""] * (len(head) - len(before))]
    for run in runs:
        several = run["made_of_several"]
        ending = "_final" if when == "final" else ""
        row = [run["editor"], _layers(run["layers"]), str(run["records"])]
        row += [*(_estimate(run["summary"][name][when]) for _, name in (*SCORES, *ACCURACIES))]
        row += [_estimate(several[f"score{ending}"]), _estimate(several[f"neighbourhood_kept{ending}"])]
        row += [_estimate(several["retained"])] if what == "sequence" else []
        rows.append([*row, _estimate(several["neutral_per_edit"], 5), _seconds(run)])
    return markdown(head, rows)


def fine_tune(markdown: Markdown) -> str:
    """A row for each protection in each fine-tune: right after the edit, and after the fine-tune."""
    head = ("trained on", "arm", "ES", "p(new) after the edit", "p(new) after the fine-tune", "against alarm", "PS", "NS", "retained")
    head += ("neutral loss, nat per token",)
    rows = []
    for file in read("fine_tune"):
        for arm, found in file["arms"].items():
            summary = found["summary"]
            probability = summary["efficacy_probability"]
            rows.append(
                [
                    f"{file['tune']}, {file['steps']} steps at {file['lr']:g}, seed {file.get('seed', 1)}",
                    arm,
                    _estimate(summary["efficacy"]["final"]),
                    "" if arm == "unedited" else _estimate(probability["after"], 3),
                    _estimate(probability["final"], 3),
                    _estimate(found.get("against_alarm", {}).get("efficacy_probability"), 3),
                    _estimate(summary["paraphrase"]["final"]),
                    _estimate(summary["neighbourhood"]["final"]),
                    "" if arm == "unedited" else _estimate(found["made_of_several"]["retained"]),
                    f"{found['neutral']['value']:+.3f}",
                ]
            )
    return markdown(head, rows)


def _estimate(found: dict[str, Any] | None, digits: int = 1) -> str:
    if found is None:
        return ""
    value = f"{found['value']:.{digits}f}"
    return value if found["low"] is None else f"{value} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def _layers(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def _seconds(run: dict[str, Any]) -> str:
    """Of the value, which editors share, and of the rest."""
    value = run["value_seconds_per_edit"]
    return f"{run['seconds_per_edit']:.1f}" if value is None else f"{value:.1f} + {run['seconds_per_edit']:.1f}"


TABLES: dict[str, Callable[[Markdown], str]] = {
    **{what: lambda markdown, what=what: edits(what, markdown) for what in ("single", "batch", "sequence", "first_token", "sweep")},
    "fine_tune": fine_tune,
}
