"""Facts of one's own, in the words of `Fact` and `FactRecord`. The format is ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer.data_files import fields
from steer.edits.fact import Fact
from steer.edits.record import FactRecord, name_in, probes_in, texts_in
from steer.edits.record_format import RECORD_FORMATS, RecordFormat


@RECORD_FORMATS.register("facts")
class Facts(RecordFormat):
    """Facts of your own: `prompt` (or a template with {}), `subject`, `target`; `true`, `paraphrases`, `neighbours` where there are any."""

    keys = ("prompt", "subject", "target")

    def record(self, row: Mapping[str, Any], source: str, place: str) -> FactRecord:
        prompt, subject, target = fields(row, {"prompt": str, "subject": str, "target": str}, source, place)
        (true,) = fields(row, {"true": str}, source, place) if row.get("true") is not None else (None,)
        return FactRecord(
            Fact.of(prompt, subject, target, true, name_in(row, "name")),
            paraphrases=texts_in(row, "paraphrases", source, place),
            neighbours=texts_in(row, "neighbours", source, place),
            portability=probes_in(row, "portability", source, place),
            locality=probes_in(row, "locality", source, place),
        )
