"""Training of a dictionary beside sae-lens on the same activations: error, features on, dead features and tokens per CPU second.

    OMP_NUM_THREADS=1 python benchmarks/dictionary_quality.py --texts FILE --environments DIR [--steps 250] [--out FILE]

`DIR/saelens` is an environment with sae-lens, which runs in a process of its own (`dictionary_peers/saelens_train.py`) at each of
`--rates`. Both get the same activations of the embedded model, outliers left out and scaled to the mean length sqrt(width), in the same
batches in the same order, and are measured on the same held-out tokens in the form in which they are used afterwards, sae-lens's file as
`steer.load_dictionary` reads it. Seconds are those of the processor, of the training alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from dictionary_training import SITE, train_step
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

import steer
from steer.features import Dictionary
from steer.features.training import Calibration, DictionaryConfig, Learner, Optimisation, read_texts, token_rows
from steer.features.training.finished import dictionary_of
from steer.features.training.passes import Passes
from steer.model.load import load

PEER = Path(__file__).resolve().parent / "dictionary_peers" / "saelens_train.py"
BATCH, HELD_OUT = 2048, 20_000


def activations(texts: str, tokens: int) -> Tensor:
    """[tokens, width] of the embedded model, scaled; the first token of a row and outliers left out."""
    model, tokenizer = load("smollm2-135m", dtype=torch.bfloat16)
    rows = token_rows(tokenizer, read_texts(texts), context=128, max_tokens=tokens)
    passes = Passes(model, rows, [SITE], first=1, per_pass=16, dtype=torch.float32, cache=None)
    h = torch.cat([passes.run(number)[SITE] for number in range(len(passes))])
    h = h[h.norm(dim=1) < 5 * h.norm(dim=1).median()]
    return h * (h.shape[1] ** 0.5 / h.norm(dim=1).mean())


def steer_arm(h: Tensor, order: Tensor, options: argparse.Namespace, lr: float) -> tuple[Dictionary, float]:
    """The dictionary, and the CPU seconds of its training."""
    calibration = Calibration.of({SITE: h[:30_000]}, outlier=10.0)
    optimisation = Optimisation(len(order), lr=lr)
    learner = Learner(DictionaryConfig([SITE], width=options.features, k=options.k), calibration, optimisation)
    optimizer = torch.optim.Adam(learner.parameters(), lr=lr, fused=True)
    began = time.process_time()
    for number, places in enumerate(order):
        optimizer.param_groups[0]["lr"] = lr * optimisation.rate(number)
        learner.start_step(number)
        train_step(learner, optimizer, h[places], number)
    return dictionary_of(learner), time.process_time() - began


@torch.no_grad()
def measured(dictionary: Dictionary, h: Tensor, k: int) -> dict[str, float]:
    """Of held-out tokens [tokens, width]: share of the variance that is not explained, features on, features that are never on.

    The first one again with the threshold at which k features are on at a token, since both sides estimate theirs as they train.
    """
    f = dictionary.encode(h)
    pre = dictionary.pre_activations(h)
    threshold = pre.flatten().kthvalue(pre.numel() - k * len(h)).values
    variance = (h - h.mean(0)).square().sum()
    return {
        "FVU": float((dictionary.decode(f) - h).square().sum() / variance),
        "L0": float((f > 0).sum(1).float().mean()),
        "silent": float((f > 0).sum(0).eq(0).float().mean()),
        f"FVU at L0 {k}": float((dictionary.decode(pre * (pre > threshold)) - h).square().sum() / variance),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", required=True)
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--out", type=Path)
    for name, value in (("steps", 250), ("features", 4096), ("k", 32), ("distinct", 400_000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    h = activations(options.texts, options.distinct)
    train, held_out = h[:-HELD_OUT], h[-HELD_OUT:]
    random = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randint(len(train), (BATCH,), generator=random) for _ in range(options.steps)])
    arms: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "activations.safetensors"
        save_file({"train": train, "order": order}, file)
        for lr in options.rates:
            dictionary, seconds = steer_arm(train, order, options, lr)
            arms[f"steer, lr {lr:g}"] = {"tokens per CPU second": order.numel() / seconds, **measured(dictionary, held_out, options.k)}
            saved = Path(folder) / f"saelens_{lr}"
            command = [
                options.environments / "saelens" / "bin" / "python",
                PEER,
                file,
                options.steps,
                options.features,
                options.k,
                lr,
                saved,
            ]
            said = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            told: dict[str, Any] = json.loads(said)
            peer = steer.load_dictionary(saved, reads=str(SITE))
            arms[f"sae-lens, lr {lr:g}"] = {
                "tokens per CPU second": told["tokens"] / told["seconds"],
                **measured(peer, held_out, options.k),
            }
    table = Table("arm", *next(iter(arms.values())))
    for name, figures in arms.items():
        table.add_row(name, *(f"{value:.4g}" for value in figures.values()))
    Console().print(table)
    if options.out:
        setting = {key: str(value) for key, value in vars(options).items() if key not in ("out", "texts", "environments")}
        options.out.write_text(json.dumps({"setting": {**setting, "torch": torch.__version__}, "arms": arms}, indent=2) + "\n")


if __name__ == "__main__":
    main()
