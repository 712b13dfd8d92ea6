"""ActivationData: activations of a model in random order, as a Lightning data module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from steer.checks import finite_number, of_type, one_of, whole_number
from steer.errors import ConfigError
from steer.features.training.dictionary_config import generator
from steer.features.training.held_out import HeldOutPass
from steer.features.training.passes import Activations, Passes, joined
from steer.features.training.texts import TokenRows
from steer.model.site import Site

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Calibration:
    """Lengths and means of the activations at each site, of tokens that are no outliers.

    Attributes:
        scale: what activations are multiplied with to have the mean length sqrt(width).
        mean: [width] of the activations. max_norm: length above which a token is an outlier.
        first: tokens at the start of each row that are left out.

    Example:
        >>> site = steer.Site.parse("layers.12.output")
        >>> calibration = steer.features.training.Calibration.of({site: torch.randn(1000, 36)}, outlier=5.0)
        >>> calibration.scale[site], calibration.mean[site].shape
    """

    scale: dict[Site, float]
    mean: dict[Site, Tensor]
    max_norm: dict[Site, float]
    first: int = 0

    @classmethod
    def of(cls, activations: Activations, *, outlier: float, first: int = 0) -> Calibration:
        """Of [tokens, width] at each site; a token is an outlier where it is longer than `outlier` times the median. Raises ConfigError."""
        scale, mean, longest = {}, {}, {}
        for site, h in activations.items():
            lengths = h.float().norm(dim=-1)
            longest[site] = outlier * float(lengths.median())
            kept = h.float()[lengths <= longest[site]]
            if longest[site] == 0:
                raise _all_zero(site)
            scale[site] = h.shape[-1] ** 0.5 / float(kept.norm(dim=-1).mean())
            mean[site] = kept.mean(0)
        return cls(scale, mean, longest, first)


class ActivationData(pl.LightningDataModule):
    """Streams the activations of texts in batches of random tokens, at any number of sites, from one pass of the model.

    The buffer holds the tokens of a few passes, in random order, until all of them were given; then it is filled anew. Which token comes
    when depends on the seed and its place in the stream alone, so that a run that resumes rebuilds the buffer it was in. Of several
    processes each runs its share of the passes and gives the tokens of its own: together they are the batches of one.

    Args:
        model: anything `Plan.attach` takes.
        rows: see `token_rows`.
        sites: that are read.
        batch: tokens of a step, over all processes.
        buffer: tokens in random order at a time, over all processes.
        first: tokens at the start of each row that are left out.
        outlier: tokens longer than so many times the median are left out; None for none.
        tokens_per_pass: of the model.
        held_out: rows that are kept for measuring.
        dtype: in which activations wait: `float32`, `bfloat16` or `float16`.
        cache: folder for the activations of each pass, for several epochs or runs; None for none.
        seed: of the order.

    Raises:
        ConfigError: sizes that do not fit. SiteError: a site that the model does not have.

    Example:
        >>> from steer.features.training import ActivationData, token_rows
        >>> tokens = token_rows(tokenizer, texts * 9, context=16)
        >>> data = ActivationData(model, tokens, ["layers.12.output"], batch=64, buffer=256, held_out=2)
        >>> calibration = data.calibrate(tokens=256)
        >>> next(iter(data.batches()))  # by site, [tokens, width]
    """

    def __init__(
        self,
        model: nn.Module,
        rows: TokenRows,
        sites: Sequence[Site | str],
        *,
        batch: int = 2048,
        buffer: int = 65_536,
        first: int = 1,
        outlier: float | None = 5.0,
        tokens_per_pass: int = 2048,
        held_out: int = 16,
        dtype: str = "float32",
        cache: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        of_type(rows, TokenRows, "the rows of activation data", "make them with token_rows(tokenizer, texts)")
        for value, name, least in ((batch, "batch", 1), (buffer, "buffer", 1), (first, "first", 0), (held_out, "held_out", 1)):
            whole_number(value, f"`{name}` of activation data", least=least)
        whole_number(tokens_per_pass, "`tokens_per_pass` of activation data", least=1)
        if outlier is not None:
            finite_number(outlier, "`outlier` of activation data", above=1)
        if first > rows.context - 2:
            raise _nothing_left(first, rows.context)
        if len(rows) <= held_out:
            raise _too_few_rows(len(rows), held_out)
        self.model, self.seed, self.batch = model, seed, batch
        self.outlier = math.inf if outlier is None else outlier
        options: dict[str, Any] = {"first": first, "per_pass": max(1, tokens_per_pass // rows.context)}
        options |= {
            "dtype": DTYPES[one_of(dtype, list(DTYPES), "`dtype` of activation data")],
            "cache": None if cache is None else Path(cache),
        }
        listed = [Site.parse(site) for site in dict.fromkeys(sites)]
        self.passes = Passes(model, TokenRows(rows.ids[held_out:]), listed, **options)
        self.held_out = Passes(model, TokenRows(rows.ids[:held_out]), listed, **{**options, "cache": None})
        self.per_fill = max(math.ceil(buffer / self.passes.tokens), math.ceil(batch / self.passes.tokens))
        self.batches_per_fill = self.per_fill * self.passes.tokens // batch
        self.fingerprint = rows.fingerprint()
        self._calibration: Calibration | None = None

    def calibrate(self, tokens: int = 16_384) -> Calibration:
        """Lengths and means from the first passes, the same in every process."""
        if self._calibration is None:
            count = min(len(self.passes), math.ceil(tokens / self.passes.tokens))
            self._calibration = Calibration.of(joined(map(self.passes.run, range(count))), outlier=self.outlier, first=self.passes.first)
        return self._calibration

    def described(self) -> dict[str, Any]:
        """What the activations and their order depend on, JSON-able."""
        facts = {"batch": self.batch, "fill": self.per_fill, "per_pass": self.passes.per_pass, "context": self.passes.rows.context}
        more = {"first": self.passes.first, "dtype": str(self.passes.dtype), "seed": self.seed, "rows": self.fingerprint}
        more |= {"held_out": len(self.held_out.rows), "outlier": None if self.outlier == math.inf else self.outlier}
        return {**facts, **more, "sites": [str(site) for site in self.passes.sites], "weights": self.passes.weights}

    def batches(self, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[Activations]:
        """The share of one process in the batches of a run, from a step on, without end."""
        step = start
        while True:
            fill = _Fill(self, step // self.batches_per_fill, rank, ranks)
            for place in range(step % self.batches_per_fill, self.batches_per_fill):
                yield fill.batch(place)
                step += 1

    def pass_at(self, place: int) -> int:
        """Which pass stands at a place of the endless stream; every epoch has an order of its own."""
        epoch, number = divmod(place, len(self.passes))
        return int(torch.randperm(len(self.passes), generator=generator(self.seed, "epoch", epoch))[number])

    # ---- Lightning

    def train_dataloader(self) -> DataLoader[Activations]:
        trainer = self.trainer
        if trainer is None:
            return DataLoader(_Stream(self, 0, 0, 1), batch_size=None)
        if trainer.accumulate_grad_batches != 1:
            raise _accumulates(trainer.accumulate_grad_batches)
        return DataLoader(_Stream(self, trainer.global_step, trainer.global_rank, trainer.world_size), batch_size=None)

    def val_dataloader(self) -> DataLoader[HeldOutPass]:
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        own = [HeldOutPass(self.held_out, number) for number in self.held_out.to_measure[rank::ranks]]
        # a process without a pass runs the first one, too, and adds sums of 0 to those of the others
        return DataLoader(_HeldOut(own or [HeldOutPass(self.held_out, 0, counts=False)]), batch_size=None)


class _Fill:
    """One filling of the buffer, of which this process holds the tokens of its own passes."""

    def __init__(self, data: ActivationData, number: int, rank: int, ranks: int) -> None:
        self.size = data.passes.tokens
        self.batch_size = data.batch
        places = range(number * data.per_fill, (number + 1) * data.per_fill)
        self.order = torch.randperm(len(places) * self.size, generator=generator(data.seed, "fill", number))
        self.rank, self.ranks = rank, ranks
        own = [place for place in range(len(places)) if place % ranks == rank]
        # of a process without a pass no token is needed, but the widths are
        self.tokens = joined(data.passes.run(data.pass_at(places[place])) for place in own or [0])

    def batch(self, place: int) -> Activations:
        """[tokens of this process, width] fp32 at each site."""
        chosen = self.order[place * self.batch_size : (place + 1) * self.batch_size]
        of_pass, token = chosen.div(self.size, rounding_mode="floor"), chosen % self.size
        own = of_pass % self.ranks == self.rank
        here = of_pass[own].div(self.ranks, rounding_mode="floor") * self.size + token[own]
        return {site: values[here].float() for site, values in self.tokens.items()}


class _Stream(IterableDataset[Activations]):
    """The batches of a process, for a loader."""

    def __init__(self, data: ActivationData, start: int, rank: int, ranks: int) -> None:
        self.data, self.start, self.rank, self.ranks = data, start, rank, ranks

    def __iter__(self) -> Iterator[Activations]:
        return self.data.batches(self.start, self.rank, self.ranks)


class _HeldOut(IterableDataset[HeldOutPass]):
    """The held-out passes of a process; of a list, Lightning would give each process a share once more."""

    def __init__(self, passes: list[HeldOutPass]) -> None:
        self.passes = passes

    def __iter__(self) -> Iterator[HeldOutPass]:
        return iter(self.passes)


# ---- errors


def _all_zero(site: Site) -> ConfigError:
    remedy = "choose another site"
    return ConfigError(f"the activations of '{site}' are 0", expected="activations to encode", found="a median length of 0", remedy=remedy)


def _nothing_left(first: int, context: int) -> ConfigError:
    expected = f"`first` of {context - 2} at most, for rows of {context} tokens"
    return ConfigError("no token of a row is left to train on", expected=expected, found=first, remedy="lower first, or raise context")


def _too_few_rows(rows: int, held_out: int) -> ConfigError:
    expected = f"more than the {held_out} rows that are kept for measuring"
    remedy = "give more text, or lower held_out or context"
    return ConfigError("there is no text to train on", expected=expected, found=f"{rows} rows", remedy=remedy)


def _accumulates(batches: int) -> ConfigError:
    remedy = "raise the batch of ActivationData instead: several processes share it"
    return ConfigError("dictionaries take one batch a step", expected="accumulate_grad_batches=1", found=batches, remedy=remedy)
