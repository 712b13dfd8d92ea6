"""Run by test_ranks.py on two gloo ranks: the callbacks under DDP, FSDP2 and a distributed Hugging Face Trainer.

Each scenario leaves what it saw in <folder>/<scenario>.pt, written by rank 0.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from callback_helpers import Module, examples, make_plan, make_tracker, make_trainer, strength_now
from families import FAMILIES
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer, TrainingArguments

from steer.callbacks import DriftCallback, HFDriftCallback, HFSteeringCallback, SteeringCallback
from steer.intervene import Linear, Plan

torch.set_num_threads(1)


class Plain(Module):
    """Plain gradient descent, which does not blow up differences of rounding."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Sharded(Plain):
    """Creates and shards its model in configure_model, as FSDP2 requires."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = FAMILIES["llama"]()
            for block in self.model.model.layers:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole tensors; every rank must ask."""
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in model.named_parameters()}


def learning_plan() -> Plan:
    """A plan whose vector is learned, and begins elsewhere on every rank but the first, whose values are those that count."""
    plan = make_plan()
    plan.interventions[0].operator.train()
    if int(os.environ.get("RANK", 0)):
        plan.parameters()[0].data += 1.0
    return plan


def gathered(value: Any) -> list[Any]:
    """Collects a value from every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def lightning(module: Module, store: Path, *, batch_size: int, save: Path | None = None, **options: Any) -> dict[str, Any]:
    """One run of Lightning, single or distributed; what it did."""
    resume = options.pop("resume", None)
    plan, tracker = learning_plan(), make_tracker(store)
    steering = SteeringCallback(plan, schedule=Linear(8), every_n_steps=1, learning_rate=5.0)
    drift = DriftCallback(tracker, every_n_steps=3)
    seen: dict[str, Any] = {"strengths": []}

    class Spy(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen["strengths"].append(strength_now(steering))

        def on_train_end(self, *_: Any) -> None:
            seen["writes"] = tracker._writer is not None

    callbacks: list[pl.Callback] = [steering, drift, Spy()]
    if save is not None:
        callbacks.append(pl.callbacks.ModelCheckpoint(save.parent, filename=save.stem, enable_version_counter=False))
    batches = DataLoader(examples(), batch_size=batch_size)  # type: ignore[arg-type]
    if "strategy" in options:  # Lightning's own sampler would shuffle
        mine = DistributedSampler(examples(), num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)  # type: ignore[arg-type]
        batches = DataLoader(examples(), batch_size=batch_size, sampler=mine)  # type: ignore[arg-type]
    trainer = make_trainer(*callbacks, use_distributed_sampler=False, **options)
    trainer.fit(module, batches, ckpt_path=resume)
    return {
        "weights": weights(module.model) | {"vector": plan.parameters()[0].detach().clone()},
        "vectors": gathered(plan.parameters()[0].detach().clone()),
        "metrics": gathered({name: float(value) for name, value in trainer.callback_metrics.items()}),
        "states": gathered({**steering.state_dict(), **drift.state_dict()}),
        "local tokens": gathered(sum(steering.attachment.fired().values())),
        "seen": gathered(seen),
    }


def hugging_face(out: Path, store: Path, *, batch_size: int, epochs: int = 1, resume: bool = False) -> dict[str, Any]:
    """One run of transformers' Trainer, single or distributed."""
    plan, tracker = learning_plan(), make_tracker(store)
    trainer = Trainer(
        model=FAMILIES["llama"](),
        args=TrainingArguments(
            output_dir=str(out),
            per_device_train_batch_size=batch_size,
            num_train_epochs=epochs,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            optim="sgd",
            logging_steps=1,
            save_strategy="epoch",
            report_to=[],
            use_cpu=True,
            ddp_backend="gloo" if dist.is_initialized() else None,
            disable_tqdm=True,
            seed=1,
        ),
        train_dataset=examples(),  # type: ignore[arg-type]
    )
    steering = HFSteeringCallback(plan, schedule=Linear(8), every_n_steps=1, learning_rate=5.0).attach(trainer)
    drift = HFDriftCallback(tracker, every_n_steps=3).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": weights(trainer.model) | {"vector": plan.parameters()[0].detach().clone()},
        "vectors": gathered(plan.parameters()[0].detach().clone()),
        "metrics": gathered(trainer.state.log_history[-2]),
        "states": gathered({**steering.state_dict(), **drift.state_dict()}),
        "local tokens": gathered(sum(steering.attachment.fired().values())),
    }


def main(folder: Path) -> None:
    """Every scenario, in one process per rank."""

    def keep(name: str, result: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{name}.pt")
        dist.barrier()

    def ddp(name: str, store: str, **options: Any) -> None:
        strategy = DDPStrategy(process_group_backend="gloo")
        keep(name, lightning(Plain(), folder / store, batch_size=2, devices=2, strategy=strategy, **options))

    ddp("ddp", "ddp.sqlite", save=folder / "ddp.ckpt")
    ddp("ddp-resumed", "ddp.sqlite", max_epochs=2, resume=folder / "ddp.ckpt")
    ddp("ddp-whole", "whole.sqlite", max_epochs=2)

    def fsdp(name: str, store: str, **options: Any) -> None:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        keep(name, lightning(Sharded(), folder / store, batch_size=2, devices=2, strategy=strategy, **options))

    fsdp("fsdp2", "fsdp2.sqlite", save=folder / "fsdp2.ckpt")
    fsdp("fsdp2-resumed", "fsdp2.sqlite", max_epochs=2, resume=folder / "fsdp2.ckpt")

    keep("hf", hugging_face(folder / "hf", folder / "hf.sqlite", batch_size=2))
    keep("hf-resumed", hugging_face(folder / "hf", folder / "hf.sqlite", batch_size=2, epochs=2, resume=True))
