"""Other training rows as a treatment: rows left out, or rows mixed in."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from steer.checks import of_type
from steer.errors import ConfigError
from steer.experiment.treatment import TRAIN, TREATMENTS, Bench, Treatment


@TREATMENTS.register("data")
class TrainingData(Treatment):
    """Rows are left out of the training set, or others are mixed into it. (For rows behind a message, see the treatment `prompt`.)

    Controls: as many random rows are left out. Rows that are mixed in have no control; write one as an arm with other rows.

    Args:
        without: values by key; a row that has one of them is left out, e.g. `{"style": "gushing"}`.
        more: rows to mix in, with the keys of the others.

    Raises:
        ConfigError: neither is given; or, when the rows are there, none of them has such a value.
    """

    when = (TRAIN,)
    unit = "rows"

    def __init__(self, without: Mapping[str, Any] | None = None, more: Sequence[Mapping[str, Any]] = ()) -> None:
        of_type(without, (Mapping, type(None)), "`without` of training data", "pass {key: value}")
        if not without and not more:
            raise _changes_nothing()
        self.without = dict(without or {})
        self.more = [dict(row) for row in more]

    def describe(self) -> str:
        left_out = [f"without rows with {key}={value}" for key, value in self.without.items()]
        return " and ".join([*left_out, *([f"with {len(self.more)} rows more"] if self.more else [])])

    def spec(self) -> dict[str, Any]:
        return {"without": self.without, "more": self.more}

    def training_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        kept = [row for row in rows if not self._is_left_out(row)]
        if self.without and len(kept) == len(rows):
            raise _no_such_rows(self.without, rows)
        return [*kept, *self.more]

    def _is_left_out(self, row: Mapping[str, Any]) -> bool:
        return any(key in row and row[key] == value for key, value in self.without.items())

    def control(self, bench: Bench, seed: int) -> Treatment:
        if self.more:
            return super().control(bench, seed)
        return _RandomRows(self, seed)


class _RandomRows(TrainingData):
    """As many rows as another treatment leaves out, chosen at random. It is not registered: only `control` makes it."""

    name = TrainingData.name

    def __init__(self, like: TrainingData, seed: int) -> None:
        super().__init__(like.without)
        self.like = like
        self.seed = seed

    def describe(self) -> str:
        return f"without as many random rows as there are with {', '.join(f'{key}={value}' for key, value in self.without.items())}"

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "random": self.seed}

    def training_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        kept = len(self.like.training_rows(rows))
        chosen = sorted(random.Random(self.seed).sample(range(len(rows)), kept))
        return [rows[i] for i in chosen]


# ---- errors


def _changes_nothing() -> ConfigError:
    remedy = "pass without={key: value}, more=[rows], or both"
    return ConfigError(
        "this treatment of the training data does nothing", expected="rows to leave out or to add", found="none", remedy=remedy
    )


def _no_such_rows(without: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> ConfigError:
    keys = sorted({key for row in rows for key in row})
    return ConfigError(
        "no training row is left out",
        expected=f"rows with {', '.join(f'{key}={value}' for key, value in without.items())}",
        found=f"none of {len(rows)} rows, which have the keys {', '.join(keys)}",
        remedy="correct `without`",
    )
