"""Metrics of an experiment: one number for each item, of a model as it is. A new one is a file with one registered class.

    # steer/experiment/metrics/length.py
    @METRICS.register("length")
    class Length(GenerationMetric):
        '''Words of an answer.'''

        unit = "words"

        def score(self, item: Item, text: str) -> float:
            return float(len(text.split()))

An experiment names it (`metric: length`), and so do `steer.compare(model, arms, "length", items)` and a configuration. A function of one's
own needs no class and no name: `steer.compare(model, arms, my_function, items)`.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from steer.checks import errors_of, of_type
from steer.errors import ConfigError, NonFiniteError
from steer.experiment.complete import complete
from steer.model.tokens import Row, encode
from steer.registry import Registry

Item = Mapping[str, Any]

HIGHER, LOWER = "higher", "lower"
NEEDS = ("forward", "generation", "judge")


class Metric(ABC):
    """A number for each item.

    Attributes:
        unit: what the numbers are counted in; empty for a share or a ratio.
        better: `higher` or `lower`, None where that is for the experiment to say.
        needs: `forward` passes, `generation`, or a `judge`, the dearer ones last.
        keys: texts that each item must have.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = ""
    better: ClassVar[str | None] = None
    needs: ClassVar[str] = "forward"
    keys: ClassVar[tuple[str, ...]] = ()

    def prepare(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> None:  # noqa: B027 - most need nothing
        """Sees the base model once, before anything acts on it: for what a metric compares with."""

    @abstractmethod
    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
        """Item id -> value, of the model as it is: a plan that is attached stays in force.

        Args:
            items: with `id`, the texts of `keys`, and where an arm has a prompt of its own a `system` message, see `encoded`.
        """


class GenerationMetric(Metric):
    """A metric that scores what the model says to `prompt`.

    Args:
        max_new_tokens: length of an answer. Metrics with the same length share the answers.
    """

    needs = "generation"
    keys = ("prompt",)

    def __init__(self, max_new_tokens: int = 48) -> None:
        self.max_new_tokens = max_new_tokens

    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
        return self.scores(items, complete(model, tokenizer, items, max_new_tokens=self.max_new_tokens))

    def scores(self, items: Sequence[Item], texts: Sequence[str]) -> dict[str, float]:
        """Item id -> value, for texts that were generated already."""
        return {item["id"]: self.score(item, text) for item, text in zip(items, texts, strict=True)}

    @abstractmethod
    def score(self, item: Item, text: str) -> float:
        """The value of one answer."""


METRICS: Registry[type[Metric]] = Registry("metric", "steer.experiment.metrics", "steer.metrics", subclass_of=Metric)


def encoded(tokenizer: Any, item: Item, answer: str | None = None) -> Row:
    """The tokens of an item's prompt and an answer, with the system message that an arm gives it."""
    return encode(tokenizer, item["prompt"], answer, system=item.get("system"))


def with_ids(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with an `id`: their own, or one made of their content, which does not change with their order.

    Raises:
        ConfigError: a row that is no mapping, or an id that two rows have.
    """
    items: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        of_type(row, Mapping, f"item {number}", "pass one mapping for each item, e.g. {'prompt': ..., 'answer': ...}")
        name = str(row["id"]) if "id" in row else _digest(row)
        if name in seen and "id" in row:
            raise _same_id(name, seen[name], number)
        while name in seen:  # the same text twice
            name += "'"
        seen[name] = number
        items.append({**row, "id": name})
    return items


def check_items(metric: Metric, items: Sequence[Item]) -> None:
    """Raises ConfigError when there are none, or when one lacks a text that the metric reads."""
    if not items:
        raise _no_items(metric)
    for item in items:
        if missing := [key for key in metric.keys if not isinstance(item.get(key), str) or not item[key].strip()]:
            raise _missing_texts(metric, item, missing)


def measured(metric: Metric, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
    """The values of a metric, checked.

    Raises:
        ConfigError: the metric fails, or gives values of other items. NonFiniteError: a value that is NaN or infinite.
    """
    with errors_of(f"metric '{name_of(metric)}'", "correct its `items`"):
        values = metric.items(model, tokenizer, items)
    return checked(metric, items, values)


def checked(metric: Metric, items: Sequence[Item], values: Any) -> dict[str, float]:
    """Values in the order of the items. Raises as `measured`."""
    ids = [item["id"] for item in items]
    if not isinstance(values, Mapping) or set(values) != set(ids):
        raise _other_items(metric, ids, values)
    numbers = {name: float(values[name]) for name in ids}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise _non_finite(metric, name, value)
    return numbers


def name_of(metric: Metric) -> str:
    """What a metric is called: its registered name, or that of its class."""
    return getattr(metric, "name", None) or type(metric).__name__


def _digest(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ---- errors


def _same_id(name: str, first: int, second: int) -> ConfigError:
    remedy = "give each item an id of its own, or leave `id` out"
    return ConfigError(f"two items are called '{name}'", expected="an id for each", found=f"items {first} and {second}", remedy=remedy)


def _no_items(metric: Metric) -> ConfigError:
    what = f"there is nothing to measure '{name_of(metric)}' on"
    return ConfigError(what, expected="one item or more", found="none", remedy="pass items, or check the data set")


def _missing_texts(metric: Metric, item: Item, missing: list[str]) -> ConfigError:
    what = f"metric '{name_of(metric)}' cannot read item '{item['id']}', which lacks {', '.join(missing)}"
    expected = f"the texts {', '.join(metric.keys)}, none of them empty"
    found = ", ".join(key for key in item if key != "id") or "no keys"
    return ConfigError(what, expected=expected, found=found, remedy="give every item these texts, or choose another metric")


def _other_items(metric: Metric, ids: list[str], values: Any) -> ConfigError:
    if isinstance(values, Mapping):
        missing = [name for name in ids if name not in values]
        more = [str(name) for name in values if name not in set(ids)]
        found = f"{len(missing)} missing ({', '.join(missing[:3])}), {len(more)} unknown ({', '.join(more[:3])})"
    else:
        found = type(values).__name__
    what = f"metric '{name_of(metric)}' gave values of other items"
    return ConfigError(what, expected=f"a value for each of {len(ids)} items, by id", found=found, remedy="correct its `items`")


def _non_finite(metric: Metric, item: str, value: float) -> NonFiniteError:
    what = f"metric '{name_of(metric)}' is not finite at item '{item}'"
    return NonFiniteError(
        what, expected="a finite number", found=value, remedy="look at that item; a training that diverged gives such values"
    )
