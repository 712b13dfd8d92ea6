"""The tables of docs/results/features.md, from docs/results/features.json, which holds what finished runs of `steer ab` found.

steer ab experiment=golden_gate
python docs/feature_results.py outputs/ab/golden_gate [more folders ...]    # then python docs/make_tables.py

benchmarks/spurious_features.py writes its part of the file itself.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import experiment_results
import numpy as np
from numpy.typing import NDArray

from steer.experiment.pareto import effect_at

RESULTS = Path(__file__).resolve().parent / "results" / "features.json"
BUDGETS = (0.05, 0.1, 0.2)  # nat per token of other text
RESAMPLES = 2000
Markdown = Callable[[Sequence[str], Iterable[Sequence[str]]], str]
Values = Mapping[tuple[str, str, int], NDArray[np.float64]]  # outcome, arm, draw -> [items]
RUNS = ("golden_gate", "golden_gate_second")


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


# ---- from the folder of a run


def quoted(folder: Path) -> dict[str, Any]:
    """What is kept of a run."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    kept = experiment_results.quoted(metrics) | {"features": metrics["features"]}
    arms = {}
    for arm in metrics["arms"]:
        outcomes = {
            name: {key: each.get(key) for key in ("mean", "change", "change_ci", "by_draw")} for name, each in arm["outcomes"].items()
        }
        arms[arm["name"]] = {"label": arm["label"], "control_of": arm["control_of"], "outcomes": outcomes}
    kept["arms"] = arms
    if "larger_gap" in metrics["outcomes"]:
        values = values_of(folder / metrics["scores"])
        kept["share_above_0"] = {
            arm: float(np.mean([each > 0 for (name, of, _), each in values.items() if (name, of) == ("larger_gap", arm)])) for arm in arms
        }
    kept["completions"] = {name: said[0] for name, said in metrics["completions"].items() if said}
    if metrics["sweep"]:
        kept["at_budget"] = at_budgets(values_of(folder / metrics["scores"]), doses_of(metrics))
    return kept


def doses_of(metrics: Mapping[str, Any]) -> dict[str, list[str]]:
    """Method -> arms, one for each dose; a control has the arms of its draws together."""
    return {curve["name"]: [point["arm"] for point in curve["points"]] for curve in metrics["sweep"] if curve["outcome"] == "concept"}


def values_of(path: Path) -> Values:
    """Values of a table of scores, averaged over seeds."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: Iterable[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    else:
        with path.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row["outcome"], row["arm"], int(row["draw"])), {})[row["item"]] = float(row["value"])
    return {place: np.array([values[item] for item in sorted(values)]) for place, values in found.items()}


def at_budgets(values: Values, methods: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """By method and damage, the log of the factor there, straight between doses, with the interval of resampled items; and clamp minus
    the mean difference at the word on the same resamples. A method that does less damage at its largest dose counts with that one."""
    random = np.random.default_rng(0)
    shares = {outcome: _shares(random, values[outcome, "plain", 0].size) for outcome in ("concept", "damage")}
    changes = {method: {outcome: _changes(values, outcome, arms) for outcome in shares} for method, arms in methods.items()}
    table = []
    for budget in BUDGETS:
        resampled = {}
        for method, of_method in changes.items():
            effects, damages = of_method["concept"], of_method["damage"]  # [doses, items] both
            reached = float(damages.mean(1).max())
            point = effect_at(min(budget, max(reached, 0.0)), damages.mean(1), effects.mean(1))
            pairs = zip(shares["concept"] @ effects.T, shares["damage"] @ damages.T, strict=True)
            resampled[method] = np.array([effect_at(min(budget, max(float(d.max()), 0.0)), d, e) for e, d in pairs])
            low, high = np.quantile(resampled[method], [0.025, 0.975])
            table.append({"method": method, "damage": budget, "effect": [point, float(low), float(high)], "reached": reached})
        if {"clamp", "at_word"} <= resampled.keys():
            difference = resampled["clamp"] - resampled["at_word"]
            points = [
                next(row["effect"][0] for row in table if (row["method"], row["damage"]) == (name, budget)) for name in ("clamp", "at_word")
            ]
            low, high = np.quantile(difference, [0.025, 0.975])
            table.append({"method": "clamp - at_word", "damage": budget, "effect": [points[0] - points[1], float(low), float(high)]})
    return table


def _changes(values: Values, outcome: str, arms: Sequence[str]) -> NDArray[np.float64]:
    """[doses, items] against plain, a mean over draws."""
    plain = values[outcome, "plain", 0]
    return np.stack(
        [np.mean([each for (name, of, _), each in values.items() if (name, of) == (outcome, arm)], axis=0) - plain for arm in arms]
    )


def _shares(random: np.random.Generator, items: int) -> NDArray[np.float64]:
    """[resamples, items]"""
    return random.multinomial(items, np.full(items, 1 / items), size=RESAMPLES) / items


# ---- tables


NOT_YET = "Not measured yet."


def _measured() -> list[tuple[str, dict[str, Any]]]:
    """The runs of a clamp in a model as it is, by name."""
    return [(name, read()[name]) for name in RUNS if name in read()]


def runs(markdown: Markdown) -> str:
    head = ("command", "verdict", "the contrast that decides", "cells, seconds")
    listed = [(name, run) for name, run in read().items() if "verdict" in run]
    return markdown(
        head, [(f"`{run['command']}`", run["verdict"], run["contrasts"][0], f"{run['cells']}, {run['seconds']:.0f}") for _, run in listed]
    )


def tried(markdown: Markdown) -> str:
    """Every concept and candidate of the first run."""
    if not _measured():
        return NOT_YET
    run = _measured()[0][1]["features"]
    head = ("concept", "feature", "average precision at its words", "in the other half", "doses tried", "factor at 0.2 nat")
    rows = []
    for trial in run["tried"]:
        shown = ["none" if trial[key] is None else f"{trial[key]:.2f}" for key in ("average_precision", "average_precision_elsewhere")]
        doses = ", ".join(f"{dose:g}" for dose in trial["doses"])
        rows.append((trial["concept"], str(trial["feature"]), *shown, doses, f"{trial['factor']:.1f}"))
    return markdown(head, rows)


def dose_response(markdown: Markdown) -> str:
    """Arm by arm the factor of the concept's probability and the loss, for both concepts."""
    parts = []
    for _, run in _measured():
        features = run["features"]
        head = ("arm", "concept's words", "loss on other text, nat/token", "draws")
        rows = [_dose_row(arm, of_arm) for arm, of_arm in run["arms"].items() if arm != "plain"]
        base = math.exp(run["arms"]["plain"]["outcomes"]["concept"]["mean"])
        density = "" if features["density"] is None else f", on at {features['density'][0]:.2%} of tokens"
        title = f"**{features['concept']}**: feature {features['features'][0]}{density}"
        parts.append(f"{title}; its words have a probability of {base:.5f} in the plain model.\n\n{markdown(head, rows)}")
    return "\n\n".join(parts) or NOT_YET


