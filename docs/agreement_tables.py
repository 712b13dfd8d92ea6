"""The table of docs/results/agreement.md, made from what benchmarks/agreement.py measured last."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from agreement import HEAD, Row, cells  # noqa: E402

Markdown = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def read() -> dict[str, Any]:
    return json.loads(max((BENCHMARKS / "results").glob("*_cpu_agreement.json")).read_text(encoding="utf-8"))


def setting(_: Markdown) -> str:
    """When and on what it was measured."""
    record = read()
    torch, transformers = (record["versions"][name] for name in ("torch", "transformers"))
    return f"Measured on {record['date']} on a CPU, torch {torch}, transformers {transformers} where a program allows it."


def programs(markdown: Markdown) -> str:
    """Every comparison, and below it the programs that were not tried."""
    record = read()
    table = markdown(HEAD, [cells(row, record["programs"][row.program]) for row in (Row(**row) for row in record["rows"])])
    return "\n".join([table, *(f"\n{program} was not tried: {why}." for program, why in record["absent"].items())])
