"""What the caller of `load_dictionary` says beyond the file."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from steer.errors import ConfigError, SiteError
from steer.features.dictionary import Dictionary
from steer.features.provenance import Origin, Untrained
from steer.model.site import Site
from steer.place import Place


@dataclass(frozen=True, eq=False)
class Wanted:
    """What the caller says beyond the file; see `load_dictionary`. It notes what a format reads of it: the rest had no use."""

    layer: int | None = None
    reads: str | list[str] | None = None
    writes: str | list[str] | None = None
    norm_factor: float | None = None
    gain: Tensor | None = None
    untrained: Untrained | None = None
    models: tuple[str, ...] = ()
    k: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_read", set())

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            object.__getattribute__(self, "_read").add(name)
        return object.__getattribute__(self, name)

    def for_layers(self, count: int) -> Wanted:
        """The same with a site that has `{layer}` written out for every layer."""
        other = copy.copy(self)
        for name in ("reads", "writes"):
            said = getattr(self, name)
            if isinstance(said, str) and "{layer}" in said:
                object.__setattr__(other, name, [said.replace("{layer}", str(layer)) for layer in range(count)])
        return other

    def check_used(self, place: Place, dictionary: Dictionary) -> None:
        """Raises ConfigError for an argument that the format had no use for, and that says something else than the dictionary."""
        for name in [field.name for field in fields(self)]:
            said, is_read = self.__dict__[name], name in self._read
            if is_read or said is None or name == "models" and not said:
                continue
            same_layer = name == "layer" and all(site.layer == said for site in dictionary.reads)
            same_writes = name == "writes" and sites_of(said, self) == dictionary.writes
            if not same_layer and not same_writes:
                raise _no_use(place, name, said, dictionary)


def overruled(origin: Origin, wanted: Wanted) -> Origin:
    """The origin in a file of ours, with what the caller says better. Raises SiteError, ConfigError."""
    reads = sites_of(wanted.reads, wanted) or origin.reads
    if origin.reads == origin.writes:
        writes = reads
    else:
        writes = sites_of(wanted.writes, wanted) or origin.writes
    untrained = origin.untrained if wanted.untrained is None else wanted.untrained
    return Origin(reads, writes, origin.source, untrained, wanted.models or origin.models)


def sites_of(said: str | list[str] | None, wanted: Wanted) -> tuple[Site, ...] | None:
    """Sites, with the layer that is wanted in place of `{layer}`. Raises SiteError, ConfigError."""
    if said is None:
        return None
    texts = [said] if isinstance(said, str | Site) else list(said)
    try:
        return tuple(Site.parse(str(text).format(layer=wanted.layer) if "{layer}" in str(text) else text) for text in texts)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, SiteError):
            raise
        raise _no_site_text(said, error) from error


# ---- errors


def _no_use(place: Place, name: str, said: object, dictionary: Dictionary) -> ConfigError:
    where = ", ".join(map(str, dict.fromkeys((*dictionary.reads, *dictionary.writes))))
    return ConfigError(
        f"`{name}` changes nothing of '{place.name}'",
        expected="an argument that its files leave open, see docs/features.md",
        found=f"{name}={said!r:.80}, for a {dictionary.name} with '{dictionary.activation_name}' at {where}",
        remedy="leave it out, or check that this is the file that is meant",
    )


def _no_site_text(said: object, error: Exception) -> ConfigError:
    expected = "a site, with {layer} in place of the layer or without"
    return ConfigError(f"cannot read the site {said!r}", expected=expected, found=f"{type(error).__name__}: {error}",
                       remedy="e.g. 'layers.{layer}.output'")  # fmt: skip
