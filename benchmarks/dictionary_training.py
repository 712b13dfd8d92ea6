"""Speed of a training step of a dictionary: steer's sparse step beside the dense step in plain torch, tokens per CPU second.

    OMP_NUM_THREADS=1 python benchmarks/dictionary_training.py [--rounds 5] [--tokens 2048] [--features 4096] [--width 576] [--k 32]

The arms take turns, so that whatever else the machine does falls on all of them; `steer again` is steer's step a second time: what
separates it from `steer` is noise. Time is that of the processor, not of the clock. Both compute BatchTopK with fused Adam, unit decoder
rows and the projected gradient, on the same activations. The dense step chooses its features by one top-k over the batch and multiplies
whole matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from steer.features.training import Calibration, DictionaryConfig, Learner, Optimisation
from steer.features.training.learner import Layer, Processes
from steer.model.site import Site

SITE = Site.parse("layers.12.output")


def activations(tokens: int, width: int, seed: int = 0) -> Tensor:
    """[tokens, width] sums of 20 of 2,000 directions."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(2000, width, generator=random)
    places = torch.randint(2000, (tokens, 20), generator=random)
    return torch.nn.functional.embedding_bag(places, rows, mode="sum") + 0.1 * torch.randn(tokens, width, generator=random)


def train_step(learner: Learner, optimizer: torch.optim.Optimizer, h: Tensor, number: int) -> dict[str, Tensor]:
    """A step as `DictionaryModule` makes it. h: [tokens, width] at SITE."""
    layers = [layer for layer in learner.layers if isinstance(layer, Layer)]
    optimizer.zero_grad()
    loss, sums = learner({SITE: h}, number, Processes())
    loss.backward()
    for layer in layers:
        layer.project_gradient()
    optimizer.step()
    for layer in layers:
        layer.restore_norms()
    return sums


def sparse_step(h: Tensor, options: argparse.Namespace) -> Callable[[], float]:
    calibration = Calibration.of({SITE: h}, outlier=10.0)
    learner = Learner(DictionaryConfig([SITE], width=options.features, k=options.k), calibration, Optimisation(10**6, sparsity_warmup=0))
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3, fused=True)
    number = 0

    def step() -> float:
        nonlocal number
        sums = train_step(learner, optimizer, h, number)
        number += 1
        return float(sums["squared_error"] / (sums["squares"] - sums["sum"].square().sum() / sums["tokens"]))

    return step


def dense_step(h: Tensor, options: argparse.Namespace) -> Callable[[], float]:
    x = h * (h.shape[1] ** 0.5 / h.norm(dim=1).mean())
    random = torch.Generator().manual_seed(1)  # that of `activations` would begin with their true dictionary
    rows = torch.nn.functional.normalize(torch.randn(options.features, h.shape[1], generator=random), dim=1)
    encoder, decoder = torch.nn.Parameter(rows.clone()), torch.nn.Parameter(rows.clone())
    encoder_bias, decoder_bias = torch.nn.Parameter(torch.zeros(options.features)), torch.nn.Parameter(x.mean(0))
    optimizer = torch.optim.Adam([encoder, decoder, encoder_bias, decoder_bias], lr=1e-3, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        pre = torch.nn.functional.linear(x - decoder_bias, encoder, encoder_bias).relu().flatten()
        values, places = pre.topk(options.k * len(x), sorted=False)
        f = torch.zeros_like(pre).scatter(0, places, values).view(len(x), -1)  # [tokens, features]
        error = f @ decoder + decoder_bias - x
        (error.square().sum() / len(x)).backward()
        with torch.no_grad():
            assert decoder.grad is not None
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
            optimizer.step()
            decoder.div_(decoder.norm(dim=1, keepdim=True))
            return float(error.square().sum() / (x - x.mean(0)).square().sum())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rounds", 5), ("tokens", 2048), ("features", 4096), ("width", 576), ("k", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    h = activations(options.tokens, options.width)
    arms = {"steer": sparse_step(h, options), "dense torch": dense_step(h, options), "steer again": sparse_step(h, options)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    fvu: dict[str, float] = {}
    for round_number in range(options.rounds + 1):  # the first one warms up
        for name, step in arms.items():
            start = time.process_time()
            fvu[name] = step()
            if round_number:
                seconds[name].append(time.process_time() - start)
    speed = {name: options.tokens / statistics.median(taken) for name, taken in seconds.items()}
    result = {
        "setting": {**vars(options), "torch": torch.__version__, "load": os.getloadavg()},
        "tokens per CPU second": {name: round(value) for name, value in speed.items()},
        "range of seconds": {name: [round(min(taken), 4), round(max(taken), 4)] for name, taken in seconds.items()},
        "steer / dense torch": round(speed["steer"] / speed["dense torch"], 2),
        "steer again / steer": round(speed["steer again"] / speed["steer"], 2),
        "FVU of the last step": {name: round(value, 4) for name, value in fvu.items()},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
