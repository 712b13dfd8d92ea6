"""Sites: several sites under one description: patterns such as `layers.*.output`, single sites, or a list of both."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from steer.errors import SiteError
from steer.model.anatomy import Anatomy, module_point
from steer.model.site import GRAMMAR, Site, expand

_LAYERS = re.compile(r"(?<![^.])layers\.(?:\*|\d+-\d+)\.")  # of a pattern, at its beginning or after a dot


@dataclass(frozen=True)
class Sites:
    """Several sites, as they were written; a model says which of its layers a pattern means.

    Attributes:
        entries: sites, and patterns as text.
    """

    entries: tuple[Site | str, ...]

    def __repr__(self) -> str:
        return f"Sites('{self}')"

    def __str__(self) -> str:
        return ",".join(map(str, self.entries))

    def to_json(self) -> str | list[str]:
        """The form that `parse_sites` reads: text for one pattern, else a list."""
        return str(self) if len(self.entries) == 1 else [str(entry) for entry in self.entries]

    def examples(self) -> Iterator[Site]:
        """One site of each entry, for what can be checked without a model."""
        for entry in self.entries:
            yield entry if isinstance(entry, Site) else _example(entry)

    @property
    def has_pattern(self) -> bool:
        """Some entry stands for several layers."""
        return any(isinstance(entry, str) for entry in self.entries)

    def in_model(self, model: nn.Module, anatomy: Anatomy | None) -> list[Site]:
        """The sites that are meant, each tensor that is hooked once. anatomy: of the model, None where only module sites are named.

        Raises:
            SiteError: a site that the model does not have; a pattern that none of its layers fits.
        """
        by_hook: dict[tuple[int, str, str | None], Site] = {}
        for entry in self.entries:
            sites = [entry] if anatomy is None or isinstance(entry, Site) else anatomy.sites(entry)
            if not sites:
                raise _no_match(str(entry), model)
            for site in map(Site.parse, sites):
                point = module_point(model, site) if anatomy is None or site.module is not None else anatomy.point(site)
                by_hook.setdefault((id(point.module), point.side, None if point.columns is None else str(point.site)), point.site)
        return list(by_hook.values())

    def in_layers(self, n_layers: int) -> list[Site]:
        """The sites that are meant in a model of which nothing but its depth is known, each once."""
        return list(dict.fromkeys(site for entry in self.entries for site in expand(entry, n_layers)))


def examples_of(site: Site | Sites) -> Iterator[Site]:
    """One site of each entry of what was written; a single site is its own example."""
    if isinstance(site, Sites):
        yield from site.examples()
    else:
        yield site


def parse_sites(written: str | Site | Sites | Sequence[str | Site]) -> Site | Sites:
    """Reads a site, a pattern, or a list of both. Raises SiteError."""
    if isinstance(written, Sites):
        return written
    listed: Sequence[Any] = written if isinstance(written, list | tuple) else [written]
    if not listed:
        raise _no_sites()
    entries = tuple(map(_entry, listed))
    return entries[0] if len(entries) == 1 and isinstance(entries[0], Site) else Sites(entries)


def _entry(written: Any) -> Site | str:
    """A site, or a pattern as it was written. Raises SiteError."""
    if not isinstance(written, str) or _LAYERS.search(written) is None:
        return Site.parse(written)
    try:
        _example(written)
    except SiteError as error:
        raise _unknown_pattern(written, error) from None
    return written


def _example(pattern: str) -> Site:
    return Site.parse(_LAYERS.sub("layers.0.", pattern, count=1))


# ---- errors


def _no_sites() -> SiteError:
    return SiteError(
        "an intervention without a site acts nowhere",
        expected="one site, a pattern, or a list of them",
        found="an empty list",
        remedy="e.g. 'layers.*.output'",
    )


def _unknown_pattern(pattern: str, error: SiteError) -> SiteError:
    remedy = error.remedy.replace("layers.0.", _LAYERS.search(pattern)[0])  # type: ignore[index]
    return SiteError(f"unknown sites '{pattern}'", expected=GRAMMAR, found=pattern, remedy=remedy)


def _no_match(pattern: str, model: nn.Module) -> SiteError:
    return SiteError(
        f"no layer of this {type(model).__name__} has '{pattern}'",
        expected="a pattern that fits one layer at least",
        found="no such site",
        remedy="leave it out, or look at what there is: steer.Anatomy.find(model).sites()",
    )
