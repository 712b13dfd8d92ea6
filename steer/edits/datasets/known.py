"""known_1000 of ROME (Meng et al. 2022): facts that GPT-2 XL knows, on which causal tracing is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer.data_files import fields
from steer.edits.fact import Fact
from steer.edits.record import FactRecord, name_in
from steer.edits.record_format import RECORD_FORMATS, RecordFormat


@RECORD_FORMATS.register("known")
class Known(RecordFormat):
    """known_1000: facts to be traced; `attribute` is both what is true and the target, so that an edit writes what is true."""

    keys = ("prompt", "subject", "attribute")

    def record(self, row: Mapping[str, Any], source: str, place: str) -> FactRecord:
        prompt, subject, attribute = fields(row, {"prompt": str, "subject": str, "attribute": str}, source, place)
        return FactRecord(Fact.of(prompt, subject, attribute, attribute, name_in(row, "known_id")))
