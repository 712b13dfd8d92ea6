"""Edit measures, one file each in `steer.edits.measures`: what is asked of a model for a record, and the numbers that its answers give.

A measure only says what it wants: answers scored behind prompts, texts written, texts read. All measures of a run are read together, each
prompt once (`steer.edits.readings`). Definitions are those of ROME and MEMIT (Meng et al. 2022, arXiv 2202.05262 and 2210.07229); each is a
mean over the prompts of a record first, then over records.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from steer.edits.answer_scores import Answer, Question
from steer.edits.record import FactRecord
from steer.errors import ConfigError
from steer.registry import Registry

FORWARD, GENERATION = "forward", "generation"
SHARE = "%"


@dataclass(frozen=True)
class Column:
    """A number that a measure gives for each record.

    Attributes:
        name: of the value; `title` heads a column of a table.
        unit: `%` for a share, which is stored from 0 to 1; else what the number is counted in, or empty.
        better: `higher` or `lower`, None where it should stay as it was.
        meaning: in one sentence.
    """

    name: str
    title: str
    unit: str
    better: str | None
    meaning: str

    @property
    def digits(self) -> int:
        """Decimals that a table shows."""
        return 1 if self.unit == SHARE else 3

    @property
    def scale(self) -> float:
        """From the stored number to the one that is shown."""
        return 100.0 if self.unit == SHARE else 1.0


@dataclass(frozen=True)
class Wanted:
    """What a measure needs for a record.

    Attributes:
        answers: prompts with answers that are scored behind them.
        greedy: prompts that the model goes on from, taking the likeliest token each time.
        sampled: prompts that it goes on from by chance.
        read: texts whose loss is measured.
    """

    answers: tuple[Question, ...] = ()
    greedy: tuple[str, ...] = ()
    sampled: tuple[str, ...] = ()
    read: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Readings:
    """What a model gave: scores of answers, texts that it wrote without their prompts, and the loss of texts in nat per token."""

    answers: Mapping[Question, Answer] = field(default_factory=dict)
    greedy: Mapping[str, str] = field(default_factory=dict)
    sampled: Mapping[str, str] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)


class EditMeasure(ABC):
    """One measure.

    Attributes:
        name: under which it is registered.
        columns: the numbers that it gives.
        needs: `forward` passes, or `generation`, which is dearer and only measured when it is asked for.

    Example:
        >>> measure = EDIT_MEASURES.get("efficacy")
        >>> measure.columns, measure.needs
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    needs: ClassVar[str] = FORWARD

    @abstractmethod
    def wanted(self, record: FactRecord) -> Wanted:
        """What has to be read for a record; nothing where it lacks the prompts."""

    @abstractmethod
    def values(self, record: FactRecord, seen: Readings, before: Readings | None) -> dict[str, float]:
        """Numbers by column, without those that a record has none of.

        Args:
            seen: of the model as it is. before: of the model before the edit; None while that is read itself.
        """


EDIT_MEASURES: Registry[type[EditMeasure]] = Registry(
    "edit measure", "steer.edits.measures", "steer.edit_measures", subclass_of=EditMeasure
)


def measures_of(names: Sequence[str] | str | None) -> list[EditMeasure]:
    """The measures of these names, `all` of them, or without names those that need no generation. Raises ConfigError."""
    if isinstance(names, str):
        names = list(EDIT_MEASURES) if names == "all" else [names]
    if names is None:
        chosen = [found for found in map(EDIT_MEASURES.get, EDIT_MEASURES) if found.needs == FORWARD]
    else:
        chosen = [EDIT_MEASURES.get(name) for name in dict.fromkeys(names)]
    if not chosen:
        raise _nothing_to_measure()
    return [measure() for measure in sorted(chosen, key=lambda measure: _ORDER.get(measure.name, len(_ORDER)))]


def columns_of(measures: Sequence[EditMeasure]) -> list[Column]:
    """All columns, in the order of a table."""
    return [column for measure in measures for column in measure.columns]


_ORDER = {name: place for place, name in enumerate(("efficacy", "paraphrase", "neighbourhood", "portability", "locality"))}


def mean(values: Sequence[float]) -> float:
    """Of at least one."""
    return sum(values) / len(values)


# ---- errors


def _nothing_to_measure() -> ConfigError:
    remedy = "name some, or leave `measures` out for those that need no generation"
    return ConfigError("no measure of edits is named", expected=f"some of {', '.join(EDIT_MEASURES)}", found="none", remedy=remedy)
