"""Outcome: what an experiment measures, on which items, and what part that plays in the verdict.

outcomes = [
    Outcome("warmth", "logprob_gap", heldout, role="primary", better="lower"),
    Outcome("running text", "perplexity", passages, role="guardrail", margin=0.02),
]
prepare_all(outcomes, model, tokenizer)  # with the base model, once
values = measure_all(outcomes, model, tokenizer)  # with what an arm does to it: {"warmth": {item id: value}, ...}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn

from steer.checks import errors_of, finite_number, of_type, one_of
from steer.errors import ConfigError, ContextError, SteerError
from steer.experiment.complete import complete
from steer.experiment.metric import (
    HIGHER,
    LOWER,
    GenerationMetric,
    Item,
    Metric,
    ReadingMetric,
    check_items,
    checked,
    measured,
    metric_of,
    name_of,
    with_ids,
    with_system,
)
from steer.model.capture import evaluating
from steer.model.tokens import Row, encode, plain

PRIMARY, SECONDARY, GUARDRAIL, EXPLORATORY = "primary", "secondary", "guardrail", "exploratory"
ROLES = (PRIMARY, SECONDARY, GUARDRAIL, EXPLORATORY)


@dataclass(frozen=True, eq=False)
class Outcome:
    """A metric on items, with its role.

    Attributes:
        name: what results are called; one for each outcome of an experiment.
        metric: a metric, or what `metric_of` makes one of.
        items: mappings, which get an `id` where they have none; None for a metric that brings its own.
        role: `primary`, the one that the verdict is about; `secondary`, planned beside it; `guardrail`, which must not get worse by more
            than `margin`; `exploratory`, the rest.
        better: `higher` or `lower`; that of the metric by default. A primary outcome and a guardrail need one.
        margin: of a guardrail, above 0, in the unit of the metric.

    Raises:
        ConfigError: a role without what it needs, items that the metric cannot read, and what `metric_of` and `with_ids` refuse.

    Example:
        >>> gap = steer.Outcome("gap", "logprob_gap", items, better="higher")
        >>> steer.compare(model, {"plain": None, "warm": plan}, [gap]).verdict
    """

    name: str
    metric: Any  # a Metric from __post_init__ on
    items: Sequence[Item] = None  # type: ignore[assignment]
    role: str = PRIMARY
    better: str | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        of_type(self.name, str, "the name of an outcome", "pass a short text such as 'warmth'")
        if not self.name.strip():
            raise _no_name()
        metric = metric_of(self.metric)
        one_of(self.role, ROLES, f"the role of outcome '{self.name}'")
        better = metric.better if self.better is None else one_of(self.better, (HIGHER, LOWER), f"better of outcome '{self.name}'")
        if better is None and self.role in (PRIMARY, GUARDRAIL):
            raise _no_better(self, metric)
        self._check_margin()
        rows = metric.own_items() if self.items is None else self.items
        of_type(rows, (Iterable, type(None)), f"the items of outcome '{self.name}'", "pass a list of mappings")
        rows = list(rows or ())
        items = tuple(with_ids(rows))
        check_items(metric, items)
        self._check_sample(rows, items)
        for field, value in {"metric": metric, "better": better, "items": items}.items():
            object.__setattr__(self, field, value)

    def _check_margin(self) -> None:
        if self.role == GUARDRAIL:
            if self.margin is None:
                raise _no_margin(self)
            finite_number(self.margin, f"the margin of outcome '{self.name}'", above=0)
        elif self.margin is not None:
            raise _idle_margin(self)

    def _check_sample(self, rows: Sequence[Item], items: Sequence[Item]) -> None:
        """An item that stands there twice would count as two."""
        if len(items) < 2:
            raise _one_item(self)
        for number, (row, item) in enumerate(zip(rows, items, strict=True), 1):
            if "id" not in row and item["id"].endswith("'"):  # `with_ids` had given that id already
                first = next(i for i, other in enumerate(items, 1) if other["id"] == item["id"].rstrip("'"))
                raise _same_item(self, first, number)

    def __repr__(self) -> str:
        return f"Outcome({self.name!r}, {name_of(self.metric)}, {len(self.items)} items, {self.role})"


def check_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Raises ConfigError unless names differ and exactly one outcome is primary."""
    for number, outcome in enumerate(outcomes):
        of_type(outcome, Outcome, f"outcome {number + 1}", "make it with steer.experiment.outcome.Outcome")
        if outcome.name in {earlier.name for earlier in outcomes[:number]}:
            raise _same_name(outcome)
    if len(primary := [outcome.name for outcome in outcomes if outcome.role == PRIMARY]) != 1:
        raise _not_one_primary(primary)


