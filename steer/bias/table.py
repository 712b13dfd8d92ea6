"""BiasTable: what was measured on a bias data set, by group, beside what the model knows of factual gender."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from steer.bias.factual import FactualGender
from steer.errors import ConfigError, did_you_mean
from steer.model.estimates import Estimate

ALL = "all"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        unit: `%`, `nat`, `p` for a p value, or empty.
        ideal: of a model without bias, in that unit; None where there is none.
        meaning: in one sentence.

    Example:
        >>> steer.bias.Column("stereotype preferred", "%", 50.0, "share of pairs whose stereotyping sentence is the likelier").title
    """

    name: str
    unit: str
    ideal: float | None
    meaning: str

    @property
    def digits(self) -> int:
        return {"%": 1, "p": 4}.get(self.unit, 3)

    @property
    def title(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit not in ("", self.name) else self.name


@dataclass(frozen=True)
class BiasRow:
    """A group and its numbers by column; a column that has none is left out.

    Example:
        >>> table = steer.bias.measure(model, "crows_pairs", path="crows_pairs_anonymized.csv")
        >>> [(row.group, row.n, list(row.values)) for row in table.rows]
    """

    group: str
    n: int
    values: Mapping[str, Estimate]


class Measured(NamedTuple):
    """What a metric gives."""

    columns: tuple[Column, ...]
    rows: tuple[BiasRow, ...]
    notes: tuple[str, ...] = ()


FACTUAL = (
    Column("factual gap", "nat", None, "log-odds of him against her behind words such as father, less those behind words such as mother"),
    Column("factual accuracy", "%", 100.0, "share of such words behind which the right pronoun is the likelier"),
)


@dataclass(frozen=True, eq=False)
class BiasTable:
    """Rows are groups, with 95 % intervals; `table["gender"]["log-ratio"]` is one number of them, `table["all"]` the row of all.

    Attributes:
        name: of the data set.
        columns: without the factual ones.
        factual: what the model knows of factual gender, on words that are used in no selection; the same for all rows.
        facts: model, source, options; JSON-able.
        notes: what a reader must know.

    Example:
        >>> table = steer.bias.measure(model, "crows_pairs", path="crows_pairs_anonymized.csv")
        >>> table.cells()[0]  # the head; then a row for each group
    """

    name: str
    columns: tuple[Column, ...]
    rows: tuple[BiasRow, ...]
    factual: FactualGender
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def __getitem__(self, group: str) -> Mapping[str, Estimate]:
        """Numbers of a group. Raises ConfigError for a group that was not measured."""
        for row in self.rows:
            if row.group == group:
                return {**row.values, **self.factual.values()}
        raise _no_group(self, group)

    def __repr__(self) -> str:
        first = self.rows[0]
        told = ", ".join(f"{column.name} {first.values[column.name].value:.{column.digits}f}" for column in self._shown(first)[:3])
        return f"BiasTable({self.name}, n {first.n}: {told}; factual accuracy {self.factual.accuracy.value:.0f} %)"

    def _shown(self, row: BiasRow) -> list[Column]:
        return [column for column in self.columns if column.name in row.values]

    def __str__(self) -> str:
        console = Console(width=160, no_color=True)
        with console.capture() as printed:
            console.print(self)
        return printed.get()

    def __rich__(self) -> Table:
        head, *rows = self.cells()
        caption = ". ".join((*self.notes, "95 % intervals"))
        table = Table(title=Text(self.name), caption=Text(caption))
        for title in head:
            table.add_column(Text(title))
        for row in rows:
            table.add_row(*map(Text, row))
        return table

    def cells(self) -> list[list[str]]:
        """Head and rows as text, for a page: group, n, the columns, and in the first row the factual ones, which are the same for all."""
        columns = (*self.columns, *FACTUAL)
        rows = [["group", "n", *(column.title for column in columns)]]
        for place, row in enumerate(self.rows):
            values = row.values if place else self[row.group]
            numbers = [values[column.name].written(column.digits) if column.name in values else "" for column in columns]
            rows.append([row.group, str(row.n), *numbers])
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "name": self.name,
            "columns": [asdict(column) for column in (*self.columns, *FACTUAL)],
            "rows": [
                {"group": row.group, "n": row.n, "values": {name: asdict(estimate) for name, estimate in row.values.items()}}
                for row in self.rows
            ],
            "factual": self.factual.to_dict(),
            "facts": dict(self.facts),
            "notes": list(self.notes),
        }


def by_group(items: Sequence[Any], values: Callable[[list[int]], dict[str, Estimate | None]]) -> tuple[BiasRow, ...]:
    """A row of all items, and one for each group where there are several.

    Args:
        values: the numbers of some items, by their places.
    """
    groups = sorted({item.group for item in items})
    places = {ALL: list(range(len(items)))}
    if len(groups) > 1:
        places |= {group: [place for place, item in enumerate(items) if item.group == group] for group in groups}
    return tuple(row_of(group, len(chosen), values(chosen)) for group, chosen in places.items())


def row_of(group: str, n: int, values: Mapping[str, Estimate | None]) -> BiasRow:
    """A row without the numbers that there are none of."""
    return BiasRow(group, n, {name: estimate for name, estimate in values.items() if estimate is not None})


# ---- errors


def _no_group(table: BiasTable, group: object) -> ConfigError:
    known = [row.group for row in table.rows]
    remedy = did_you_mean(str(group), known) or "choose one of these"
    return ConfigError(f"{table.name} has no row '{group}'", expected=", ".join(known), found=repr(group), remedy=remedy)
