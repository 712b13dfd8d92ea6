"""Facts of one's own, in the words of `Fact` and `FactRecord`. The format is ours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from steer.data_files import fields
from steer.edits.fact import Fact
from steer.edits.record import FactRecord, name_in, probes_in, texts_in
from steer.edits.record_format import RECORD_FORMATS, RecordFormat
from steer.errors import did_you_mean

_PROBES = ("portability", "locality")
_FIELDS = ("prompt", "subject", "target", "true", "name", "paraphrases", "neighbours", *_PROBES,
           *(f"{probe}_{part}" for probe in _PROBES for part in ("prompt", "ground_truth")))  # fmt: skip


@RECORD_FORMATS.register("facts")
class Facts(RecordFormat):
    """Facts of your own: `prompt` (or a template with {}), `subject`, `target`; `true`, `paraphrases`, `neighbours` where there are any."""

    keys = ("prompt", "subject", "target")

    def read(self, rows: Sequence[Mapping[str, Any]], source: str) -> list[FactRecord]:
        if unread := {str(key): None for row in rows for key in row if key not in _FIELDS}:
            hints = [f"'{key}'{f' ({hint})' if (hint := did_you_mean(key, _FIELDS)) else ''}" for key in unread]
            warnings.warn(f"fields of {source} that nothing reads: {', '.join(hints[:5])}", stacklevel=3)
        return super().read(rows, source)

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
