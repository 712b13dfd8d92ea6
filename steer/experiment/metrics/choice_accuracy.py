"""Multiple choice: does a model find the right one of several answers likeliest?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type, one_of
from steer.errors import ConfigError
from steer.experiment.metric import HIGHER, METRICS, Item, Metric, encoded
from steer.model.likelihood import response_logprobs
from steer.model.tokens import pad_id


@METRICS.register("choice_accuracy")
class ChoiceAccuracy(Metric):
    """Accuracy on multiple choice: 1 where the right one of an item's `choices` is likeliest, else 0; `label` is its index, from 0.

    Each choice is an answer to `prompt` and scored by its log-probability, end-of-turn mark included. Chance is one in as many as there
    are choices.

    Args:
        length_normalised: compare log-probabilities per token; False compares their sums, which favour short choices.
        value: `accuracy`, or `probability`: that of the right choice among the choices, softmax of the scores, which moves before
            the accuracy does.
    """

    better = HIGHER
    keys = ("prompt",)

    def __init__(self, length_normalised: bool = True, value: str = "accuracy") -> None:
        of_type(length_normalised, bool, "length_normalised of 'choice_accuracy'", "pass true or false")
        self.length_normalised = length_normalised
        self.value = one_of(value, ("accuracy", "probability"), "value of 'choice_accuracy'")

    def check_item(self, item: Item) -> None:
        choices, label = item.get("choices"), item.get("label")
        if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise _no_choices(item)
        if len(set(choices)) < max(len(choices), 2):
            raise _too_few_choices(item)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
            raise _no_label(item)

    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
        rows = [encoded(tokenizer, item, choice) for item in items for choice in item["choices"]]
        scores = response_logprobs(model, rows, pad=pad_id(tokenizer))  # [choices of all items]
        if not self.length_normalised:
            scores = scores * torch.tensor([row.response for row in rows])
        of_items = scores.split([len(item["choices"]) for item in items])
        return {item["id"]: self._value(own, item["label"]) for item, own in zip(items, of_items, strict=True)}

    def _value(self, scores: Tensor, label: int) -> float:
        if self.value == "probability":
            return float(scores.softmax(0)[label])
        return float(int(scores.argmax()) == label)


# ---- errors


def _no_choices(item: Item) -> ConfigError:
    what = f"metric 'choice_accuracy' cannot read the choices of item '{item['id']}'"
    found = f"{type(item.get('choices')).__name__} {str(item.get('choices'))[:60]!r}"
    return ConfigError(what, expected="`choices`, a list of texts, none of them empty", found=found, remedy="give every item such a list")


def _too_few_choices(item: Item) -> ConfigError:
    what = f"item '{item['id']}' leaves no choice"
    return ConfigError(what, expected="two or more `choices` that differ", found=item["choices"], remedy="mend the item, or leave it out")


def _no_label(item: Item) -> ConfigError:
    what = f"item '{item['id']}' does not say which choice is right"
    expected = f"`label`, an index from 0 to {len(item['choices']) - 1}"
    return ConfigError(what, expected=expected, found=repr(item.get("label")), remedy="count the choices from 0")
