"""Free generation: does the model say the new object when it writes on by itself?"""

from __future__ import annotations

from steer.edits.measure import EDIT_MEASURES, GENERATION, SHARE, Column, EditMeasure, Readings, Wanted, mean
from steer.edits.record import FactRecord
from steer.model.words import holds


@EDIT_MEASURES.register("free_generation")
class FreeGeneration(EditMeasure):
    """The new object said in a greedy continuation of the prompt, and of paraphrases; far rarer than being preferred (2502.11177)."""

    needs = GENERATION
    columns = (
        Column("generated", "said", SHARE, "higher", "share of edits whose new object a greedy continuation of the prompt says"),
        Column("generated_paraphrase", "said, paraphrase", SHARE, "higher", "the same behind paraphrases"),
    )

    def wanted(self, record: FactRecord) -> Wanted:
        return Wanted(greedy=(record.fact.prompt, *record.paraphrases))

    def values(self, record: FactRecord, seen: Readings, before: Readings | None) -> dict[str, float]:
        found = {"generated": float(holds(seen.greedy[record.fact.prompt], record.fact.target))}
        if record.paraphrases:
            found["generated_paraphrase"] = mean([holds(seen.greedy[prompt], record.fact.target) for prompt in record.paraphrases])
        return found
