"""CounterFact (Meng et al. 2022, arXiv 2202.05262): counterfactual edits with paraphrases, neighbours and prompts to write from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer.data_files import fields
from steer.edits.fact import Fact
from steer.edits.record import FactRecord, name_in, probes_in, texts_in
from steer.edits.record_format import RECORD_FORMATS, RecordFormat

REWRITE = {"prompt": str, "subject": str, "target_new": dict, "target_true": dict}


@RECORD_FORMATS.register("counterfact")
class CounterFact(RecordFormat):
    """CounterFact as it was released: a template, two paraphrases, ten neighbours and ten prompts to write from."""

    keys = ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")
    hub = ("azhx/counterfact", None, "train")

    def record(self, row: Mapping[str, Any], source: str, place: str) -> FactRecord:
        (rewrite,) = fields(row, {"requested_rewrite": dict}, source, place)
        prompt, subject, new, true = fields(rewrite, REWRITE, source, place)
        (target,), (truth,) = fields(new, {"str": str}, source, place), fields(true, {"str": str}, source, place)
        return FactRecord(
            Fact.of(prompt, subject, target, truth, name_in(row, "case_id")),
            paraphrases=texts_in(row, "paraphrase_prompts", source, place),
            neighbours=texts_in(row, "neighborhood_prompts", source, place),
            generation_prompts=texts_in(row, "generation_prompts", source, place),
            portability=probes_in(row, "portability", source, place),
            locality=probes_in(row, "locality", source, place),
            relation=str(rewrite.get("relation_id") or ""),
            target_id=str(new.get("id") or ""),
            true_id=str(true.get("id") or ""),
        )
