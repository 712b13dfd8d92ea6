"""Where a dictionary comes from, where it belongs, and on which tokens it was never trained."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.checks import finite_number, whole_number
from steer.model.site import Site


@dataclass(frozen=True)
class Untrained:
    """Tokens that were left out when a dictionary was trained, on which its features are noise. Encoding, clamps and statistics skip them.

    Attributes:
        first: number of tokens at the start of a text (attention sinks, the template of a chat).
        max_norm: length of an activation above which a token is an outlier; None for no limit.

    Example:
        >>> untrained = steer.features.Untrained(first=1)
        >>> untrained.trained_on(torch.ones(1, 3, 8), torch.tensor([[0, 1, 2]]))
        tensor([[False,  True,  True]])
    """

    first: int = 0
    max_norm: float | None = None

    def __post_init__(self) -> None:
        whole_number(self.first, "`first` of Untrained")
        if self.max_norm is not None:
            finite_number(self.max_norm, "`max_norm` of Untrained", above=0)

    def trained_on(self, h: Tensor, positions: Tensor | None = None) -> Tensor | None:
        """[...] True at tokens like those of the training; None when all are.

        Args:
            h: [..., width] activations.
            positions: [...] place of each token in its text, counted from 0 at the first one that is no padding. Without them nothing is
                known of the start of the text, and the norm alone decides.
        """
        inside = None if self.max_norm is None else h.detach().float().norm(dim=-1) <= self.max_norm
        if self.first and positions is not None:
            after = positions.to(h.device) >= self.first
            inside = after if inside is None else inside & after
        return inside


@dataclass(frozen=True, eq=False)
class Source:
    """The file or repository that a dictionary was read from.

    Attributes:
        format: a name of `FORMATS`; None for a dictionary that was made here.
        place: path, or name of the repository and folder in it. revision: of a repository.
        files: those with its weights, on this disk.
        model: name of the model that it was trained on, as far as the file says.
        hooks: names of the hook points in the file.
        folded: what was folded into its matrices.
        notes: what else the file says, JSON-able.
        hashes: SHA-256 by file, where they are known already.

    Example:
        >>> source = steer.load_dictionary("smollm2-135m-sae-12").source
        >>> source.format, source.model
    """

    format: str | None = None
    place: str = ""
    revision: str | None = None
    files: tuple[Path, ...] = ()
    model: str | None = None
    hooks: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    def sha256(self) -> dict[str, str]:
        """{file: SHA-256} of the files with the weights, read once when it is asked for."""
        for path in self.files:
            if path.name not in self.hashes:
                with path.open("rb") as file:
                    self.hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return dict(self.hashes)

    def described(self) -> dict[str, Any]:
        """JSON form, hashes included."""
        names = ("format", "place", "revision", "model", "notes")
        lists = {name: list(getattr(self, name)) for name in ("hooks", "folded")}
        return {**{name: getattr(self, name) for name in names}, **lists, "hashes": self.sha256()}

    @classmethod
    def from_described(cls, described: dict[str, Any]) -> Source:
        """Rebuilds it from its JSON form."""
        lists = {name: tuple(described[name]) for name in ("hooks", "folded")}
        return cls(**{**described, **lists})


@dataclass(frozen=True, eq=False)
class Origin:
    """What a dictionary is of.

    Attributes:
        reads, writes: sites that it encodes and that it reconstructs; the same ones for an autoencoder.
        source, untrained: see there.
        models: name of the model at each site that is read, for crosscoders between models; empty for one model.

    Example:
        >>> site = steer.Site.parse("layers.12.output")
        >>> steer.features.Origin((site,), (site,)).described()["reads"]
        ['layers.12.output']
    """

    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    source: Source = field(default_factory=Source)
    untrained: Untrained = Untrained()
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("reads", "writes"):
            object.__setattr__(self, name, tuple(Site.parse(site) for site in getattr(self, name)))

    def described(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "reads": [str(site) for site in self.reads],
            "writes": [str(site) for site in self.writes],
            "source": self.source.described(),
            "untrained": {"first": self.untrained.first, "max_norm": self.untrained.max_norm},
            "models": list(self.models),
        }

    @classmethod
    def from_described(cls, described: dict[str, Any]) -> Origin:
        """Rebuilds it from its JSON form."""
        source, untrained = Source.from_described(described["source"]), Untrained(**described["untrained"])
        return cls(described["reads"], described["writes"], source, untrained, tuple(described["models"]))
