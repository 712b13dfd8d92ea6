"""Synthetic activations whose true dictionary is known, and a training loop without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.features.training import Calibration, DictionaryConfig, Learner, Optimisation
from steer.features.training.learner import Layer, Processes
from steer.model.site import Site

SITE = Site.parse("layers.1.output")
WIDTH, FEATURES, ON = 24, 32, 2


class Planted:
    """Sums of a few rows of a known dictionary, with noise. rows: [FEATURES, WIDTH] of length 1."""

    def __init__(self, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        rows = torch.randn(FEATURES, WIDTH, generator=self.random)
        self.rows = rows / rows.norm(dim=1, keepdim=True)

    def batch(self, tokens: int = 256) -> dict[Site, Tensor]:
        on = torch.rand(tokens, FEATURES, generator=self.random) < ON / FEATURES
        f = on * (1 + torch.rand(tokens, FEATURES, generator=self.random))
        return {SITE: f @ self.rows + 0.01 * torch.randn(tokens, WIDTH, generator=self.random)}

    def calibration(self) -> Calibration:
        return Calibration.of(self.batch(2048), outlier=10.0)


def learner(planted: Planted, steps: int, sparsifier: str = "batchtopk", width: int = FEATURES, **options: object) -> Learner:
    config = DictionaryConfig([SITE], width=width, k=ON, sparsifier=sparsifier)
    settings = {"lr": 3e-3, "dead_after": 5000, "lr_warmup": 20, "sparsity_warmup": 50, **options}
    return Learner(config, planted.calibration(), Optimisation(steps, **settings))  # type: ignore[arg-type]


def trained(learner: Learner, planted: Planted, steps: int) -> list[float]:
    """Trains by hand, as the module does. Returns the share of the variance that was not explained at each step."""
    optimisation = learner.optimisation
    optimizer = torch.optim.Adam(learner.parameters(), lr=optimisation.lr, fused=True)
    fvu = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = optimisation.lr * optimisation.rate(step)
        optimizer.zero_grad()
        learner.start_step(step)
        loss, sums = learner(planted.batch(), step, Processes())
        loss.backward()
        layers = [layer for layer in learner.layers if isinstance(layer, Layer)]
        for layer in layers:
            layer.project_gradient()
        optimizer.step()
        for layer in layers:
            layer.restore_norms()
        variance = sums["squares"] - sums["sum"].square().sum() / sums["tokens"]
        fvu.append(float(sums["squared_error"] / variance))
    return fvu
