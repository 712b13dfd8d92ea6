"""Prompts, targets and constants for circuits of components of tiny models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from families import FAMILIES
from hand import ids
from torch import Tensor, nn

from steer.circuits import Ablation, LogitDifference, Pairs, mean_ablation, resample_ablation, zero_ablation
from steer.circuits.component_run import ComponentRun
from steer.circuits.texts import Texts
from steer.model.tokens import Row

TARGET = LogitDifference(5, 9)
LENGTHS = (6, 6, 4)
DECODERS = ("llama", "gemma2", "gpt_neox", "gpt2", "falcon", "olmo2", "qwen3", "mixtral")
RESAMPLE = "resample"


def rows(*lengths: int, seed: int = 0) -> list[Row]:
    return [Row(tuple(ids(1, length, seed + number)[0].tolist()), 0) for number, length in enumerate(lengths)]


def exact_model(family: str) -> nn.Module:
    """In fp64 where the model can, though some norms compute in fp32 whatever it does."""
    model = FAMILIES[family]()
    return model if family == "mixtral" else model.double()


def pairs(model: nn.Module, lengths: Sequence[int] = LENGTHS) -> Pairs:
    return Pairs.of(model, rows(*lengths), rows(*lengths, seed=50))


def ablation_of(model: nn.Module, kind: str) -> Ablation:
    if kind == "zero":
        return zero_ablation()
    return resample_ablation() if kind == RESAMPLE else mean_ablation(model, rows(5, 8, 7, seed=90))


def run_of(model: nn.Module, kind: str = "mean", lengths: Sequence[int] = LENGTHS, side: str = "right") -> ComponentRun:
    both = pairs(model, lengths)
    if side == "left":
        both = Pairs(Texts(both.clean.rows, side=side), Texts(both.corrupted.rows, side=side))
    return ComponentRun(model, both, TARGET, ablation_of(model, kind))


def cut(run: ComponentRun, *names: str) -> Tensor:
    """[writers, readers] of edges by name; `a0.h1->` for all edges out of a writer."""
    edges = torch.zeros_like(run.graph.possible)
    for name in names:
        writer, _, reader = name.partition("->")
        place = run.graph.writer_place(writer)
        if reader:
            edges[place, run.graph.reader_place(reader)] = True
        else:
            edges[place] = run.graph.possible[place]
    return edges
