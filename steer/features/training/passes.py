"""Passes: activations of a few rows of tokens from one forward pass, kept on disk where they shall be."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from steer.errors import DamagedFileError
from steer.features.training.texts import TokenRows
from steer.files import atomic_write
from steer.model.anatomy import Anatomy, resolve
from steer.model.capture import capture
from steer.model.fingerprint import bits_digest
from steer.model.site import Site
from steer.model.tokens import Row
from steer.tensor_files import read_safetensors

Activations = dict[Site, Tensor]


class _Keep:
    """Accumulator that keeps the activations of one pass. values: [rows, tokens, width]."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        self.values = torch.empty_like(h, dtype=self.dtype)
        self.values[rows] = h.to(self.dtype)


class Passes:
    """Forward passes over token rows, each over the same rows every time, so that its activations depend on its number alone.

    Args:
        model: anything `Plan.attach` takes.
        rows: of tokens. sites: that are read. first: tokens at the start of each row that are left out.
        per_pass: rows that one pass reads.
        dtype: in which activations are kept.
        cache: folder in which the activations of each pass are written when it first runs, and read from then on; None for none.

    Raises:
        SiteError: a site that the model does not have.
    """

    def __init__(
        self, model: nn.Module, rows: TokenRows, sites: Sequence[Site], *, first: int, per_pass: int, dtype: torch.dtype, cache: Path | None
    ) -> None:
        resolve(model, list(sites))
        self.model, self.rows, self.sites, self.first, self.dtype = model, rows, list(sites), first, dtype
        self.per_pass = min(per_pass, len(rows))
        self.cache = None if cache is None else cache / self._key()

    def __len__(self) -> int:
        return len(self.rows) // self.per_pass

    @property
    def to_measure(self) -> range:
        """Numbers of all passes, with a last one over the rows that are left over: training leaves them out, a measurement does not."""
        return range(math.ceil(len(self.rows) / self.per_pass))

    @property
    def tokens(self) -> int:
        """Of one pass, those at the start of rows left out."""
        return self.per_pass * (self.rows.context - self.first)

    def ids(self, number: int) -> Tensor:
        """[rows, context] tokens of a pass."""
        return self.rows.ids[number * self.per_pass : (number + 1) * self.per_pass]

    def run(self, number: int) -> Activations:
        """site -> [tokens, width] of a pass, from the disk where they are. Raises NonFiniteError, DamagedFileError."""
        file = None if self.cache is None else self.cache / f"{number}.safetensors"
        if file is not None and file.is_file():
            return self._read(file)
        activations = self._forward(number)
        if file is not None:
            atomic_write(file, safetensors.torch.save({str(site): values for site, values in activations.items()}))
        return activations

    def _forward(self, number: int) -> Activations:
        rows = [Row(tuple(ids), self.first) for ids in self.ids(number).tolist()]
        kept = {site: _Keep(self.dtype) for site in self.sites}
        capture(self.model, rows, dict(kept), max_tokens=len(rows) * self.rows.context, share=False)
        return {site: keep.values.flatten(0, 1) for site, keep in kept.items()}

    def _read(self, file: Path) -> Activations:
        tensors, _ = read_safetensors(file)
        if set(tensors) != set(map(str, self.sites)) or any(len(values) != self.tokens for values in tensors.values()):
            raise _other_content(file, self.sites, tensors)
        return {site: tensors[str(site)] for site in self.sites}

    def _key(self) -> str:
        """A name that changes with whatever the activations depend on, as far as it can be told."""
        facts = [self.weights, self.rows.fingerprint(), list(map(str, self.sites)), self.first, self.per_pass, str(self.dtype)]
        return hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def weights(self) -> str:
        """A digest of the model's weights: the same on any device."""
        try:
            anatomy = Anatomy.find(self.model).fingerprint()
        except Exception:  # a model that is no decoder: its shapes have to do
            anatomy = {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}
        digests = [bits_digest(parameter) for parameter in self.model.parameters()]
        return hashlib.sha256(json.dumps([anatomy, digests], default=str, sort_keys=True).encode()).hexdigest()[:16]


def joined(parts: Iterable[Activations]) -> Activations:
    """Activations of several passes one behind the other."""
    listed = list(parts)
    return {site: torch.cat([part[site] for part in listed]) for site in listed[0]}


# ---- errors


def _other_content(file: Path, sites: Sequence[Site], tensors: dict[str, Tensor]) -> DamagedFileError:
    return DamagedFileError(
        f"{file} does not hold the activations of this run",
        expected=", ".join(map(str, sites)),
        found=", ".join(f"{name} {list(values.shape)}" for name, values in tensors.items()) or "nothing",
        remedy="delete the folder of the cache",
    )
