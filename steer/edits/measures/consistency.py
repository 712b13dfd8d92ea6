"""Consistency: is what the model writes about the subject like texts about its new object?

RS of ROME (Meng et al. 2022, arXiv 2202.05262).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from steer.edits.measure import EDIT_MEASURES, GENERATION, Column, EditMeasure, Readings, Wanted
from steer.edits.measures.fluency import generation_prompts
from steer.edits.record import FactRecord
from steer.errors import ConfigError


def tf_idf_cosine(written: Sequence[str], references: Sequence[str]) -> float:
    """Cosine of the TF-IDF vectors of joined texts; documents, whose frequencies count, are the references and what is written.

    Raises:
        ConfigError: scikit-learn is missing.
    """
    try:
        text = importlib.import_module("sklearn.feature_extraction.text")
    except ImportError as error:
        raise _no_sklearn() from error
    joined = " ".join(written)
    vectoriser = text.TfidfVectorizer().fit([*references, joined])
    vectors = vectoriser.transform([joined, " ".join(references)])  # rows of length 1
    return float(vectors[0].multiply(vectors[1]).sum())


@EDIT_MEASURES.register("consistency")
class Consistency(EditMeasure):
    """Cosine of the TF-IDF vectors of what is written and of texts about the new object (RS); not available without such texts."""

    needs = GENERATION
    columns = (Column("consistency", "RS", "", "higher", "TF-IDF cosine of what is written and of texts about the new object"),)

    def wanted(self, record: FactRecord) -> Wanted:
        return Wanted(sampled=generation_prompts(record)) if record.reference_texts else Wanted()

    def values(self, record: FactRecord, seen: Readings, before: Readings | None) -> dict[str, float]:
        if not record.reference_texts:
            return {}
        written = [f"{prompt}{seen.sampled[prompt]}" for prompt in generation_prompts(record)]
        return {"consistency": tf_idf_cosine(written, record.reference_texts)}


# ---- errors


def _no_sklearn() -> ConfigError:
    return ConfigError(
        "consistency needs the package scikit-learn",
        expected="scikit-learn, of the extra `edits`",
        found="no such package",
        remedy="pip install 'torchsteer[edits]', or leave consistency out",
    )
