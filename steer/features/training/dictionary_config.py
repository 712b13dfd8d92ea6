"""DictionaryConfig: what a dictionary that is to be trained shall be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steer.checks import of_type, one_of, whole_number
from steer.errors import ConfigError
from steer.features.training.sparsifier import SPARSIFIERS
from steer.model.site import Site

ARCHITECTURES = ("sparse_autoencoder", "transcoder", "crosscoder", "cross_layer_transcoder")


@dataclass(frozen=True)
class DictionaryConfig:
    """One dictionary in training.

    Attributes:
        reads: sites that it encodes, as text or `Site`; one for an autoencoder and a transcoder.
        writes: sites that it reconstructs; None for those that it reads.
        width: number of features; of a cross-layer transcoder for each layer.
        k: features per token; of a cross-layer transcoder for each layer.
        architecture: `sparse_autoencoder`, `transcoder`, `crosscoder` or `cross_layer_transcoder`. A layer of the last writes to its own
            and all later places of `writes`.
        sparsifier: a name of `SPARSIFIERS`.
        settings: of the sparsifier.
        prefixes: numbers of features at which a Matryoshka dictionary has to reconstruct alone, the last of which is the width.
        skip: a transcoder has a linear map around its features.
        name: of its folder and its log entries; None for one made of its sites and its width.

    Raises:
        ConfigError: what does not fit together. SiteError: a site that cannot be parsed.

    Example:
        >>> config = steer.features.training.DictionaryConfig(["layers.12.output"], width=64, k=4, sparsifier="topk")
        >>> config.sites
        (Site('layers.12.output'),)
    """

    reads: Sequence[Site | str]
    writes: Sequence[Site | str] | None = None
    width: int = 4096
    k: int = 32
    architecture: str = "sparse_autoencoder"
    sparsifier: str = "batchtopk"
    settings: dict[str, Any] = field(default_factory=dict)
    prefixes: Sequence[int] = ()
    skip: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        whole_number(self.width, "`width` of a dictionary", least=1)
        whole_number(self.k, "`k` of a dictionary", least=1)
        one_of(self.architecture, ARCHITECTURES, "`architecture` of a dictionary")
        SPARSIFIERS.get(self.sparsifier)
        of_type(self.settings, dict, "`settings` of a sparsifier", "pass {name: value}")
        for sites in ("reads", "writes"):
            value = getattr(self, sites) if sites == "reads" or self.writes is not None else self.reads
            of_type(value, (list, tuple), f"`{sites}` of a dictionary", "pass a list of sites")
            object.__setattr__(self, sites, tuple(Site.parse(site) for site in value))
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        self._check()
        if self.name is None:
            object.__setattr__(self, "name", self._made_name())

    def _check(self) -> None:
        if self.k > self.width:
            raise _more_on_than_there_are(self.k, self.width)
        several = self.architecture in ("crosscoder", "cross_layer_transcoder")
        if not self.reads or not self.writes or not several and (len(self.reads), len(self.writes)) != (1, 1):
            raise _wrong_number_of_sites(self, "one site" if not several else "at least one site")
        if self.architecture in ("sparse_autoencoder", "crosscoder") and self.reads != self.writes:
            raise _wrong_number_of_sites(self, "the sites that it reads, or none")
        if self.architecture == "cross_layer_transcoder" and len(self.reads) != len(self.writes):
            raise _wrong_number_of_sites(self, f"{len(self.reads)} sites, one for each that it reads")
        if self.skip and self.architecture != "transcoder":
            raise _no_skip(self)
        fits = self.prefixes == tuple(sorted(set(self.prefixes))) and self.prefixes[-1:] == (self.width,) and self.prefixes[0] > 0
        if self.prefixes and not (self.architecture == "sparse_autoencoder" and fits):
            raise _wrong_prefixes(self)

    def _made_name(self) -> str:
        sites = [str(site) for site in (self.reads if self.reads == self.writes else (*self.reads, *(self.writes or ())))]
        where = "_to_".join(sites) if len(sites) <= 2 else f"{sites[0]}_and_{len(sites) - 1}_more"
        kind = "" if (self.architecture, self.sparsifier, self.skip) == ("sparse_autoencoder", "batchtopk", False) else (
            f"_{'skip_' if self.skip else ''}{self.architecture}_{self.sparsifier}")  # fmt: skip
        return f"{where}_{self.width}{kind}{'_matryoshka' if self.prefixes else ''}".replace("/", "-").replace(":", "-")

    @property
    def sites(self) -> tuple[Site, ...]:
        """All that it needs, each once."""
        return tuple(dict.fromkeys((*self.reads, *(self.writes or ()))))  # type: ignore[arg-type]

    def described(self) -> dict[str, Any]:
        """JSON form."""
        plain = ("width", "k", "architecture", "sparsifier", "skip", "name")
        lists = {name: [str(site) for site in getattr(self, name)] for name in ("reads", "writes")}
        return {**{name: getattr(self, name) for name in plain}, **lists, "settings": dict(self.settings), "prefixes": list(self.prefixes)}


def generator(seed: int, *what: object) -> torch.Generator:
    """Random numbers that depend on a seed and on what they are for alone."""
    digest = hashlib.sha256(json.dumps([seed, *map(str, what)]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# ---- errors


def _more_on_than_there_are(k: int, width: int) -> ConfigError:
    return ConfigError("more features are on than there are", expected=f"k from 1 to {width}, the width", found=k, remedy="lower k")


def _wrong_number_of_sites(config: DictionaryConfig, expected: str) -> ConfigError:
    found = f"reads {', '.join(map(str, config.reads)) or 'none'}; writes {', '.join(map(str, config.writes or ())) or 'none'}"
    remedy = "for several dictionaries of one site each, pass several configurations"
    return ConfigError(f"the sites of a {config.architecture} do not fit", expected=expected, found=found, remedy=remedy)


def _no_skip(config: DictionaryConfig) -> ConfigError:
    return ConfigError("only a transcoder has a skip connection", expected="skip=False", found=config.architecture, remedy="leave skip out")


def _wrong_prefixes(config: DictionaryConfig) -> ConfigError:
    return ConfigError(
        "the prefixes of a Matryoshka dictionary do not fit",
        expected=f"growing numbers of features of a sparse_autoencoder, the last of which is {config.width}",
        found=f"{list(config.prefixes)} of a {config.architecture}",
        remedy="pass the cumulated sizes of its groups",
    )
