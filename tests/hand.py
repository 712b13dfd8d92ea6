"""Batches of every kind and handwritten hooks, for tests to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from families import FAMILIES
from torch import Tensor, nn

from steer.intervene import Intervention, Plan
from steer.intervene.active import ActiveIntervention
from steer.intervene.attachment import Attachment
from steer.intervene.scope_mask import ScopeMask
from steer.model import hooks
from steer.model.accumulator import TextAccumulator, pool
from steer.model.anatomy import resolve
from steer.model.site import Site

LENGTHS = (7, 4, 6)


def ids(batch: int = 2, tokens: int = 7, seed: int = 0) -> Tensor:
    """[batch, tokens] without special tokens."""
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded(side: str = "right", lengths: tuple[int, ...] = LENGTHS, prompt: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (-100 on padding and on the first `prompt` tokens of each row)."""
    width = max(lengths)
    batch = {"input_ids": torch.zeros(len(lengths), width, dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    for row, length in enumerate(lengths):
        start = 0 if side == "right" else width - length
        text = ids(1, length, seed + row)[0]
        batch["input_ids"][row, start : start + length] = text
        batch["attention_mask"][row, start : start + length] = 1
        batch["labels"][row, start + prompt : start + length] = text[prompt:]
    return batch


def packed(lengths: tuple[int, ...] = (4, 3, 5), prompt: int = 1) -> dict[str, Tensor]:
    """One row of several texts one after the other: input_ids, position_ids (restarting), labels."""
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    input_ids = ids(1, sum(lengths))
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": torch.where(position_ids < prompt, -100, input_ids)}


def vector(width: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def attachment_of(plan: Plan) -> Attachment:
    """The plan on a new tiny llama (3 blocks of width 32), for what an attachment does without any forward pass."""
    return plan.attach(FAMILIES["llama"]())


def active(intervention: Intervention) -> ActiveIntervention:
    """The intervention as an attachment on the CPU has it, for calls without a model."""
    mask = ScopeMask(intervention.scope)
    return ActiveIntervention(intervention, mask, torch.device("cpu"), 0, phases=intervention.phases, schedule=intervention.schedule)


@contextmanager
def edited(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Applies a function to what a module returns."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recorded(model: nn.Module, sites: list[str]) -> Iterator[dict[str, Tensor]]:
    """The activations of sites in the latest pass, by their names."""
    seen: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[[Tensor, Any], None]:
        def read(h: Tensor, _: Any) -> None:
            seen[name] = h.detach().clone()

        return read

    anatomy, points = resolve(model, [Site.parse(site) for site in sites])
    installation = hooks.Installation(model, anatomy, [(point, reader(site)) for point, site in zip(points, sites, strict=True)])
    try:
        installation.install()
        yield seen
    finally:
        installation.remove()


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Means(TextAccumulator):
    """Mean over the span of each text, [width], by its number."""

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}

    def reduce(self, h: Tensor, weight: Tensor) -> Tensor:
        return pool(h, weight)

    def add(self, values: Tensor, rows: Tensor) -> None:
        self.values |= dict(zip(rows.tolist(), values, strict=True))
