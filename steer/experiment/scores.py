"""Scores of an experiment: a value for each outcome, arm, control draw, seed and item, in one tidy table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.files import atomic_write

COLUMNS = ("outcome", "arm", "draw", "seed", "item", "value")


class Place(NamedTuple):
    """What a set of values belongs to. draw: number of a control's random draw, 0 for an arm that is no control."""

    outcome: str
    arm: str
    draw: int
    seed: int


@dataclass(frozen=True)
class Matrix:
    """Values of one outcome of one arm. values: [items, seeds] fp64; items: their ids; seeds."""

    values: Tensor
    items: tuple[str, ...]
    seeds: tuple[int, ...]


class Scores:
    """All values of an experiment.

    Example:
        >>> scores.matrix("gap", "warm").values.shape
        torch.Size([36, 5])
    """

    def __init__(self) -> None:
        self._values: dict[Place, dict[str, float]] = {}

    def add(self, place: Place, values: Mapping[str, float]) -> None:
        """Raises ConfigError when a place has values already, or when its items are not those of the other arms."""
        if place in self._values:
            raise _twice(place)
        values = {str(item): float(value) for item, value in values.items()}
        other = next((taken for taken in self._values if taken.outcome == place.outcome), None)
        if other is not None and set(self._values[other]) != set(values):
            raise _other_items(place, values, other, self._values[other])
        self._values[place] = values

    def __iter__(self) -> Iterator[Place]:
        return iter(self._values)

    def __getitem__(self, place: Place) -> dict[str, float]:
        return self._values[place]

    def __len__(self) -> int:
        return sum(map(len, self._values.values()))

    def __repr__(self) -> str:
        return f"Scores({len(self)} values of {', '.join(self.outcomes)} in {', '.join(self.arms)})"

    @property
    def outcomes(self) -> list[str]:
        return list(dict.fromkeys(place.outcome for place in self._values))

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(place.arm for place in self._values))

    def draws(self, arm: str) -> list[int]:
        """Numbers of the draws of a control arm that have values; [0] for an arm that is none."""
        return sorted({place.draw for place in self._values if place.arm == arm})

    def seeds(self, arm: str) -> list[int]:
        return sorted({place.seed for place in self._values if place.arm == arm})

    def matrix(self, outcome: str, arm: str, draw: int | None = None) -> Matrix:
        """The values of an arm; those of a control are averaged over its draws unless one is named.

        Raises:
            ConfigError: there are none, or a seed or a draw is missing that another one has.
        """
        draws = self.draws(arm) if draw is None else [draw]
        chosen = [place for place in self._values if place.outcome == outcome and place.arm == arm and place.draw in draws]
        if not chosen:
            raise _no_values(outcome, arm, self)
        seeds = sorted({place.seed for place in chosen})
        items = tuple(self._values[chosen[0]])
        columns = []
        for seed in seeds:
            of_draws = [self._values.get(Place(outcome, arm, number, seed)) for number in draws]
            if missing := [number for number, of_draw in zip(draws, of_draws, strict=True) if of_draw is None]:
                raise _missing_draw(outcome, arm, seed, draws, missing)
            values = [[of_draw[item] for item in items] for of_draw in of_draws if of_draw is not None]
            columns.append(torch.tensor(values, dtype=torch.float64).mean(0))
        return Matrix(torch.stack(columns, dim=1), items, tuple(seeds))

    def difference(self, outcome: str, arm: str, reference: str, draw: int | None = None) -> Matrix:
        """Arm minus reference, item by item and seed by seed. draw: of the reference.

        A reference that has one seed where the arm has several (a model that is not trained) stands for each of them.

        Raises:
            ConfigError: as `matrix`, and seeds that only one of them has.
        """
        first, second = self.matrix(outcome, arm), self.matrix(outcome, reference, draw)
        order = [second.items.index(item) for item in first.items]
        of_reference = second.values[order]
        if first.seeds != second.seeds:
            if len(second.seeds) > 1:
                raise _other_seeds(arm, first.seeds, reference, second.seeds)
            of_reference = of_reference.expand(-1, len(first.seeds))
        return Matrix(first.values - of_reference, first.items, first.seeds)

    # ---- files

    def rows(self) -> Iterator[dict[str, Any]]:
        """The tidy table, a row for each value."""
        for place, values in self._values.items():
            for item, value in values.items():
                yield {**place._asdict(), "item": item, "value": value}

    def save(self, path: str | Path) -> Path:
        """Writes a tidy table: `scores.parquet`, or `.csv` where pyarrow is not installed or the name says so. Returns its path."""
        path = Path(path)
        if path.suffix == ".parquet":
            try:
                import pyarrow
                import pyarrow.parquet as parquet
            except ImportError:
                path = path.with_suffix(".csv")
            else:
                rows = list(self.rows())
                sink = io.BytesIO()
                parquet.write_table(pyarrow.table({column: [row[column] for row in rows] for column in COLUMNS}), sink)
                atomic_write(path, sink.getvalue())
                return path
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(self.rows())
        atomic_write(path, text.getvalue())
        return path


# ---- errors


def _twice(place: Place) -> ConfigError:
    what = f"arm '{place.arm}' was measured twice"
    return ConfigError(what, expected="one set of values", found=str(place), remedy="give each arm, draw and seed values once")


def _other_items(place: Place, values: Mapping[str, float], other: Place, known: Mapping[str, float]) -> ConfigError:
    missing = sorted(set(known) - set(values))
    more = sorted(set(values) - set(known))
    return ConfigError(
        f"'{place.outcome}' of arm '{place.arm}' is of other items than that of '{other.arm}'",
        expected=f"the same {len(known)} items",
        found=f"{len(missing)} missing ({', '.join(missing[:3])}), {len(more)} more ({', '.join(more[:3])})",
        remedy="measure every arm on the same items",
    )


def _no_values(outcome: str, arm: str, scores: Scores) -> ConfigError:
    expected = f"one of the arms {', '.join(scores.arms)} and outcomes {', '.join(scores.outcomes)}"
    what = f"'{outcome}' of arm '{arm}' was not measured"
    return ConfigError(what, expected=expected, found=f"{arm}, {outcome}", remedy="correct the names, or measure it")


def _missing_draw(outcome: str, arm: str, seed: int, draws: list[int], missing: list[int]) -> ConfigError:
    return ConfigError(
        f"'{outcome}' of arm '{arm}' lacks draws of seed {seed}",
        expected=f"the draws {', '.join(map(str, draws))}",
        found=f"without {', '.join(map(str, missing))}",
        remedy="run the cells that are missing",
    )


def _other_seeds(arm: str, seeds: tuple[int, ...], reference: str, others: tuple[int, ...]) -> ConfigError:
    return ConfigError(
        f"arms '{arm}' and '{reference}' were not run with the same seeds",
        expected=f"{', '.join(map(str, seeds))}, as '{arm}'",
        found=", ".join(map(str, others)),
        remedy="run the cells that are missing",
    )
