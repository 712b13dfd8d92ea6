"""Running text that ships with the library, of which covariances of keys are taken where a caller has none of his own."""

from __future__ import annotations

from importlib.resources import files

from steer.reading import parse_json

_SPLITS = ("learning", "train", "constants")


def shipped_texts() -> list[str]:
    """Some hundred ordinary texts, together some twenty thousand tokens: answers of a small model, and the prompts before them."""
    folder = files("steer") / "experiment" / "data" / "gender_pronoun"
    lines = [line for split in _SPLITS for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [parse_json(line, "running text") for line in lines]
    return [row.get("text") or f"{row['prompt']} {row['answer']}" for row in rows]
