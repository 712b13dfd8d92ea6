"""Measures of edits as metrics of experiments: an item is a fact with its prompts, its value one column of a measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from steer.checks import of_type, one_of
from steer.edits import Fact, FactRecord
from steer.edits.measure import measures_of
from steer.edits.readings import EditReader
from steer.errors import ConfigError
from steer.experiment.metric import HIGHER, Item, Metric

SCORE = "score"
READS = (SCORE, "magnitude", "accuracy", "probability")


class EditMetric(Metric):
    """One column of a measure of edits.

    Attributes:
        measure: its name. prompts: key of the list of prompts that it is measured on; None for the prompt of the fact.
    """

    measure: ClassVar[str]
    prompts: ClassVar[str | None] = None
    better = HIGHER

    def __init__(self, reads: str = SCORE, chat: bool = False) -> None:
        self.reads = one_of(reads, READS, f"`reads` of edit_{self.measure}")
        of_type(chat, bool, f"`chat` of edit_{self.measure}", "pass true or false")
        self.chat = chat
        self.unit = "probability" if reads in ("magnitude", "probability") else ""
        self.column = self.measure if reads == SCORE else f"{self.measure}_{reads}"
        # accuracy and probability are of one object: of the true one for neighbours, else of the new one
        needs_true = reads in READS[:2] or self.measure == "neighbourhood"
        self.keys = ("prompt", "subject", "target", *(("true",) if needs_true else ()))

    def check_item(self, item: Item) -> None:
        if self.prompts is not None:
            prompts = item.get(self.prompts)
            if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(text, str) and text.strip() for text in prompts):
                raise _no_prompts(self.measure, self.prompts, item)

    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
        records = [self._record(item) for item in items]
        reader = EditReader(model, tokenizer, measures_of(self.measure), chat=self.chat, progress=False)
        seen = reader.read(records)
        return {item["id"]: reader.values(record, seen)[self.column] for item, record in zip(items, records, strict=True)}

    def _record(self, item: Item) -> FactRecord:
        start = f"{item['system']}\n\n" if item.get("system") else ""
        fact = Fact.of(f"{start}{item['prompt']}", item["subject"], item["target"], item.get("true"))
        paraphrases, neighbours = (tuple(f"{start}{text}" for text in item.get(name) or ()) for name in ("paraphrases", "neighbours"))
        return FactRecord(fact, paraphrases, neighbours)


# ---- errors


def _no_prompts(measure: str, key: str, item: Item) -> ConfigError:
    what = f"metric 'edit_{measure}' cannot read item '{item['id']}'"
    remedy = "give every item a list of prompts, or choose another metric"
    return ConfigError(what, expected=f"a list of texts `{key}`", found=f"{item.get(key)!r:.60}", remedy=remedy)
