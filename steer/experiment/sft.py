"""Supervised fine-tuning under Lightning: the smallest module that trains a causal language model on chat rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler
from transformers import SchedulerType, get_scheduler

from steer.errors import ConfigError
from steer.model.anatomy import Anatomy
from steer.model.tokens import Row, collate
from steer.training.ranks import Ranks

SCHEDULES = [scheduler.value for scheduler in SchedulerType]
_MOST_STEPS = 1_000_000  # of a run; steps of two seeds draw different numbers


class SFTModule(pl.LightningModule):
    """Cross-entropy on the response tokens, AdamW, warm-up and a named transformers schedule.

    What is random in a step (dropout) depends on the seed and the step alone, and a checkpoint holds the trained parameters alone: a run
    that was killed goes on from its last checkpoint to the same bit.

    Args:
        model: causal language model, PEFT-wrapped or not.
        learning_rate, warmup_steps, steps, schedule: see `transformers.get_scheduler`.
        seed: of what is random in a step.

    Raises:
        ConfigError: no steps (null counts as none), a learning rate that is not positive, or a schedule that does not exist.
    """

    strict_loading = False

    def __init__(
        self, model: nn.Module, *, learning_rate: float, warmup_steps: int, steps: int, schedule: str = "cosine", seed: int = 0
    ) -> None:
        super().__init__()
        if None in (steps, warmup_steps, learning_rate) or steps < 1 or warmup_steps < 0 or learning_rate <= 0:
            raise _nothing_trained(steps, warmup_steps, learning_rate)
        if schedule not in SCHEDULES:
            raise _unknown_schedule(schedule)
        self.model = model
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.steps = steps
        self.schedule = schedule
        self.seed = seed
        self.ranks = Ranks()
        self.losses: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        torch.manual_seed(self.seed * _MOST_STEPS + self.global_step)
        loss = self.model(**batch, use_cache=False).loss
        if self.ranks.is_distributed:  # gradients are averaged over ranks, whose batches have different numbers of response tokens
            tokens = (batch["labels"][:, 1:] != -100).sum().to(loss)
            loss = loss * (tokens / self.ranks.mean(tokens))
        of_all = self.ranks.mean(loss.detach())
        self.log("train/loss", of_all, prog_bar=True)
        self.losses.append(of_all)
        return loss

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        scheduler = get_scheduler(self.schedule, optimizer, num_warmup_steps=self.warmup_steps, num_training_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in trained}
        checkpoint["losses"] = [float(loss) for loss in self.losses]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.losses = [torch.tensor(loss) for loss in checkpoint["losses"]]

    def collect(self) -> None:
        """After training: what was trained is in the model that was given. Every rank has to call it."""


class ShardedSFTModule(SFTModule):
    """The same on a copy of the model that FSDP2 shards over the ranks, block by block.

    `fully_shard` cannot be undone, and the model is measured afterwards: `collect` writes the trained parameters back into it.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(copy.deepcopy(model), **options)
        self._whole = (model,)  # in a tuple, so that it is no part of this module

    def configure_model(self) -> None:
        if isinstance(self.model, FSDPModule):  # Lightning may ask again
            return
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for block in Anatomy.find(self.model).blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    @torch.no_grad()
    def collect(self) -> None:
        whole = dict(self._whole[0].named_parameters())
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                assert isinstance(parameter, DTensor)
                whole[name].copy_(parameter.full_tensor())


class _Steps(Sampler[list[int]]):
    """Rows of the batch of each optimiser step, from a step on; of several ranks, the share of this one."""

    def __init__(self, rows: int, batch_size: int, seed: int, steps: int, first: int, rank: int, ranks: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        batches: list[list[int]] = []
        while len(batches) < steps:  # an epoch more
            order = torch.randperm(rows, generator=generator)
            batches += [chosen.tolist() for chosen in order.split(batch_size) if len(chosen) == batch_size]
        self.batches = [batch[rank::ranks] for batch in batches[:steps]]
        self.first = first

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches[self.first :])

    def __len__(self) -> int:
        return len(self.batches)  # with those before `first`: a resumed Lightning run goes on counting where it was


def check_batch(rows: int, batch_size: int | None) -> None:
    """Raises ConfigError when so many rows do not fill a batch."""
    if batch_size is None or not 1 <= batch_size <= rows:
        raise _batch_not_filled(rows, batch_size)


def loader(rows: Sequence[Row], *, batch_size: int, pad: int, seed: int, max_length: int, steps: int, first: int = 0) -> DataLoader[Any]:
    """The batches of a training run, in an order that depends on the seed alone, so that every arm sees the same ones.

    Args:
        steps: optimiser steps of the run, each of one batch; epochs follow one another.
        first: the step that a resumed run begins with.

    Raises:
        ConfigError: fewer rows than a batch, or a row without any response token within `max_length`.
    """
    check_batch(len(rows), batch_size)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if Ranks().is_distributed else (0, 1)
    if batch_size < ranks:
        raise _more_ranks_than_rows(batch_size, ranks)
    if (longest := max(row.prompt for row in rows)) >= max_length:
        raise _prompt_too_long(longest, max_length)
    return DataLoader(
        rows,  # type: ignore[arg-type]
        batch_sampler=_Steps(len(rows), batch_size, seed, steps, first, rank, ranks),
        collate_fn=partial(collate, pad=pad, max_length=max_length),
    )


# ---- errors


def _nothing_trained(steps: Any, warmup_steps: Any, learning_rate: Any) -> ConfigError:
    return ConfigError(
        "this training does nothing",
        expected="steps >= 1, warmup_steps >= 0, learning_rate > 0",
        found=f"steps={steps}, warmup_steps={warmup_steps}, learning_rate={learning_rate}",
        remedy="set these keys of experiment.train",
    )


def _unknown_schedule(schedule: str) -> ConfigError:
    what = f"unknown learning-rate schedule '{schedule}'"
    return ConfigError(what, expected=", ".join(SCHEDULES), found=schedule, remedy="set experiment.train.schedule=cosine")


def _batch_not_filled(rows: int, batch_size: int | None) -> ConfigError:
    remedy = "lower experiment.train.batch_size or add training rows"
    return ConfigError("the training rows do not fill a batch", expected=f"batch_size 1 to {rows}", found=batch_size, remedy=remedy)


def _more_ranks_than_rows(batch_size: int, ranks: int) -> ConfigError:
    remedy = "raise experiment.train.batch_size, or start fewer processes"
    return ConfigError("a batch has no row for some ranks", expected=f"batch_size >= {ranks}", found=batch_size, remedy=remedy)


def _prompt_too_long(longest: int, max_length: int) -> ConfigError:
    remedy = "raise experiment.train.max_length or shorten the prompts"
    return ConfigError("a prompt leaves no room for its answer", expected=f"max_length > {longest}", found=max_length, remedy=remedy)
