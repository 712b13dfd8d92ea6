"""From metrics.json to what the page and the summary show: cells with their words, numbers and places on a common scale.

Everything in metrics.json but its schema may be missing; what is missing says so, and nothing here computes a statistic anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer.errors import WrongKindError
from steer.report.numbers import decimals, interval, is_interval, measured, number, p_value

SCHEMA = 1


@dataclass(frozen=True)
class Metric:
    """A measure of an arm, in words.

    Attributes:
        name, unit, meaning: for the reader.
        reading: what a higher value means.
    """

    name: str
    unit: str = ""
    meaning: str = ""
    reading: str = ""


METRICS = {
    "behaviour_gap": Metric(
        "Behaviour gap",
        "nat/token",
        "Mean log-probability per token of answers with the trait, minus that of answers with the same content without it, on held-out "
        "prompts. Texts are given and scored, so no judge is involved.",
        "higher: more of the trait",
    ),
    "task_logprob": Metric(
        "Task log-probability",
        "nat/token",
        "Mean log-probability per token of the plain, correct answers to held-out prompts.",
        "higher: better at the task",
    ),
    "neutral_loss": Metric(
        "Neutral text loss",
        "nat/token",
        "Mean negative log-probability per token of unrelated running text.",
        "higher: collateral damage",
    ),
}


@dataclass(frozen=True)
class Forest:
    """An interval on a scale of 0 to 100 that its whole column shares; None where there is none."""

    zero: float
    at: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Cell:
    """One metric of one arm, as text."""

    before: str
    after: str
    change: str
    ci: str
    n: str
    forest: Forest | None


def checked(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises WrongKindError for metrics of another schema."""
    if metrics.get("schema") != SCHEMA:
        remedy = "read it with the library version that wrote it"
        found = f"schema {metrics.get('schema')}"
        raise WrongKindError("these metrics cannot be reported", expected=f"schema {SCHEMA}", found=found, remedy=remedy)
    return metrics


def metric(key: str, unit: str | None = None) -> Metric:
    """The words for a metric; one that is not known here goes by its key and the unit it came with."""
    return METRICS.get(key) or Metric(key.replace("_", " ").capitalize(), unit or "")


def metric_columns(arms: Iterable[Mapping[str, Any]]) -> dict[str, Metric]:
    """Metrics that any arm has, the known ones first."""
    found = {key: (one or {}).get("unit") for arm in arms for key, one in (arm.get("metrics") or {}).items()}
    ordered = sorted(found, key=lambda key: list(METRICS).index(key) if key in METRICS else len(METRICS))
    return {key: metric(key, found[key]) for key in ordered}


def arm_cells(arms: Sequence[Mapping[str, Any]], key: str) -> list[Cell | None]:
    """One metric of every arm; None for an arm that lacks it."""
    found = [(arm.get("metrics") or {}).get(key) for arm in arms]
    estimates = [(one.get("change"), one.get("ci")) if one else (None, None) for one in found]
    forests, digits = forest(estimates), common_digits(estimates)
    return [
        Cell(
            number(one.get("before"), digits=digits),
            number(one.get("after"), digits=digits),
            number(one.get("change"), signed=True, digits=digits),
            interval(one.get("ci"), signed=True, digits=digits),
            number(one.get("n"), digits=0),
            place,
        )
        if one
        else None
        for one, place in zip(found, forests, strict=True)
    ]


def common_digits(estimates: Sequence[tuple[Any, Any]]) -> int | None:
    """Decimals that suit all numbers of a column, one more where they would hide a sign; None leaves the choice to each."""
    sizes = [abs(value) for value, _ in estimates if measured(value)]
    if not sizes or max(sizes) < 0.005:
        return None
    digits = decimals(max(sizes))
    shown = sizes + [abs(bound) for _, ci in estimates if is_interval(ci) for bound in ci]
    return min(3, digits + 1) if any(x and not round(x, digits) for x in shown) else digits


def forest(estimates: Sequence[tuple[Any, Any]]) -> list[Forest | None]:
    """Places of estimates and their intervals on one scale that holds all of them and zero."""
    ends = [0.0]
    for value, ci in estimates:
        if measured(value):
            ends += [value, *(ci if is_interval(ci) else ())]
    low, high = min(ends), max(ends)
    if low == high:
        return [None] * len(estimates)

    def place(x: float) -> float:
        return round(4 + 92 * (x - low) / (high - low), 2)

    return [
        Forest(place(0.0), place(value), *((place(ci[0]), place(ci[1])) if is_interval(ci) else (None, None))) if measured(value) else None
        for value, ci in estimates
    ]


def steering(steer: Mapping[str, Any] | None) -> str:
    """How an arm was steered, in words."""
    steer = steer or {}
    when = {"train": "during training, off afterwards", "inference": "at inference only"}.get(steer.get("when", "never"))
    if when is None:
        return "not steered"
    strength = steer.get("strength")
    way = "against" if measured(strength) and strength < 0 else "along"
    what = {"trait": f"{way} the trait direction", "random": "along a random direction"}.get(steer.get("direction", ""))
    details = [str(steer["site"])] if steer.get("site") else []
    details += [f"strength {number(strength).rstrip('0').rstrip('.')}"] if measured(strength) else []
    details += [f"relative dose {number(steer['relative_dose'], digits=2)}"] if measured(steer.get("relative_dose")) else []
    details += [f"{steer['scope']} tokens"] if steer.get("scope") else []
    return "; ".join([f"{what or 'steered'} {when}", *([", ".join(details)] if details else [])])


