"""Fluency: does the model still write, or repeat itself? (Zhang et al. 2018; GE of ROME)"""

from __future__ import annotations

import math
import re
from collections import Counter

from steer.edits.measure import EDIT_MEASURES, GENERATION, Column, EditMeasure, Readings, Wanted, mean
from steer.edits.record import FactRecord

_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of the entropies of 2-grams and 3-grams
HUNDRED = 100  # tables show entropies times that


def n_gram_entropy(text: str) -> float:
    """(2/3 H2 + 4/3 H3) / 2 with H_n = -sum f log2 f over the n-grams of words and signs; 0 for a text without any."""
    words = _WORD.findall(text)
    total = 0.0
    for n, weight in WEIGHTS.items():
        counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
        number = sum(counts.values())
        total += weight * -sum(count / number * math.log2(count / number) for count in counts.values())
    return total / len(WEIGHTS)


def generation_prompts(record: FactRecord) -> tuple[str, ...]:
    """That a model writes on from: those of the data set, else the edit's own and its paraphrases."""
    return tuple(dict.fromkeys(record.generation_prompts or (record.fact.prompt, *record.paraphrases)))


@EDIT_MEASURES.register("fluency")
class Fluency(EditMeasure):
    """Entropy of the 2-grams and 3-grams of words in what is written, times 100 (GE): a model that repeats itself has little."""

    needs = GENERATION
    columns = (Column("fluency", "GE", "", None, "weighted entropy of the 2-grams and 3-grams of words in texts of 100 tokens, times 100"),)

    def wanted(self, record: FactRecord) -> Wanted:
        return Wanted(sampled=generation_prompts(record))

    def values(self, record: FactRecord, seen: Readings, before: Readings | None) -> dict[str, float]:
        return {"fluency": HUNDRED * mean([n_gram_entropy(f"{prompt}{seen.sampled[prompt]}") for prompt in generation_prompts(record)])}
