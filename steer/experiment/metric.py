"""Metrics of an experiment: one number for each item, of a model as it is. A new one is a file with one registered class.

    # steer/experiment/metrics/length.py
    @METRICS.register("length")
    class Length(GenerationMetric):
        '''Words of an answer.'''

        unit = "words"

        def score(self, item: Item, text: str) -> float:
            return float(len(text.split()))

An experiment names it (`metric: length`), and so do `steer.compare(model, arms, "length", items)` and a configuration. A function of one's
own needs no class and no name: `steer.compare(model, arms, my_function, items)`. `metric_of` reads all these forms.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from steer.checks import errors_of, of_type, whole_number
from steer.entries import source_digest
from steer.errors import ConfigError, NonFiniteError, SteerError, did_you_mean
from steer.experiment.complete import complete
from steer.model.capture import evaluating
from steer.model.tokens import Row, encode, plain
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
        label: what errors call it; its registered name, or that of its class, by default.
    """

    name: ClassVar[str]
    needs: ClassVar[str] = "forward"
    label: str | None = None
    unit: str = ""
    better: str | None = None
    keys: tuple[str, ...] = ()

    def __repr__(self) -> str:
        options = [f"{name}={getattr(self, name)!r}" for name in option_names(type(self)) if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(options)})"

    def prepare(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> None:  # noqa: B027 - most need nothing
        """Sees the base model once, before anything acts on it: for what a metric compares with."""

    def check_item(self, item: Item) -> None:  # noqa: B027 - texts are all that most need
        """Raises ConfigError for an item that it cannot read, beyond the texts of `keys`."""

    def code_digest(self) -> str | None:
        """SHA-256 of the code of one's own that gives the values; a cell is measured again when it changes. None for what ships."""
        return source_digest(type(self))

    def own_items(self) -> list[dict[str, Any]] | None:
        """The items of a metric that brings them along, such as a benchmark; None for one that is given them."""
        return None

    @abstractmethod
    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> Mapping[str, float]:
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
        whole_number(max_new_tokens, "max_new_tokens of a metric", least=1)
        self.max_new_tokens = max_new_tokens

    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> Mapping[str, float]:
        return self.scores(items, complete(model, tokenizer, items, max_new_tokens=self.max_new_tokens), tokenizer)

    def scores(self, items: Sequence[Item], texts: Sequence[str], tokenizer: Any) -> Mapping[str, float]:
        """Item id -> value, for texts that were generated already."""
        return {item["id"]: self.score(item, text) for item, text in zip(items, texts, strict=True)}

    def score(self, item: Item, text: str) -> float:
        """The value of one answer, where `scores` looks at one at a time."""
        raise NotImplementedError(f"{type(self).__name__} defines neither score nor scores")


class ReadingMetric(Metric):
    """A metric that makes its values of a reading of the model, which outcomes that ask for the same one on the same items share.

    A subclass defines `reading`, and `value` where that is another number than what was read.
    """

    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> Mapping[str, float]:
        return self.values(items, self.reading(model, tokenizer, items))

    def values(self, items: Sequence[Item], reading: Mapping[str, float]) -> dict[str, float]:
        """Item id -> value."""
        return {item["id"]: self.value(reading[item["id"]]) for item in items}

    @property
    def read(self) -> Hashable:
        """What is read of an item: equal for metrics that may share a reading; by default a metric shares its own with none."""
        return self

    @abstractmethod
    def reading(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> Mapping[str, float]:
        """Item id -> what is read, of the model as it is."""

    def value(self, read: float) -> float:
        """The value of one item."""
        return read


METRICS: Registry[type[Metric]] = Registry("metric", "steer.experiment.metrics", "steer.metrics", subclass_of=Metric)


def item_key(key: Any, option: str) -> str:
    """The name of an item's text, checked. Raises ConfigError."""
    of_type(key, str, f"option '{option}' of a metric", "pass the key under which an item has that text")
    return key


def encoded(tokenizer: Any, item: Item, answer: str | None = None) -> Row:
    """The tokens of an item's prompt and an answer, with the system message that an arm gives it."""
    return encode(tokenizer, item["prompt"], answer, system=item.get("system"))


def passage(tokenizer: Any, item: Item, key: str = "text") -> Row:
    """The tokens of running text, all of which but the first are scored. The system message of an arm stands before it, and moves the
    place of these tokens but not their number."""
    row = plain(tokenizer, item[key])
    if not (system := item.get("system")):
        return row
    begins = 1 if row.ids[0] == tokenizer.bos_token_id else 0
    before = tokenizer(f"{system}\n\n", add_special_tokens=False).input_ids
    return Row((*row.ids[:begins], *before, *row.ids[begins:]), len(before) + 1)


def with_system(items: Sequence[Item], system: str | None) -> list[Item]:
    """Items under the system message of an arm, which stands before one that an item has itself."""
    if not system:
        return list(items)
    return [{**item, "system": f"{system}\n\n{item['system']}" if item.get("system") else system} for item in items]


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
        metric.check_item(item)


def measured(metric: Metric, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
    """The values of a metric, checked: measured in evaluation mode without gradients, whatever the metric does about either.

    With gradients a pass would count as one of training, in which a plan that acts at inference does not act.

    Raises:
        ConfigError: the metric fails, or gives values of other items. NonFiniteError: a value that is NaN or infinite.
    """
    with evaluating(model), errors_of(f"metric '{name_of(metric)}'", "correct its `items`"):
        values = metric.items(model, tokenizer, items)
    return checked(metric, items, values)


def checked(metric: Metric, items: Sequence[Item], values: Any) -> dict[str, float]:
    """Values in the order of the items. Raises as `measured`."""
    ids = [item["id"] for item in items]
    if not isinstance(values, Mapping) or set(values) != set(ids):
        raise _other_items(metric, ids, values)
    numbers = {}
    for name in ids:
        try:
            numbers[name] = float(values[name])
        except (TypeError, ValueError, RuntimeError) as error:
            raise _no_number(metric, name, values[name]) from error
        if not math.isfinite(numbers[name]):
            raise _non_finite(metric, name, numbers[name])
    return numbers


def name_of(metric: Metric) -> str:
    """What a metric is called."""
    return metric.label or getattr(metric, "name", None) or type(metric).__name__


# ---- from a configuration


def metric_of(spec: Any) -> Metric:
    """The metric that is meant.

    Args:
        spec: a registered name; a mapping `{"metric": name, <option>: <value>, ...}`; a function `f(model, tokenizer, items)`, or its
            import path `package.module:function` in place of a name; a metric, or its class.

    Raises:
        ConfigError: an unknown name or option, with the nearest one; a value that an option cannot take; anything else.
    """
    if isinstance(spec, Metric):
        return spec
    options = dict(spec) if isinstance(spec, Mapping) else {"metric": spec}
    if (named := options.pop("metric", None)) is None:
        raise _no_metric(spec)
    if isinstance(named, type) and issubclass(named, Metric):
        return _made(named, options)
    if isinstance(named, str) and ":" in named or callable(named) and not isinstance(named, type | nn.Module):
        named, options = "function", {"call": named, **options}
    if not isinstance(named, str):
        raise _no_metric(spec)
    return _made(METRICS.get(named), options)


def _made(metric_class: type[Metric], options: Mapping[str, Any]) -> Metric:
    name = getattr(metric_class, "name", metric_class.__name__)
    known = option_names(metric_class)
    if unknown := [option for option in options if option not in known]:
        raise _unknown_option(name, str(unknown[0]), known)
    try:
        return metric_class(**options)
    except SteerError:
        raise
    except (TypeError, ValueError) as error:
        raise _impossible_metric(name, error) from error


def option_names(metric_class: type[Metric]) -> list[str]:
    """Arguments of a metric, with those of the class above it where it hands on what it does not know itself."""
    names: list[str] = []
    for cls in metric_class.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names += [parameter.name for parameter in parameters if parameter.kind not in variable]
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names


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


def _no_number(metric: Metric, item: str, value: Any) -> ConfigError:
    what = f"metric '{name_of(metric)}' gives no number at item '{item}'"
    found = f"{type(value).__name__} {str(value)[:60]!r}"
    return ConfigError(what, expected="one number", found=found, remedy="correct its `items`, or leave that item out")


def _no_metric(spec: Any) -> ConfigError:
    expected = "a name, a mapping {'metric': name, ...options}, a function f(model, tokenizer, items), or a metric"
    found = (
        f"a mapping with {', '.join(map(str, spec)) or 'no keys'}"
        if isinstance(spec, Mapping)
        else f"{type(spec).__name__} {str(spec)[:60]!r}"
    )
    return ConfigError("no metric can be made of this", expected=expected, found=found, remedy=f"name one of {', '.join(METRICS)}")


def _unknown_option(name: str, option: str, known: list[str]) -> ConfigError:
    remedy = did_you_mean(option, known) or f"leave {option} out"
    return ConfigError(f"metric '{name}' has no option '{option}'", expected=", ".join(known) or "no options", found=option, remedy=remedy)


def _impossible_metric(name: str, error: Exception) -> ConfigError:
    expected = "all options that it needs, with values that they can take"
    return ConfigError(f"metric '{name}' cannot be made", expected=expected, found=error, remedy="see docs/experiments.md")
