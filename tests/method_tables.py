"""Tables of the tests that have a row for each method of the package, and what a contributor is told when one is missing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from steer.registry import Registry


def own_names(registry: Registry[Any]) -> set[str]:
    """Names of the methods in the package's own folder; installed packages may have added others."""
    return {name for name in registry if registry.is_own(registry.get(name))}


def check_table(registry: Registry[Any], rows: Collection[str], table: str, row: str) -> None:
    """Fails unless every method of the package has a row, and says where to add one.

    Args:
        rows: names of the methods that have one.
        table: file and name of the table.
        row: what a row is.
    """
    missing = sorted(own_names(registry) - set(rows))
    gone = sorted(set(rows) - own_names(registry))
    assert not missing, f"{registry.kind} {', '.join(missing)} has no row in {table}: add {row} (CONTRIBUTING.md, 'A new method')"
    assert not gone, f"{table} has a row for {', '.join(gone)}, which is no {registry.kind} of the package: take it out"