def _dose_row(arm: str, of_arm: Mapping[str, Any]) -> tuple[str, ...]:
    concept, damage = of_arm["outcomes"]["concept"], of_arm["outcomes"]["damage"]
    plain = concept["mean"] - concept["change"]
    draws = "" if not concept["by_draw"] else f"{factor(min(concept['by_draw']) - plain)} to {factor(max(concept['by_draw']) - plain)}"
    return arm, factors(concept["change"], *concept["change_ci"]), signed(damage["change"], *damage["change_ci"]), draws


def at_equal_loss(markdown: Markdown) -> str:
    head = ("concept", "method", *(f"at +{budget:g} nat" for budget in BUDGETS))
    rows = []
    for _, run in _measured():
        by_method: dict[str, list[str]] = {}
        for row in run["at_budget"]:
            short = row.get("reached", math.inf) < row["damage"]
            by_method.setdefault(row["method"], []).append(
                factors(*row["effect"]) + (f" (at +{max(row['reached'], 0):.3f})" if short else "")
            )
        rows += [(run["features"]["concept"], method.replace(" - ", " over "), *cells) for method, cells in by_method.items()]
    return markdown(head, rows)


def tuned(markdown: Markdown) -> str:
    if (run := read().get("golden_gate_tuned")) is None:
        return NOT_YET
    head = ("arm", "concept's words against the model before training", "loss on other text, nat/token", "draws")
    return markdown(head, [_dose_row(of_arm["label"], of_arm) for of_arm in run["arms"].values()])


def said(markdown: Markdown) -> str:
    rows = []
    for _, run in _measured():
        for arm in ("base", "clamp x0.5", "clamp x1", "clamp x2"):
            if arm in run["completions"]:
                rows.append((run["features"]["concept"], arm, " ".join(run["completions"][arm]["text"].split())))
    return markdown(("concept", "arm", "answer, greedy"), rows) if rows else NOT_YET


def spurious(markdown: Markdown) -> str:
    if (run := read().get("spurious")) is None:
        return NOT_YET
    head = ("classifier", "attributes disagree", "change", "attributes agree")
    rows = [(row["name"], *(_shares_of(row[key], key == "change") for key in ("disagree", "change", "agree"))) for row in run["rows"]]
    counts = ", ".join(f"{count} {what}" for what, count in run["sentences"].items())
    draws = ", ".join(f"{share:.3f}" for share in run["by_draw"])
    return (
        f"`{run['command']}`: sentences {counts}; {run['heads']} heads at {run['site']}; {len(run['features'])} features; "
        f"{run['cpu_seconds']:.0f} CPU seconds. Random features where it is fitted and used, by draw: {draws}.\n\n{markdown(head, rows)}"
    )


def decimals(_: Markdown) -> str:
    if (run := read().get("decimals")) is None:
        return NOT_YET
    arms = run["arms"]
    gaps = ", ".join(f"{name} {signed(of_arm['outcomes']['larger_gap']['mean'], None, None)}" for name, of_arm in arms.items())
    shares = ", ".join(f"{name} {share:.2f}" for name, share in run["share_above_0"].items())
    lines = [
        *run["contrasts"],
        *run["guardrails"],
        run["specificity"],
        f"mean gap, larger minus smaller number, nat/token: {gaps}",
        f"share of questions in which the larger number is likelier: {shares}",
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def factor(effect: float) -> str:
    value = math.exp(effect)
    return f"{value:.0f}x" if value >= 10 else f"{value:.2f}x"


def factors(effect: float, low: float | None, high: float | None) -> str:
    return factor(effect) if low is None or high is None else f"{factor(effect)} [{factor(low)}, {factor(high)}]"


def signed(mean: float, low: float | None, high: float | None) -> str:
    return f"{mean:+.3f}" if low is None or high is None else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _shares_of(estimate: Sequence[float], is_change: bool) -> str:
    sign = "+" if is_change else ""
    return f"{estimate[0]:{sign}.3f} [{estimate[1]:{sign}.3f}, {estimate[2]:{sign}.3f}]"


def main() -> None:
    kept = read() if RESULTS.is_file() else {}
    for folder in map(Path, sys.argv[1:]):
        name = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["experiment"]
        kept[name] = quoted(folder)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
