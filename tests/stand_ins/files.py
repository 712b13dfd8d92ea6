"""Files that an example reads, by the name that it gives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bias.bias_helpers import write_crows


def write_crows_pairs(path: Path) -> None:
    pairs = [
        ("the nurse said her name", "the nurse said his name", "stereo", "gender"),
        ("she is small", "he is small", "antistereo", "gender"),
    ]
    write_crows(path, pairs)


def write_winogender(path: Path) -> None:
    sentences = [f"nurse.someone.1.{gender}.txt\tthe nurse said that {who} is good" for gender, who in (("male", "he"), ("female", "she"))]
    path.write_text("\n".join(["sentid\tsentence", *sentences]), encoding="utf-8")


def write_counterfact(path: Path) -> None:
    from edits.test_records import FULL

    path.write_text(json.dumps([FULL]), encoding="utf-8")


FILES: dict[str, Callable[[Path], None]] = {
    "counterfact.json": write_counterfact,
    "crows_pairs_anonymized.csv": write_crows_pairs,
    "all_sentences.tsv": write_winogender,
}
