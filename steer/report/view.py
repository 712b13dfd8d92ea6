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
        raise _other_schema(metrics.get("schema"))
    return metrics


def metric(key: str, unit: str | None = None) -> Metric:
    """The words for a metric; one that is not known here goes by its key and the unit it came with."""
    return METRICS.get(key) or Metric(key.replace("_", " ").capitalize(), unit or "")


def metric_columns(arms: Iterable[Mapping[str, Any]]) -> dict[str, Metric]:
    """Metrics that any arm has, the known ones first."""
    units = {key: (values or {}).get("unit") for arm in arms for key, values in (arm.get("metrics") or {}).items()}
    ordered = sorted(units, key=lambda key: list(METRICS).index(key) if key in METRICS else len(METRICS))
    return {key: metric(key, units[key]) for key in ordered}


def arm_cells(arms: Sequence[Mapping[str, Any]], key: str) -> list[Cell | None]:
    """One metric of every arm; None for an arm that lacks it."""
    values_of_arms = [(arm.get("metrics") or {}).get(key) for arm in arms]
    estimates = [(values.get("change"), values.get("ci")) if values else (None, None) for values in values_of_arms]
    digits = common_digits(estimates)
    return [_cell(values, place, digits) if values else None for values, place in zip(values_of_arms, forest(estimates), strict=True)]


def _cell(values: Mapping[str, Any], place: Forest | None, digits: int | None) -> Cell:
    return Cell(
        number(values.get("before"), digits=digits),
        number(values.get("after"), digits=digits),
        number(values.get("change"), signed=True, digits=digits),
        interval(values.get("ci"), signed=True, digits=digits),
        number(values.get("n"), digits=0),
        place,
    )


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
    low = min(ends)
    high = max(ends)
    if low == high:
        return [None] * len(estimates)

    def place(x: float) -> float:
        return round(4 + 92 * (x - low) / (high - low), 2)

    def places(value: Any, ci: Any) -> Forest | None:
        if not measured(value):
            return None
        ends = (place(ci[0]), place(ci[1])) if is_interval(ci) else (None, None)
        return Forest(place(0.0), place(value), *ends)

    return [places(value, ci) for value, ci in estimates]


def steering(steer: Mapping[str, Any] | None) -> str:
    """How an arm was steered, in words."""
    steer = steer or {}
    when = {"train": "during training, off afterwards", "inference": "at inference only"}.get(steer.get("when", "never"))
    if when is None:
        return "not steered"
    strength = steer.get("strength")
    sense = "against" if measured(strength) and strength < 0 else "along"
    what = {"trait": f"{sense} the trait direction", "random": "along a random direction"}.get(steer.get("direction", ""))
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
    for comparison in metrics.get("comparisons") or []:
        groups.setdefault(str(comparison.get("metric")), []).append(comparison)
    return [{"metric": metric(key, group[0].get("unit")), "rows": _comparison_rows(group, labels)} for key, group in groups.items()]


def _comparison_rows(comparisons: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Comparisons of one metric with their words; their forests share a scale."""
    estimates = [(comparison.get("difference"), comparison.get("ci")) for comparison in comparisons]
    digits = common_digits(estimates)
    return [
        {
            "a": labels.get(str(comparison.get("a")), str(comparison.get("a"))),
            "b": labels.get(str(comparison.get("b")), str(comparison.get("b"))),
            "difference": number(comparison.get("difference"), signed=True, digits=digits),
            "ci": interval(comparison.get("ci"), signed=True, digits=digits),
            "p_adjusted": p_value(comparison.get("p_adjusted", comparison.get("p"))),
            "n": number(comparison.get("n"), digits=0),
            "verdict": _labelled_verdict(comparison, labels),
            "forest": place,
        }
        for comparison, place in zip(comparisons, forest(estimates), strict=True)
    ]


def _labelled_verdict(comparison: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """The verdict of a comparison in the words of the page, where arms go by their labels and metrics by their names."""
    key, a, b = (str(comparison.get(name)) for name in ("metric", "a", "b"))
    text = str(comparison.get("verdict") or "")
    if text.startswith(f"{key}: "):
        text = f"{metric(key).name}{text.removeprefix(key)}"
    for form in ("{} is lower than {}", "{} is higher than {}", "between {} and {}"):
        text = text.replace(form.format(a, b), form.format(_quoted(a, labels), _quoted(b, labels)), 1)
    return text


def completion_rows(metrics: Mapping[str, Any], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Prompts in their first order, each with the text of the base model and of every arm (None: not generated)."""
    columns: list[tuple[str, int | None, dict[str, Any]]] = [("Base model", None, _texts(metrics.get("base_completions")))]
    columns += [(labels[arm["name"]], i, _texts(arm.get("completions"))) for i, arm in enumerate(metrics.get("arms") or [])]
    columns = [column for column in columns if column[2]]
    prompts = dict.fromkeys(prompt for _, _, texts in columns for prompt in texts)
    return [
        {
            "prompt": prompt,
            "answers": [{"label": label, "index": index, "text": texts.get(prompt)} for label, index, texts in columns],
        }
        for prompt in prompts
    ]


def _texts(completions: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """Prompt -> text."""
    return {completion.get("prompt", ""): completion.get("text") for completion in completions or ()}


def training_losses(arms: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[tuple[str, int, list[float]]]:
    """Label, number and losses of every training run; arms that share one (same losses) are one entry."""
    runs: dict[tuple[float, ...], list[int]] = {}
    for i, arm in enumerate(arms):
        losses = tuple(float("nan") if loss is None else float(loss) for loss in (arm.get("train") or {}).get("loss") or ())
        if losses:
            runs.setdefault(losses, []).append(i)
    return [(" = ".join(labels[arms[i]["name"]] for i in members), members[0], list(losses)) for losses, members in runs.items()]


def _other_schema(schema: Any) -> WrongKindError:
    remedy = "read it with the library version that wrote it"
    return WrongKindError("these metrics cannot be reported", expected=f"schema {SCHEMA}", found=f"schema {schema}", remedy=remedy)
