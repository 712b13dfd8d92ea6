"""What the callbacks' tests share: a LightningModule on a tiny Llama, its data, plans, trackers and trainers without noise."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from drift.drift_helpers import direction, prompts
from families import FAMILIES, VOCAB, WIDTH
from torch import Tensor, nn
from torch.utils.data import DataLoader

from steer.drift import DriftTracker
from steer.intervene import Add, Intervention, Plan

for noisy in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

SITE = "layers.1.output"
TRAIT = f"drift/trait/{SITE}"
ROWS, TOKENS, PROMPT = 16, 8, 3


def examples(rows: int = ROWS) -> list[dict[str, Tensor]]:
    """Rows of 8 tokens, the first 3 of them prompt: 5 response tokens each."""
    ids = torch.randint(7, VOCAB, (rows, TOKENS), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": torch.where(torch.arange(TOKENS) < PROMPT, -100, row)} for row in ids]


def loader(rows: int = ROWS, batch_size: int = 2) -> DataLoader[Any]:
    return DataLoader(examples(rows), batch_size=batch_size)  # type: ignore[arg-type]


def vector(seed: int = 3, length: float = 2.0) -> Tensor:
    v = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return length * v / v.norm()


def make_plan(site: str = SITE, **options: Any) -> Plan:
    return Plan(Intervention(Add(vector()), site, **{"scope": "response", **options}))


def learner(site: str = SITE, **options: Any) -> Plan:
    """A vector that is learned, from zero on."""
    return Plan(Intervention(Add(torch.zeros(WIDTH)).train(), site, **{"scope": "response", **options}))


def only(plan: Plan) -> Tensor:
    (parameter,) = plan.parameters()
    return parameter.detach().clone()


def make_tracker(store: Path | None = None, **options: Any) -> DriftTracker:
    return DriftTracker({"trait": direction(SITE)}, **{"probe": prompts(6), "controls": 4, "store": store, **options})


class Module(pl.LightningModule):
    """Adam on a tiny Llama. Notes the loss of every batch."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = FAMILIES["llama"]() if model is None else model
        self.losses: list[float] = []
        self.val_losses: list[float] = []

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch, use_cache=False).loss

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        loss = self.loss(batch)
        self.val_losses.append(loss.item())
        self.log("val", loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class OwnLoss(Module):
    """Computes its loss itself: the model is called without labels."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def make_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "max_epochs": -1 if "max_steps" in options else 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks),
            "num_sanity_val_steps": 0,
            "callbacks": list(callbacks),
            **options,
        }
    )


def strength_now(steering: Any) -> float:
    """The strength that is in force in a steering callback's only intervention."""
    (value,) = (value for name, value in steering._run.metrics().items() if name.endswith("/strength"))
    return value


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
