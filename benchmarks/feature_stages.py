"""Which features of a dictionary move in a short fine-tune of the embedded model: a stage comparison, and its check by chance.

    OMP_NUM_THREADS=1 python benchmarks/feature_stages.py --dictionary <folder> --train play.txt --texts wiki.txt [--out <folder>]

LoRA adapters are trained on one text file; features are compared on pieces of another, with the adapters off and on, and on pieces of the
first file that were not trained on. The check exchanges the two stages in a random half of the pieces, so that neither is above the other:
what is listed then, chance lists. Tokens beside a feature are those whose logits its decoder row raises most.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import steer
from steer.drift import StageComparison, compare_text_means, text_means
from steer.drift.stage_tests import sign_flips_of_features
from steer.drift.stages import TextMeans
from steer.model.tokens import Row
from steer.report import stage_figure


def pieces(tokenizer: Any, path: Path, length: int, count: int, seed: int) -> list[Row]:
    """Pieces of a file, in random order."""
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    starts = torch.randperm(len(ids) // length, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return [Row(tuple(ids[length * i : length * (i + 1)]), length) for i in starts]


def train(model: Any, rows: list[Row], batch: int, lr: float) -> list[float]:
    """One pass over the rows. Returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for start in range(0, len(rows) - batch + 1, batch):
        ids = torch.tensor([row.ids for row in rows[start : start + batch]])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def by_chance(a: TextMeans, b: TextMeans, trials: int) -> list[int]:
    """Number of features that are listed when the stages are exchanged in a random half of the texts."""
    every = torch.arange(len(a.counts))
    width = a.dictionary.width
    listed = []
    for trial in range(trials):
        signs = (torch.randint(0, 2, (len(every), 1), generator=torch.Generator().manual_seed(100 + trial)) * 2 - 1).double()

        def differences(features: slice, signs: torch.Tensor = signs) -> tuple[torch.Tensor, torch.Tensor]:
            change = b.columns(features, every) - a.columns(features, every)
            return change * signs, (change != 0).any(0)

        tests = sign_flips_of_features(differences, width, len(every), alpha=0.05, draws=999, seed=trial)
        listed.append(int((tests.p_adjusted <= 0.05).sum()))
    return listed


def described(comparison: StageComparison, tokenizer: Any, unembedding: torch.Tensor, most: int) -> list[dict[str, Any]]:
    rows = comparison.table(most)
    decoder = comparison.dictionary.decoder_rows([int(row["feature"]) for row in rows])
    top = (decoder @ unembedding.float().mT).topk(5).indices
    return [{**row, "tokens": [tokenizer.decode(i) for i in of_row.tolist()]} for row, of_row in zip(rows, top, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionary", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("outputs/feature_stages"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = steer.load("smollm2-135m")
    dictionary = steer.load_dictionary(options.dictionary)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]))
    of_training = pieces(tokenizer, options.train, options.length, options.steps * options.batch + options.count, seed=0)
    unseen = of_training[options.steps * options.batch :]
    texts = {"other text": pieces(tokenizer, options.texts, options.length, options.count, seed=1), "text of the training": unseen}
    started = time.process_time()
    before = {name: text_means(dictionary, model.eval(), rows) for name, rows in texts.items()}
    reading = time.process_time() - started
    losses = train(model, of_training[: options.steps * options.batch], options.batch, options.lr)
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "settings": {k: Path(v).name if k in ("dictionary", "train", "texts") else str(v) for k, v in vars(options).items()},
        "dictionary": str(dictionary),
        "loss": losses,
    }
    for name, rows in texts.items():
        after = text_means(dictionary, model, rows)
        started = time.process_time()
        comparison = compare_text_means(before[name], after)
        testing = time.process_time() - started
        print(f"{name}: {comparison.summary()}", flush=True)
        result[name] = {
            "summary": comparison.summary(),
            "moved": len(comparison.moved),
            "tested": comparison.tested,
            "uncorrected": comparison.uncorrected,
            "by chance": comparison.by_chance,
            "fvu": [float(quality.fvu) for quality in (comparison.quality_a, comparison.quality_b)],
            "l0": [float(quality.l0) for quality in (comparison.quality_a, comparison.quality_b)],
            "listed after random exchange": by_chance(before[name], after, options.trials),
            "CPU seconds": {"reading one stage": reading / len(texts), "testing": testing},
            "most": described(comparison, tokenizer, model.get_output_embeddings().weight.detach(), 20),
        }
        stage_figure(comparison, options.out / f"{name.replace(' ', '_')}.svg")
        (options.out / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        for row in result[name]["most"][:10]:
            print(row["feature"], f"{row['mean_a']:.3f} -> {row['mean_b']:.3f}, effect {row['effect']:+.2f}", row["tokens"], flush=True)
        print("after random exchange:", result[name]["listed after random exchange"], flush=True)


if __name__ == "__main__":
    main()
