"""What is watched at one site: the named directions and, always beside them, random control directions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.directions.direction import Direction
from steer.drift.records import Tracked
from steer.errors import ConfigError, WidthError
from steer.model.site import Site

Watched = Direction | Iterable[Direction] | Mapping[Site, Direction]


@dataclass(frozen=True, eq=False)
class Watch:
    """The directions of one site.

    Attributes:
        names: of the named directions first, then of the controls.
        units: [directions, width] fp64, each of length 1, in the order of `names`.
        gaps: class gap of each named direction; its length is the number of named directions.
    """

    site: Site
    names: tuple[str, ...]
    units: Tensor
    gaps: tuple[float, ...]

    @property
    def named(self) -> int:
        return len(self.gaps)

    def kind(self, index: int) -> str:
        return "named" if index < self.named else "control"

    def gap(self, index: int) -> float | None:
        return self.gaps[index] if index < self.named else None

    def tracked(self) -> list[Tracked]:
        site = str(self.site)
        return [Tracked.of(name, site, self.kind(i), self.gap(i), self.units[i]) for i, name in enumerate(self.names)]


def listed(given: Watched) -> list[Direction]:
    """The directions that are given under one name."""
    if isinstance(given, Direction):
        return [given]
    return list(given.values()) if isinstance(given, Mapping) else list(given)


def random_units(count: int, width: int, site: Site, seed: int) -> Tensor:
    """[count, width] fp64 isotropic random directions of length 1; a site has the same ones whatever else is watched."""
    own = int.from_bytes(hashlib.sha256(f"{seed}/{site}".encode()).digest()[:7], "big")
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(own), dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def watches(directions: Mapping[str, list[Direction]], controls: int, seed: int) -> dict[Site, Watch]:
    """One watch per site.

    Raises:
        ConfigError: nothing to watch, a name twice at one site, fewer than two controls. WidthError: widths that differ at one site.
    """
    if controls < 2:
        raise ConfigError("too few control directions", expected="at least 2, 16 for a useful z", found=controls, remedy="pass controls=16")
    at: dict[Site, list[tuple[str, Direction]]] = {}
    for name, ones in directions.items():
        for one in ones:
            at.setdefault(one.site, []).append((name, one))
    if not at:
        raise ConfigError(
            "there is no direction to track",
            expected="at least one",
            found=", ".join(f"none under '{name}'" for name in directions) or "none",
            remedy="pass directions={name: what steer.extract gave}",
        )
    made = {}
    for site, pairs in at.items():
        if len(widths := {len(one.vector) for _, one in pairs}) > 1:
            raise WidthError(
                f"directions at '{site}' differ in width",
                expected="one width",
                found=f"widths {', '.join(map(str, sorted(widths)))}",
                remedy="leave out those that were extracted on another model",
            )
        units = torch.stack([one.vector.detach().double().cpu() for _, one in pairs])
        gaps = units.norm(dim=1)
        random = random_units(controls, units.shape[1], site, seed)
        names = (*(name for name, _ in pairs), *(f"random-{i:02d}" for i in range(controls)))
        if len(set(names)) < len(names):
            raise ConfigError(
                f"two directions at '{site}' have one name",
                expected="a name for each; random-<number> is taken by the controls",
                found=f"{', '.join(sorted({name for name in names if names.count(name) > 1}))} more than once",
                remedy="rename one of them",
            )
        made[site] = Watch(site, names, torch.cat([units / gaps[:, None], random]), tuple(gaps.tolist()))
    return made
