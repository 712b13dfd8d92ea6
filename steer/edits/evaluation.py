"""Evaluation of edits: what was measured of each fact before and after, with 95 % intervals over facts, and how much of it stays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steer.edits.measure import SHARE, Column, columns_of, measures_of
from steer.errors import ConfigError, WrongKindError, did_you_mean
from steer.files import atomic_write, check_seal, sealed
from steer.model.estimates import Bootstrap, Estimate
from steer.reading import damage_of, place_of, read_json

KIND, SCHEMA = "edit_evaluation", 1
SINGLE, BATCH, SEQUENCE = MODES = ("single", "batch", "sequence")
SCORES = ("efficacy", "paraphrase", "neighbourhood")  # whose harmonic mean is the score S
KEPT = "neighbourhood"  # whose share that is kept is shown
NOT_AVAILABLE = "not available"


@dataclass(frozen=True)
class EditRow:
    """One fact.

    Attributes:
        before, after: numbers by column, of the model before and right after the edit.
        final: on the weights after all edits of a sequence; None in other modes.
        neutral: change of the loss of neutral texts with this edit alone, nat per token; None where it was not measured.
        seconds: of CPU time that the edit took, what its value took at an earlier time included; a batch's divided by its facts.
        change: largest |dW| / |W| of a touched matrix.
        written: what the model goes on with behind the prompt before and after, where that was read.
        problem: why there was no edit, which then counts as one that changed nothing; empty where there was one.
    """

    name: str
    prompt: str
    subject: str
    target: str
    true: str | None
    before: Mapping[str, float]
    after: Mapping[str, float]
    final: Mapping[str, float] | None = None
    neutral: float | None = None
    seconds: float = 0.0
    change: float = 0.0
    written: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Summary:
    """One column over all facts, in the unit of its table.

    Attributes:
        before, after, final: None where no fact has the number.
    """

    column: Column
    before: Estimate | None
    after: Estimate | None
    final: Estimate | None


@dataclass(frozen=True, eq=False)
class EditEvaluation:
    """What edits did, fact by fact, and in a table; `steer.edits.evaluate_edits` makes it.

    Attributes:
        mode: `single`, each edit alone and undone; `batch`, all in one; `sequence`, one after the other.
        editor: name of the method.
        measures: names of what was measured.
        rows: the facts.
        neutral: change of the loss of neutral texts with all edits in place: value, low, high, before, texts, tokens; in `single` None.
        facts: model, settings, counts; JSON-able.

    Example:
        >>> evaluation["efficacy"].after
        >>> print(evaluation)
    """

    mode: str
    editor: str
    measures: tuple[str, ...]
    rows: tuple[EditRow, ...]
    neutral: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> Summary:
        """Raises ConfigError for a column that was not measured."""
        for summary in self.summary:
            if summary.column.name == column:
                return summary
        raise _no_column(column, [summary.column.name for summary in self.summary])

    def __repr__(self) -> str:
        told = [f"{each.column.title} {each.after.written(each.column.digits)}" for each in self.summary[:3] if each.after is not None]
        return f"EditEvaluation({self.editor}, {_facts(len(self))}, {self.mode}: {', '.join(told) or 'nothing measured'})"

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """That were measured."""
        return tuple(columns_of(measures_of(self.measures)))

    @cached_property
    def _bootstrap(self) -> Bootstrap:
        return Bootstrap(len(self.rows))

    @cached_property
    def summary(self) -> tuple[Summary, ...]:
        """Each column over all facts, with bootstrap intervals."""
        return tuple(
            Summary(column, *(self._bootstrap.mean(self._values(column.name, when, column.scale)) for when in ("before", "after", "final")))
            for column in self.columns
        )

    def _values(self, column: str, when: str, scale: float = 1.0) -> list[float | None]:
        """Of each fact, None where it has none."""
        found = [(getattr(row, when) or {}).get(column) for row in self.rows]
        return [None if value is None else scale * value for value in found]

    # ---- numbers made of several columns

    def score(self, when: str = "after") -> Estimate | None:
        """S: the harmonic mean of ES, PS and NS, in percent; None where one of them was not measured."""
        values = {name: self._values(name, when, 100.0) for name in SCORES}

        def harmonic(means: Mapping[str, Any]) -> Any:
            parts = np.stack([np.asarray(means[name], dtype=np.float64) for name in SCORES])  # [3] or [3, draws]
            whole = len(parts) / (1 / np.where(parts > 0, parts, 1.0)).sum(0)
            return np.where(np.isnan(parts).any(0), np.nan, np.where((parts > 0).all(0), whole, 0.0))

        return self._bootstrap.estimate(values, harmonic)

    def kept(self, when: str = "after") -> Estimate | None:
        """Neighbourhood score after, in percent of before; None where it was not measured, or was 0."""
        values = {"after": self._values(KEPT, when), "before": self._values(KEPT, "before")}
        if not any(values["before"]):
            return None

        def share(means: Mapping[str, Any]) -> Any:  # a draw without any kept neighbour before says nothing
            return 100 * means["after"] / np.where(np.asarray(means["before"]) > 0, means["before"], np.nan)

        return self._bootstrap.estimate(values, share)

    def retained(self) -> Estimate | None:
        """Of the edits that worked when they were made, the percentage that still do on the final weights; None but for a sequence."""
        worked = [row.final is not None and not row.problem and bool(row.after.get("efficacy")) for row in self.rows]
        still = [float(bool((row.final or {}).get("efficacy"))) * 100 if ok else None for row, ok in zip(self.rows, worked, strict=True)]
        return self._bootstrap.mean(still)

    def difference(self, other: EditEvaluation, column: str, when: str = "after") -> Estimate | None:
        """How a column differs from that of another evaluation of the same facts, paired over facts; in the unit of its table.

        Args:
            other: as of another editor, or with other settings.
            when: `before`, `after` or `final`.

        Returns:
            The mean of this one less the other one with its 95 % interval; None where no fact has both numbers.

        Raises:
            ConfigError: other facts, or a column that was not measured.

        Example:
            >>> evaluation.difference(evaluation, "efficacy").value
            0.0
        """
        if [row.name for row in self.rows] != [row.name for row in other.rows]:
            raise _other_facts(self, other)
        scale = self[column].column.scale
        pairs = zip(self._values(column, when, scale), other._values(other[column].column.name, when, scale), strict=True)
        return self._bootstrap.mean([None if a is None or b is None else a - b for a, b in pairs])

    def neutral_per_edit(self) -> Estimate | None:
        """Change of the loss of neutral texts for one edit, nat per token: the mean over facts, or that of all divided by their number."""
        if self.neutral is not None:
            n = len(self.rows)
            value, low, high = (None if (x := self.neutral.get(key)) is None else x / n for key in ("value", "low", "high"))
            return None if value is None else Estimate(value, low, high, n)
        return self._bootstrap.mean([row.neutral for row in self.rows])

    def seconds_per_edit(self) -> float:
        """CPU seconds."""
        return sum(row.seconds for row in self.rows) / max(len(self.rows), 1)

    def problems(self) -> dict[str, str]:
        """Facts that could not be edited, with the reason."""
        return {row.name: row.problem for row in self.rows if row.problem}

    # ---- to be read

    def cells(self) -> list[list[str]]:
        """Head and rows as text: column, before, after, and in a sequence after all edits."""
        is_sequence = self.mode == SEQUENCE
        head = ["", "before", "after", *(["after all edits"] if is_sequence else [])]
        rows = []
        for each in self.summary:
            numbers = (each.before, each.after, *([each.final] if is_sequence else []))
            title = f"{each.column.title}, {each.column.unit}" if each.column.unit else each.column.title
            rows.append([title, *(NOT_AVAILABLE if x is None else x.written(each.column.digits) for x in numbers)])
        return [head, *rows, *self._further(is_sequence)]

    def _further(self, is_sequence: bool) -> list[list[str]]:
        def row(title: str, *numbers: Estimate | None, digits: int = 1) -> list[str]:
            return [title, *("" if x is None else x.written(digits) for x in numbers)]

        whens = ("before", "after", "final") if is_sequence else ("before", "after")
        last = [None] if is_sequence else []
        rows = []
        if self.score() is not None:
            rows.append(row("S, %", *(self.score(when) for when in whens)))
        if self.kept() is not None:
            rows.append(row("neighbourhood kept, %", None, *(self.kept(when) for when in whens[1:])))
        if is_sequence and self.retained() is not None:
            rows.append(row("retained, %", None, None, self.retained()))
        if (neutral := self.neutral_per_edit()) is not None:
            rows.append(row("neutral loss per edit, nat per token", None, neutral, *last, digits=5))
        rows.append(["CPU seconds per edit", "", f"{self.seconds_per_edit():.1f}", *([""] if is_sequence else [])])
        return rows

    def __rich__(self) -> Table:
        head, *rows = self.cells()
        problems = self.problems()
        caption = f"95 % bootstrap intervals over {len(self)} facts" if len(self) > 1 else "one fact has no interval"
        caption += f"; {len(problems)} could not be edited" if problems else ""
        table = Table(title=Text(f"{self.editor}, {_facts(len(self))}, {self.mode}"), caption=Text(caption))
        for title in head:
            table.add_column(Text(title))
        for cells in rows:
            table.add_row(*map(Text, cells))
        return table

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as printed:
            console.print(self)
        return printed.get()

    # ---- files

    def as_json(self) -> dict[str, Any]:
        """Everything, JSON-able, with the table as numbers under `summary`."""
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "mode": self.mode,
            "editor": self.editor,
            "measures": list(self.measures),
            "summary": {
                each.column.name: {
                    when: None if (found := getattr(each, when)) is None else asdict(found) for when in ("before", "after", "final")
                }
                for each in self.summary
            },
            "made_of_several": {
                name: None if found is None else asdict(found)
                for name, found in {
                    "score_before": self.score("before"),
                    "score": self.score(),
                    "score_final": self.score("final"),
                    "neighbourhood_kept": self.kept(),
                    "neighbourhood_kept_final": self.kept("final"),
                    "retained": self.retained(),
                    "neutral_per_edit": self.neutral_per_edit(),
                }.items()
            },
            "seconds_per_edit": self.seconds_per_edit(),
            "neutral": None if self.neutral is None else dict(self.neutral),
            "facts": dict(self.facts),
            "rows": [asdict(row) for row in self.rows],
        }

    def save(self, path: str | Path) -> Path:
        """Writes it as one JSON file, whole or not at all. Raises StorageFullError."""
        return atomic_write(path, json.dumps(sealed(self.as_json()), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EditEvaluation:
        """Raises FileError for nothing there, DamagedFileError, WrongKindError for another file, NonFiniteError."""
        place = place_of(path)
        content = read_json(place)
        if not isinstance(content, dict) or content.get("kind") != KIND or content.get("schema") != SCHEMA:
            raise _other_kind(place, content)
        check_seal(content, place, is_required=True)
        with damage_of(place, "an evaluation of edits, as EditEvaluation.save writes it"):
            rows = tuple(EditRow(**row) for row in content["rows"])
            return cls(content["mode"], content["editor"], tuple(content["measures"]), rows, content["neutral"], content["facts"])


def shared_table(evaluations: Sequence[EditEvaluation]) -> Table:
    """Editors side by side: a row each, with the columns that all of them have."""
    table = Table(title=Text(f"{len(evaluations[0])} facts, {evaluations[0].mode}"), caption=Text("95 % bootstrap intervals over facts"))
    head, *rows = comparison_cells(evaluations)
    for title in head:
        table.add_column(Text(title))
    for cells in rows:
        table.add_row(*map(Text, cells))
    return table


def comparison_cells(evaluations: Sequence[EditEvaluation]) -> list[list[str]]:
    """Head and rows as text: the model before, then each editor."""
    first = evaluations[0]
    shown = [each.column for each in first.summary if each.column.unit == SHARE and (each.after is not None or each.before is not None)]
    extra = ("S, %", "kept, %", *(("retained, %",) if first.mode == SEQUENCE else ()), "neutral, nat per edit", "CPU s per edit")
    head = ["editor", *(f"{column.title}, %" for column in shown), *extra]

    def cells(name: str, when: str, of: EditEvaluation) -> list[str]:
        numbers = [getattr(of[column.name], when) for column in shown]
        texts = [name, *(_written(x, 1) for x in numbers), _written(of.score(when), 1)]
        is_before = when == "before"
        texts.append("" if is_before else _written(of.kept(when), 1))
        if first.mode == SEQUENCE:
            texts.append("" if is_before else _written(of.retained(), 1))
        texts.append("" if is_before else _written(of.neutral_per_edit(), 5))
        return [*texts, "" if is_before else f"{of.seconds_per_edit():.1f}"]

    when = "final" if first.mode == SEQUENCE else "after"
    return [head, cells("none", "before", first), *(cells(each.editor, when, each) for each in evaluations)]


def _facts(count: int) -> str:
    return f"{count} fact{'s' * (count != 1)}"


def _written(estimate: Estimate | None, digits: int) -> str:
    return "" if estimate is None else estimate.written(digits)


# ---- errors


def _no_column(column: object, known: list[str]) -> ConfigError:
    remedy = did_you_mean(str(column), known) or "name one of these, or measure it"
    return ConfigError(f"'{column}' was not measured", expected=", ".join(known) or "nothing", found=repr(column), remedy=remedy)


def _other_facts(one: EditEvaluation, other: EditEvaluation) -> ConfigError:
    return ConfigError(
        "evaluations of different facts cannot be paired",
        expected=f"the same facts in the same order: {_facts(len(one))} of {one.editor}",
        found=f"{_facts(len(other))} of {other.editor}",
        remedy="evaluate both on the same records",
    )


def _other_kind(path: Path, content: Any) -> WrongKindError:
    found = content.get("kind", "no kind") if isinstance(content, dict) else type(content).__name__
    remedy = "give the path of a file that EditEvaluation.save wrote"
    return WrongKindError(f"{path} is no evaluation of edits", expected=f"{KIND}, schema {SCHEMA}", found=found, remedy=remedy)
