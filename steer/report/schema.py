"""Which metrics a report can show: schema 2 (docs/metrics.md), and schema 1, which is read as schema 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer.errors import WrongKindError
from steer.report.schema1 import renewed

SCHEMA = 2


def read(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of a metrics.json as schema 2. Raises WrongKindError for metrics of another schema."""
    schema = metrics.get("schema")
    if schema == 1:
        return renewed(metrics)
    if schema != SCHEMA:
        raise _other_schema(schema)
    return metrics


def _other_schema(schema: Any) -> WrongKindError:
    remedy = "read it with the library version that wrote it"
    return WrongKindError("these metrics cannot be reported", expected=f"schema 1 or {SCHEMA}", found=f"schema {schema}", remedy=remedy)
