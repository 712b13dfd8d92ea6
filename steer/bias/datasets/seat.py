"""SEAT (1903.10561) and WEAT (1608.07187): association tests between sets of targets and of attributes, as sentences or words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer.bias.dataset import DATASETS, BiasDataset
from steer.bias.items import AssociationTest
from steer.bias.metrics.association import association
from steer.data_files import fields, json_content
from steer.reading import damaged

SETS = ("targ1", "targ2", "attr1", "attr2")


@DATASETS.register("seat")
class Seat(BiasDataset):
    """SEAT and WEAT: effect size of the association of embeddings at a site, with its permutation p."""

    files = ("*.jsonl", "*.json")
    metric = association

    def read(self, paths: Sequence[Path]) -> list[AssociationTest]:
        return [_test(path) for path in paths]


def _test(path: Path) -> AssociationTest:
    content = json_content(path)
    sets = fields(content, dict.fromkeys(SETS, dict), path, "the top")
    names, texts = [], []
    for key, one_set in zip(SETS, sets, strict=True):
        kinds: dict[str, Any] = {"category": str, "examples": list}
        name, examples = fields(one_set, kinds, path, key)
        if len(examples) < 2 or not all(isinstance(text, str) and text.strip() for text in examples):
            raise damaged(path, "two or more texts in every set", f"{len(examples)} in {key}: {examples!r:.60}")
        names.append(name)
        texts.append(tuple(examples))
    return AssociationTest(path.stem, path.stem, (texts[0], texts[1]), (texts[2], texts[3]), (names[0], names[1], names[2], names[3]))
