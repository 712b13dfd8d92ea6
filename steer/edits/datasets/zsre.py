"""zsRE (Levy et al. 2017) as MEND edits it (Mitchell et al. 2022, arXiv 2110.11309): questions with another answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer.data_files import fields
from steer.edits.fact import Fact
from steer.edits.record import FactRecord, Probe, name_in, probes_in, texts_in
from steer.edits.record_format import RECORD_FORMATS, RecordFormat


@RECORD_FORMATS.register("zsre")
class ZsRE(RecordFormat):
    """zsRE of MEND: `src` is answered by `alt` after the edit, `rephrase` too, and `loc`, an unrelated question, as before."""

    keys = ("src", "alt", "subject", "answers")

    def record(self, row: Mapping[str, Any], source: str, place: str) -> FactRecord:
        question, subject, answers = fields(row, {"src": str, "subject": str, "answers": list}, source, place)
        true = next((answer for answer in answers if isinstance(answer, str) and answer.strip()), None)
        locality = probes_in(row, "locality", source, place)
        if row.get("loc") and row.get("loc_ans"):
            locality = (Probe(*fields(row, {"loc": str, "loc_ans": str}, source, place)), *locality)
        return FactRecord(
            Fact.of(question, subject, row["alt"], true, name_in(row, "case_id")),
            paraphrases=texts_in(row, "rephrase", source, place),
            portability=probes_in(row, "portability", source, place),
            locality=locality,
        )