def prepare_all(outcomes: Sequence[Outcome], model: nn.Module, tokenizer: Any) -> None:
    """Shows every metric the base model, once and before anything acts on it. Raises ConfigError, and what the metrics raise."""
    check_outcomes(outcomes)
    for outcome in outcomes:
        with evaluating(model), errors_of(f"metric '{name_of(outcome.metric)}'", "correct its `prepare`"):
            outcome.metric.prepare(model, tokenizer, outcome.items)


def measure_all(outcomes: Sequence[Outcome], model: nn.Module, tokenizer: Any, *, system: str | None = None) -> dict[str, dict[str, float]]:
    """Outcome name -> item id -> value, of the model as it is.

    Metrics of answers of the same length share the answers; those that read the same of the same items share what is read.

    Args:
        system: message that an arm puts before every item.

    Raises:
        ConfigError, NonFiniteError: as `measured`, and what the metrics raise. ContextError: a metric whose passes a plan cannot act in.
    """
    check_outcomes(outcomes)
    items = {outcome.name: with_system(outcome.items, system) for outcome in outcomes}
    answers = _answers(outcomes, items, model, tokenizer)
    values: dict[str, dict[str, float]] = {}
    readings: list[tuple[ReadingMetric, Sequence[Item], Mapping[str, float]]] = []
    for outcome in outcomes:
        own = items[outcome.name]
        metric: Metric = outcome.metric
        if _shares_reading(metric):
            with _tokens_of(metric):
                values[outcome.name] = _read_once(metric, own, readings, model, tokenizer)
            continue
        if not _shares_answers(metric):
            with _tokens_of(metric):
                values[outcome.name] = measured(metric, model, tokenizer, own)
            continue
        texts = [answers[_question(metric, item)] for item in own]
        with errors_of(f"metric '{name_of(metric)}'", "correct its `score`"):
            scores = metric.scores(own, texts, tokenizer)
        values[outcome.name] = checked(metric, own, scores)
    return values


@contextmanager
def naming_arm(arm: str) -> Iterator[None]:
    """Puts the name of the arm before what is wrong while it is measured."""
    try:
        yield
    except SteerError as error:
        if f"'{arm}'" in error.what:
            raise
        raise type(error)(f"arm '{arm}': {error.what}", expected=error.expected, found=error.found, remedy=error.remedy) from error


@contextmanager
def _tokens_of(metric: Metric) -> Iterator[None]:
    """Says of which metric the passes are in which a plan does not know its tokens."""
    try:
        yield
    except ContextError as error:
        raise _no_such_tokens(metric, error) from error


def _shares_reading(metric: Metric) -> TypeGuard[ReadingMetric]:
    """It has values of what it reads, rather than `items` of its own."""
    return isinstance(metric, ReadingMetric) and type(metric).items is ReadingMetric.items


def _read_once(
    metric: ReadingMetric,
    items: Sequence[Item],
    readings: list[tuple[ReadingMetric, Sequence[Item], Mapping[str, float]]],
    model: nn.Module,
    tokenizer: Any,
) -> dict[str, float]:
    """Values of a metric, of a reading of these items that is there already if there is one; else it is added to `readings`."""
    reading = next((seen for other, same, seen in readings if other.read == metric.read and list(same) == list(items)), None)
    with errors_of(f"metric '{name_of(metric)}'", "correct its `reading` or `value`"):
        if reading is None:
            with evaluating(model):
                reading = metric.reading(model, tokenizer, items)
            readings.append((metric, items, reading))
        values = metric.values(items, reading)
    return checked(metric, items, values)


_Question = tuple[int, str, str | None]  # length of the answer, prompt, system message


def _question(metric: GenerationMetric, item: Item) -> _Question:
    return (metric.max_new_tokens, item["prompt"], item.get("system"))


def _shares_answers(metric: Metric) -> TypeGuard[GenerationMetric]:
    """It scores texts, rather than having `items` of its own."""
    return isinstance(metric, GenerationMetric) and type(metric).items is GenerationMetric.items


def _answers(outcomes: Sequence[Outcome], items: Mapping[str, Sequence[Item]], model: nn.Module, tokenizer: Any) -> dict[_Question, str]:
    """What the model says to each question of the metrics of answers, asked once."""
    asked: dict[int, dict[_Question, Item]] = {}
    for outcome in outcomes:
        metric: Metric = outcome.metric
        if _shares_answers(metric):
            for item in items[outcome.name]:
                asked.setdefault(metric.max_new_tokens, {}).setdefault(_question(metric, item), item)
    texts: dict[_Question, str] = {}
    for max_new_tokens, questions in asked.items():
        texts |= zip(questions, complete(model, tokenizer, list(questions.values()), max_new_tokens=max_new_tokens), strict=True)
    return texts


