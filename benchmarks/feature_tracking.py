"""What tracking features costs beside plain training steps: 100 features of one site, in stream mode, with as many random ones.

    OMP_NUM_THREADS=1 python benchmarks/feature_tracking.py [--rounds 12] [--steps 2] [--features 100] [--model smollm2-135m]

The arms take turns, so that whatever else the machine does falls on all of them; `plain again` is the plain step a second time: what
separates it from `plain` is noise. Time is that of the processor, not of the clock. A step is forward, backward and the optimiser of LoRA
adapters; `features` also has the first pass of a window, in which the whole dictionary is read, `directions` 16 directions and 16 random
ones. The dictionary is a random one of 4,096 features with one threshold, which costs what a trained BatchTopK costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import steer
from steer.drift import DriftTracker, TrackedFeatures
from steer.features import Encoder, InMemory, Origin, Untrained
from steer.features.activations.jumprelu import JumpReLU
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.model.site import Site

SITE = "layers.12.output"


def dictionary(width: int, features: int) -> SparseAutoencoder:
    random = torch.Generator().manual_seed(0)
    rows = nn.functional.normalize(torch.randn(features, width, generator=random), dim=1)
    encoder = Encoder(InMemory(rows.clone()), torch.zeros(features), JumpReLU(torch.tensor([2.0])))
    return SparseAutoencoder(encoder, InMemory(rows), torch.zeros(width), Origin((SITE,), (SITE,), untrained=Untrained(first=1)))


def trackers(width: int, options: argparse.Namespace) -> dict[str, DriftTracker | None]:
    own = dictionary(width, options.dictionary)
    chosen = list(range(0, options.dictionary, options.dictionary // options.features))[: options.features]
    tracked = TrackedFeatures(own, chosen, torch.full((own.width,), 0.01))
    random = torch.randn(16, width, generator=torch.Generator().manual_seed(1))
    named = {f"d{i}": steer.Direction(Site.parse(SITE), v, "mean_difference", "response") for i, v in enumerate(random)}
    return {
        "plain": None,
        "plain again": None,
        "features": DriftTracker(features={"sae": tracked}, stream=True),
        "directions": DriftTracker(named, stream=True),
    }


def steps(model: nn.Module, batch: dict[str, Tensor], count: int) -> Callable[[], float]:
    """Processor seconds of a number of training steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def run() -> float:
        start = time.process_time()
        for _ in range(count):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - start

    return run


def alone(width: int, options: argparse.Namespace) -> dict[str, float]:
    """Median processor seconds of reading the features of one batch, and of reading the whole dictionary, once in a window."""
    tracker = trackers(width, options)["features"]
    assert tracker is not None
    (reader,) = tracker.features.readers
    assert reader.quality is not None
    h = torch.randn(options.rows, options.tokens, width, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(h.shape[:2], dtype=torch.bool)
    seconds: dict[str, list[float]] = {"features": [], "dictionary": []}
    for _ in range(21):
        for name in seconds:
            start = time.process_time()
            with torch.no_grad():
                reader.window.update(reader.group.encode(h), mask) if name == "features" else reader.quality.update(h[mask])
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--features", type=int, default=100)
    parser.add_argument("--dictionary", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, _ = steer.load(options.model)
    width = model.config.hidden_size
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])).train()
    ids = torch.randint(10, 1000, (options.rows, options.tokens), generator=torch.Generator().manual_seed(0))
    run = steps(model, {"input_ids": ids, "labels": ids}, options.steps)
    run()  # caches and allocators
    seconds: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for name, tracker in trackers(width, options).items():
            with nullcontext() if tracker is None else tracker.attached(model):
                seconds.setdefault(name, []).append(run() / options.steps)
        print(number, {name: round(values[-1], 3) for name, values in seconds.items()}, flush=True)
    result: dict[str, Any] = {"settings": vars(options) | {"torch": torch.__version__}, "seconds per step": {}, "over plain, %": {}}
    result["seconds, alone"] = alone(width, options)
    for name, values in seconds.items():
        result["seconds per step"][name] = statistics.median(values)
        over = sorted(100 * (value / plain - 1) for value, plain in zip(values, seconds["plain"], strict=True))
        quarter = len(over) // 4
        result["over plain, %"][name] = {"median": statistics.median(over), "quartiles": [over[quarter], over[-1 - quarter]]}
    print(json.dumps(result, indent=2))
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
