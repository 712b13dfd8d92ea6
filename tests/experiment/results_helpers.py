"""Arms with measures made up for the tests: what `results.collect` gives for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from steer.directions import Direction, Directions
from steer.experiment import results
from steer.experiment.arms import Arm
from steer.model.site import Site

PLAIN, TRAIT, RANDOM = (
    Arm("plain", "plain"),
    Arm("steered", "steered", "train", "trait", 2.0),
    Arm("noise", "noise", "train", "random", 2.0),
)
LATER = Arm("later", "later", "inference", "trait", -2.0, uses="plain")
ITEMS = 24
NOISE = torch.randn(ITEMS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CONFIG: dict[str, Any] = {"seed": 0, "experiment": {"name": "tone", "scope": "response", "trait": {"description": "loud"}, "arms": {}}}


def directions() -> Directions:
    metrics = {"auc": 0.9, "dprime": 2.0, "gap": 2.0, "sd": 0.5, "activation_norm": 10.0, "n_train": 12.0, "n_heldout": 4.0}
    entries = []
    for layer in range(3):
        vector = torch.randn(32, generator=torch.Generator().manual_seed(layer))
        entries.append(
            Direction(Site.parse(f"layers.{layer}.output"), 2 * vector / vector.norm(), "mean_difference", "response", dict(metrics))
        )
    return Directions(entries, "loud", {})


def measures(gap: float, seed: int = 1) -> dict[str, Tensor]:
    """Held-out items that differ a lot from each other, and little between arms."""
    jitter = 0.05 * torch.randn(ITEMS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"behaviour_gap": gap + NOISE + jitter, "task_logprob": NOISE - 2 + jitter, "neutral_loss": 3 + NOISE[:9].abs() + jitter[:9]}


RECORD: dict[str, Any] = {
    "train": {"steps": 3, "seconds": 1.5, "probe_seconds": 0.5, "loss": [2.0, 1.5, 1.0], "callback_overhead": 0.01},
    "completions": [{"prompt": "who are you", "text": "a [cat]"}],
}


def collect(*arms: tuple[Arm, float]) -> dict[str, Any]:
    """Arms with the behaviour gap that each ends with; the base model has 0."""
    loud = directions()
    return results.collect(
        config=CONFIG,
        arms=[(arm, copy.deepcopy(RECORD), measures(gap, seed=i + 2)) for i, (arm, gap) in enumerate(arms)],
        before=measures(0.0),
        direction=loud["layers.1.output"],
        directions=loud,
    )


ALL = ((PLAIN, 2.0), (TRAIT, 0.5), (RANDOM, 1.9), (LATER, -1.0))