def texts_of(outcomes: Sequence[Outcome], tokenizer: Any) -> list[Row]:
    """Texts of an experiment, on which the sizes of edits are measured: the items of the first outcome whose items have texts."""
    for outcome in outcomes:
        rows = [_row(tokenizer, item) for item in outcome.items if _has_text(item)]
        if rows:
            return rows
    return []


def _has_text(item: Item) -> bool:
    return any(isinstance(item.get(key), str) and item[key].strip() for key in ("text", "prompt"))


def _row(tokenizer: Any, item: Item) -> Row:
    return (
        encode(tokenizer, item["prompt"], item.get("neutral") or item.get("answer")) if "prompt" in item else plain(tokenizer, item["text"])
    )


# ---- what can show nothing


def is_constant(values: Mapping[str, Mapping[str, float]]) -> bool:
    """Arm -> item id -> value: all are one number, which no test can learn from."""
    return len({value for of_arm in values.values() for value in of_arm.values()}) < 2


def check_informative(outcome: Outcome, values: Mapping[str, Mapping[str, float]]) -> None:
    """Raises ConfigError when a primary outcome is one number for every item in every arm.

    Args:
        values: arm -> item id -> value.
    """
    if outcome.role == PRIMARY and is_constant(values):
        raise _constant(outcome, values)


# ---- errors


def _no_such_tokens(metric: Metric, error: ContextError) -> ContextError:
    return ContextError(
        f"metric '{name_of(metric)}' runs passes in which the plan cannot know its tokens: {error.what}",
        expected=error.expected,
        found=error.found,
        remedy="give the plan a scope that needs no generation, such as 'all' or 'prompt', or measure by a metric of answers, "
        f"which generates them ('checker', 'judge', 'repetition'). Of a metric of your own: {error.remedy}",
    )


def _no_name() -> ConfigError:
    return ConfigError("an outcome has no name", expected="a short text", found="an empty one", remedy="call it what it measures")


def _no_better(outcome: Outcome, metric: Metric) -> ConfigError:
    what = f"{outcome.role} outcome '{outcome.name}' does not say which way is better"
    expected = f"better='{HIGHER}' or better='{LOWER}', which metric '{name_of(metric)}' leaves to the experiment"
    return ConfigError(what, expected=expected, found="none", remedy=f"say what the question hopes for, e.g. better='{LOWER}'")


def _no_margin(outcome: Outcome) -> ConfigError:
    remedy = "say in advance how much worse is still harmless, e.g. margin=0.02"
    return ConfigError(
        f"guardrail '{outcome.name}' has no margin", expected="margin > 0, in the unit of its metric", found="none", remedy=remedy
    )


def _idle_margin(outcome: Outcome) -> ConfigError:
    what = f"{outcome.role} outcome '{outcome.name}' has a margin, which nothing reads"
    return ConfigError(
        what,
        expected="a margin of a guardrail only",
        found=f"margin {outcome.margin}",
        remedy="make it role='guardrail', or leave the margin out",
    )


def _one_item(outcome: Outcome) -> ConfigError:
    what = f"outcome '{outcome.name}' has one item"
    return ConfigError(what, expected="two or more, of which statistics can be made", found="1", remedy="measure it on more items")


def _same_item(outcome: Outcome, first: int, second: int) -> ConfigError:
    return ConfigError(
        f"an item of outcome '{outcome.name}' stands there twice",
        expected="items that differ: the same one twice would count as more evidence than it is",
        found=f"items {first} and {second} are the same",
        remedy="leave one of them out, or give each an `id` of its own if they are to count apart",
    )


def _same_name(outcome: Outcome) -> ConfigError:
    what = f"two outcomes are called '{outcome.name}'"
    return ConfigError(what, expected="a name for each", found=outcome.name, remedy="give one of the two another name")


def _not_one_primary(names: list[str]) -> ConfigError:
    remedy = "choose the one that the verdict is about; make the others role='secondary' or 'exploratory'"
    return ConfigError("an experiment has one primary outcome", expected="exactly one", found=", ".join(names) or "none", remedy=remedy)


def _constant(outcome: Outcome, values: Mapping[str, Mapping[str, float]]) -> ConfigError:
    number = next((value for of_arm in values.values() for value in of_arm.values()), None)
    what = f"primary outcome '{outcome.name}' is the same for every item in every arm"
    found = f"{number} in {', '.join(values) or 'no arms'}"
    remedy = "look at the answers: choose items, or a metric, that can come out both ways"
    return ConfigError(what, expected="numbers that differ", found=found, remedy=remedy)