def compared(metrics: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Which arms the statement about specificity is about, by their labels; empty when it was not tested."""
    arms = (metrics.get("specificity") or {}).get("arms")
    if not arms:
        return ""
    trait, plain, random = (_quoted(str(arms.get(kind)), labels) for kind in ("trait", "plain", "random"))
    return f"Compared: {trait} with {plain} and with {random}."


def _quoted(arm: str, labels: Mapping[str, str]) -> str:
    return f"\N{LEFT DOUBLE QUOTATION MARK}{labels.get(arm, arm)}\N{RIGHT DOUBLE QUOTATION MARK}"


def comparison_groups(metrics: Mapping[str, Any], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Comparisons by metric, in their first order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in metrics.get("comparisons") or []:
        groups.setdefault(str(one.get("metric")), []).append(one)
    return [{"metric": metric(key, found[0].get("unit")), "rows": _comparison_rows(found, labels)} for key, found in groups.items()]


def _comparison_rows(found: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Comparisons of one metric with their words; their forests share a scale."""
    estimates = [(one.get("difference"), one.get("ci")) for one in found]
    digits = common_digits(estimates)
    return [
        {
            "a": labels.get(str(one.get("a")), str(one.get("a"))),
            "b": labels.get(str(one.get("b")), str(one.get("b"))),
            "difference": number(one.get("difference"), signed=True, digits=digits),
            "ci": interval(one.get("ci"), signed=True, digits=digits),
            "p_adjusted": p_value(one.get("p_adjusted", one.get("p"))),
            "n": number(one.get("n"), digits=0),
            "verdict": _labelled(one, labels),
            "forest": place,
        }
        for one, place in zip(found, forest(estimates), strict=True)
    ]


def _labelled(one: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """The verdict of a comparison in the words of the page, where arms go by their labels and metrics by their names."""
    key, a, b = (str(one.get(name)) for name in ("metric", "a", "b"))
    label_a, label_b = (_quoted(arm, labels) for arm in (a, b))
    text = str(one.get("verdict") or "")
    if text.startswith(f"{key}: "):
        text = f"{metric(key).name}{text.removeprefix(key)}"
    for form in ("{} is lower than {}", "{} is higher than {}", "between {} and {}"):
        text = text.replace(form.format(a, b), form.format(label_a, label_b), 1)
    return text


def completion_rows(metrics: Mapping[str, Any], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Prompts in their first order, each with the text of the base model and of every arm (None: not generated)."""
    arms = [(labels[arm["name"]], i, arm.get("completions") or []) for i, arm in enumerate(metrics.get("arms") or [])]
    every: list[tuple[str, int | None, list[Any]]] = [("Base model", None, metrics.get("base_completions") or []), *arms]
    columns = [column for column in every if column[2]]
    texts = [{one.get("prompt", ""): one.get("text") for one in found} for _, _, found in columns]
    prompts = dict.fromkeys(prompt for of_column in texts for prompt in of_column)
    return [
        {
            "prompt": prompt,
            "answers": [
                {"label": label, "index": index, "text": of_column.get(prompt)}
                for (label, index, _), of_column in zip(columns, texts, strict=True)
            ],
        }
        for prompt in prompts
    ]


def training_losses(arms: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[tuple[str, int, list[float]]]:
    """Label, number and losses of every training run; arms that share one (same losses) are one entry."""
    runs: dict[tuple[float, ...], list[int]] = {}
    for i, arm in enumerate(arms):
        losses = tuple(float("nan") if loss is None else float(loss) for loss in (arm.get("train") or {}).get("loss") or ())
        if losses:
            runs.setdefault(losses, []).append(i)
    return [(" = ".join(labels[arms[i]["name"]] for i in members), members[0], list(losses)) for losses, members in runs.items()]


def caveats(metrics: Mapping[str, Any], drift: Mapping[str, Any]) -> list[str]:
    """What this run cannot show, said before anybody has to ask."""
    arms = metrics.get("arms") or []
    sizes = [one["n"] for arm in arms for one in (arm.get("metrics") or {}).values() if one and measured(one.get("n"))]
    found = [
        f"One seed ({metrics.get('seed', 'unknown')}): the intervals cover the choice of held-out items, not that of the seed, the batches "
        "or the training texts. Repeat with other seeds before believing a small difference.",
    ]
    if sizes:
        found.append(f"Small samples: the smallest number of items behind a mean is {number(min(sizes), digits=0)}.")
    steers = [arm.get("steer") or {} for arm in arms]
    if any(steer.get("direction") == "random" for steer in steers):
        found.append(
            "One random direction: that the trait direction does more than this one says little about others. Random directions differ "
            "in what they do, and the random arm may itself act on the trait or on the task: look at its own change beside "
            "that of plain training. Other seeds draw other random directions."
        )
    elif any(steer.get("when", "never") != "never" for steer in steers):
        found.append(
            "No arm was steered along a random direction: this run cannot tell an effect of the trait direction from an effect of any push."
        )
    if drift:
        found.append(
            "Where a direction is added during training, its reading and the behaviour come apart: look at sites that are not steered, and "
            "at the behaviour gap, before trusting a low reading at the steered site."
        )
        found.append(
            "Any fine-tune, a harmless one too, shifts every direction at first. One random direction in ten lies outside the grey band at "
            "any step, so leaving it is no finding. A shift that is marked is larger than chance makes random directions shift; if the "
            "behaviour changed with it, only the scores and the completions can say."
        )
        if any(record.mode == "stream" for records in drift.values() for record in records):
            found.append(
                "Stream mode begins at its first window of training tokens, when the model has been trained already; later windows "
                "hold other texts: it cannot show the drift of the first steps, nor tell a change of the model from one of the data."
            )
    return found
