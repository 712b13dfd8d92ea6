"""Forms of data sets of edits, one file each in `steer.edits.datasets`, told apart by the keys of their records."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from steer.edits.record import FactRecord
from steer.errors import EditError
from steer.registry import Registry


class RecordFormat(ABC):
    """One form; a subclass says by which keys it is known, and makes a record of a row.

    Attributes:
        name: under which it is registered.
        keys: that every row of this form has.
        hub: (name, configuration, split) on the hub, by which `name` alone can be loaded; None where it is on none.

    Example:
        >>> counterfact = RECORD_FORMATS.get("counterfact")
        >>> counterfact.keys, counterfact.hub
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    hub: ClassVar[tuple[str, str | None, str] | None] = None

    @classmethod
    def fits(cls, row: Mapping[str, Any]) -> bool:
        """A row has what this form has."""
        return all(key in row for key in cls.keys)

    @abstractmethod
    def record(self, row: Mapping[str, Any], source: str, place: str) -> FactRecord:
        """The record of a row. Raises DamagedFileError, and EditError for one that is no fact, see `Fact`."""

    def joined(self, records: list[FactRecord]) -> list[FactRecord]:
        """What records lend one another, where a form keeps one prompt of each kind; all records of a source at once."""
        return records

    def read(self, rows: Sequence[Mapping[str, Any]], source: str) -> list[FactRecord]:
        """A record for each row that is a fact; a warning says how many are none. Raises DamagedFileError."""
        records = []
        for number, row in enumerate(rows, 1):
            with suppress(EditError):
                records.append(self.record(row, source, f"record {number}"))
        if 0 < len(records) < len(rows):  # without any there is an error
            left_out = len(rows) - len(records)
            why = "the prompt does not name the subject, or there is no target"
            warnings.warn(f"{left_out} of {len(rows)} records of {source} are left out: {why}", stacklevel=3)
        return self.joined(records)


RECORD_FORMATS: Registry[type[RecordFormat]] = Registry(
    "edit data set", "steer.edits.datasets", "steer.edit_data_sets", subclass_of=RecordFormat
)


def format_of(rows: Sequence[Mapping[str, Any]]) -> type[RecordFormat] | None:
    """The form of rows: of those whose keys the first row has, the one with most keys; None for rows of no known form."""
    fitting = [found for found in map(RECORD_FORMATS.get, RECORD_FORMATS) if found.fits(rows[0])]
    return max(fitting, key=lambda found: len(found.keys), default=None)
