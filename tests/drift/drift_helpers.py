"""What the tracker's tests share: prompts, directions, batches and a training loop on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import FAMILIES
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steer.directions.direction import Direction
from steer.drift.tracker import DriftTracker
from steer.model.site import Site
from steer.model.tokens import Row

SITE = "layers.1.output"
VOCABULARY, WIDTH = 96, 32


def prompts(n: int = 10, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    return [Row(tuple(torch.randint(7, VOCABULARY, (length,), generator=generator).tolist()), length) for length in lengths]


def direction(site: str = SITE, seed: int = 0, length: float = 2.0, width: int = WIDTH) -> Direction:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Direction(Site.parse(site), length * vector / vector.norm(), "mean_difference", "response")


def batch(step: int, rows: int = 4, length: int = 8) -> dict[str, Tensor]:
    """Right-padded batch, a new one for every step; the first three tokens of each row are the prompt."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(7, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :3] = -100
    for row in range(rows):
        if row % 2:
            mask[row, length - row :] = 0
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def features() -> dict[str, Any]:
    """Features of a dictionary at SITE, for a tracker."""
    from drift.feature_helpers import CHOSEN, DENSITY, dictionary

    return {"warm": (dictionary(first=1), CHOSEN, DENSITY)}


def stream(site: str = SITE, **options: Any) -> DriftTracker:
    return DriftTracker({"rude": direction(site, width=options.pop("width", 32))}, controls=2, **options)


class Loop:
    """SGD with momentum on fixed batches; model and optimiser can be saved and restored."""

    def __init__(self, model: nn.Module, lr: float = 0.05) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
        self.step = 0

    def train(self, steps: int) -> Iterator[int]:
        """Yields the number of steps done after each."""
        for _ in range(steps):
            self.model(**batch(self.step), use_cache=False).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            yield self.step

    def state(self) -> dict[str, Any]:
        model = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        momentum = [self.optimizer.state[p]["momentum_buffer"].clone() for p in self.optimizer.param_groups[0]["params"]]
        return {"model": model, "momentum": momentum, "step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for p, buffer in zip(self.optimizer.param_groups[0]["params"], state["momentum"], strict=True):
            self.optimizer.state[p]["momentum_buffer"] = buffer.clone()
        self.step = state["step"]


def _total(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def _train(rank: int, out: Path) -> None:
    """Three steps under DDP, each rank with its own and differently long part of the batch; a checkpoint taken and reloaded on the way."""
    model = DistributedDataParallel(FAMILIES["llama"]())
    tracker = stream(probe=prompts(), store=out / "d.sqlite", features=features())
    with tracker.attached(model, reduce=_total, main=rank == 0):
        tracker.measure(0)
        for step in range(3):
            model(**{name: tensor[:1] if rank else tensor[1:] for name, tensor in batch(step).items()}).loss.backward()
            if step == 1:
                tracker.load_state_dict(tracker.state_dict(), main=rank == 0)
        torch.save([vars(record) for record in tracker.measure(3)], out / f"{rank}.pt")


def rank_main(out: Path) -> None:
    dist.init_process_group("gloo")
    _train(dist.get_rank(), out)  # the DDP module must be gone before its process group is
    dist.barrier()
    dist.destroy_process_group()
