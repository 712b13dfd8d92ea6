"""Directions that are tracked at one site: the named ones and, always beside them, random control directions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.checks import of_type
from steer.directions.direction import Direction
from steer.errors import ConfigError, WidthError
from steer.model.site import Site

KINDS = ("named", "control", "feature", "feature_control", "dictionary")
CONTROLS = ("control", "feature_control")

_MAKE_ONE = "pass what steer.extract gave, or make one of a tensor: steer.Direction('layers.12.output', vector, 'given', 'all')"

DirectionsLike = Direction | Iterable[Direction] | Mapping[Site, Direction]


@dataclass(frozen=True)
class TrackedDirection:
    """A direction, a feature or a dictionary as the store knows it.

    Attributes:
        kind: `named`, or `control` for a random direction; `feature`, or `feature_control` for a random one; `dictionary`.
        gap: class gap along a named direction, None for everything else.
        sha256: of the unit vector in fp32, or of what a feature is encoded by, so that a series never mixes two of them.
    """

    direction: str
    site: str
    kind: str
    gap: float | None
    sha256: str

    @classmethod
    def of(cls, direction: str, site: str, kind: str, gap: float | None, unit: Tensor) -> TrackedDirection:
        """Hashes the unit vector, [width]."""
        return cls(direction, site, kind, gap, hashlib.sha256(unit.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest())


@dataclass(frozen=True, eq=False)
class SiteDirections:
    """Named directions and controls of one site.

    Attributes:
        names: of the named directions first, then of the controls.
        units: [directions, width] fp64, each of length 1, in the order of `names`.
        gaps: class gap of each named direction; its length is the number of named directions.
    """

    site: Site
    names: tuple[str, ...]
    units: Tensor
    gaps: tuple[float, ...]

    def __repr__(self) -> str:
        named = ", ".join(self.names[: len(self.gaps)])
        return f"SiteDirections({named} at {self.site}, {len(self.names) - len(self.gaps)} controls)"

    @property
    def width(self) -> int:
        return self.units.shape[1]

    @property
    def named_count(self) -> int:
        return len(self.gaps)

    @property
    def named_units(self) -> Tensor:
        """[named directions, width]."""
        return self.units[: self.named_count]

    def kind(self, index: int) -> str:
        """`named` or `control`."""
        return "named" if index < self.named_count else "control"

    def tracked(self) -> list[TrackedDirection]:
        """What the store is to know about each of them."""
        gaps = [*self.gaps, *[None] * (len(self.names) - self.named_count)]
        rows = enumerate(zip(self.names, gaps, self.units, strict=True))
        return [TrackedDirection.of(name, str(self.site), self.kind(i), gap, unit) for i, (name, gap, unit) in rows]


def as_list(name: str, directions: Any) -> list[Direction]:
    """Lists the directions that stand under one name. Raises ConfigError for anything else, such as a bare tensor."""
    is_one = isinstance(directions, (Direction, Tensor, str)) or not isinstance(directions, Iterable)
    under_it: Any = directions.values() if isinstance(directions, Mapping) else directions
    listed: list[Any] = [directions] if is_one else list(under_it)
    for direction in listed:
        of_type(direction, Direction, f"the direction '{name}'", _MAKE_ONE)
    return listed


def random_units(count: int, width: int, site: Site, seed: int) -> Tensor:
    """Draws isotropic random directions of length 1, [count, width] fp64; a site has the same ones whatever else is tracked."""
    site_seed = int.from_bytes(hashlib.sha256(f"{seed}/{site}".encode()).digest()[:7], "big")
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(site_seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def directions_by_site(directions: Mapping[str, list[Direction]], controls: int, seed: int) -> dict[Site, SiteDirections]:
    """Groups named directions by site and draws the controls of each.

    Raises:
        ConfigError: nothing to track, a name twice at one site, fewer than two controls. WidthError: widths that differ at one site.
    """
    if controls < 2:
        raise ConfigError("too few control directions", expected="at least 2, 16 for a useful z", found=controls, remedy="pass controls=16")
    named: dict[Site, list[tuple[str, Direction]]] = {}
    for name, of_name in directions.items():
        for direction in of_name:
            named.setdefault(direction.site, []).append((name, direction))
    if not named:
        raise _nothing_to_track(directions)
    return {site: _with_controls(site, pairs, controls, seed) for site, pairs in named.items()}


def _with_controls(site: Site, named: Sequence[tuple[str, Direction]], controls: int, seed: int) -> SiteDirections:
    widths = {len(direction.vector) for _, direction in named}
    if len(widths) > 1:
        raise _widths_differ(site, widths)
    names = (*(name for name, _ in named), *(f"random-{i:02d}" for i in range(controls)))
    if len(set(names)) < len(names):
        raise _name_taken(site, names)
    vectors = torch.stack([direction.vector.detach().double().cpu() for _, direction in named])  # [named, width]
    gaps = vectors.norm(dim=1)
    units = torch.cat([vectors / gaps[:, None], random_units(controls, vectors.shape[1], site, seed)])  # [named + controls, width]
    return SiteDirections(site, names, units, tuple(gaps.tolist()))


def _nothing_to_track(directions: Iterable[str]) -> ConfigError:
    return ConfigError(
        "there is no direction to track",
        expected="at least one",
        found=", ".join(f"none under '{name}'" for name in directions) or "none",
        remedy="pass directions={name: what steer.extract gave}",
    )


def _widths_differ(site: Site, widths: Iterable[int]) -> WidthError:
    return WidthError(
        f"directions at '{site}' differ in width",
        expected="one width",
        found=f"widths {', '.join(map(str, sorted(widths)))}",
        remedy="leave out those that were extracted on another model",
    )


def _name_taken(site: Site, names: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"two directions at '{site}' have one name",
        expected="a name for each; random-<number> is taken by the controls",
        found=f"{', '.join(sorted(name for name, count in Counter(names).items() if count > 1))} more than once",
        remedy="rename one of them",
    )
