"""Direction: a vector that stands for a concept at one site, with how it was read and how well it separates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from steer import files
from steer.checks import of_type, tensor_of
from steer.directions.contrast import text_digest
from steer.errors import ConfigError, ContrastError, SiteError, WidthError
from steer.intervene.operator import check_finite
from steer.model.site import Site
from steer.model.tokens import Row
from steer.reading import check_kinds, damage_of

SUGGESTED_DOSE = 0.2


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction at a site.

    Attributes:
        vector: [width] fp32, scaled so that adding it once moves a text by the gap between the two class means along it.
            One that was trained has the length it was trained to have instead.
        method, span: how and where it was read.
        metrics: `auc` and `dprime` on held-out texts, `gap` (class gap along the direction; |vector| unless it was trained), `mean`
            (projection on the direction, mean over the texts of both classes), `sd` (within-class standard deviation along it, held-out),
            `activation_norm` (mean |h| on the span's tokens), `n_train`, `n_heldout`. Held out by group, also `n_heldout_groups` and
            `auc_worst_group`, the lowest AUC within one of them.
        fitted_on: digests of the texts that had a part in it, which may not judge it.

    Raises:
        WidthError: not one vector. ConfigError: a vector of length 0.

    Example:
        >>> direction = steer.Direction(steer.Site.parse("layers.12.output"), vector, "by hand", "all")
        >>> plan = steer.Plan(steer.Intervention(steer.Add(direction.unit), direction.site, strength=4.0))
    """

    site: Site
    vector: Tensor
    method: str
    span: str | int
    metrics: dict[str, float] = field(default_factory=dict)
    fitted_on: frozenset[str] = field(default=frozenset(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", Site.parse(self.site))
        vector = tensor_of(self.vector, f"the vector of a direction at '{self.site}'", "pass [width] numbers")
        object.__setattr__(self, "vector", vector if vector.is_floating_point() else vector.float())
        if self.vector.dim() != 1:
            raise _shape_error(self)
        check_finite(self.vector, f"direction at '{self.site}'")
        if float(self.vector.norm()) == 0:
            raise _zero_error(self)

    def __repr__(self) -> str:
        measured = "".join(f", {name} {self.metrics[name]:.3g}" for name in ("auc", "dprime", "r2") if name in self.metrics)
        if self.held_out == "groups":
            measured += f" on {self.metrics['n_heldout_groups']:.0f} unseen group{'s' * (self.metrics['n_heldout_groups'] != 1)}"
        length = float(self.vector.norm())
        return f"Direction({self.method} of {self.span} at {self.site}, width {len(self.vector)}, length {length:.4g}{measured})"

    @property
    def unit(self) -> Tensor:
        """[width], length 1."""
        return self.vector / self.vector.norm()

    @property
    def held_out(self) -> str:
        """What the metrics were measured on: `groups` that the direction has not seen, `texts` that may be of the groups it has seen, or
        `nothing`."""
        return "groups" if "n_heldout_groups" in self.metrics else "texts" if "n_heldout" in self.metrics else "nothing"

    def relative_dose(self, strength: float = 1.0) -> float:
        """|strength * v| / mean |h| at the site: how large the edit is beside what it edits."""
        return abs(strength) * float(self.vector.norm()) / self.metric("activation_norm")

    def strength_of(self, dose: float) -> float:
        """The strength that gives a relative dose |strength * v| / mean |h|, with its sign."""
        return dose * self.metric("activation_norm") / float(self.vector.norm())

    @property
    def suggested_strength(self) -> float:
        """The strength of the relative dose 0.2, a start that costs nothing to find; `steer.calibrate` finds the one for a model.

        On SmolLM2-135M, answers on seven concepts moved by it and looped as often as without it; gushing ones loop at any dose. Both are
        in docs/directions.md. A vector that was trained has a strength of its own, 1.

        Raises:
            ConfigError: nothing is known of the activations at the site, as for vectors from elsewhere.

        Example:
            >>> gushing = steer.extract(model, contrast, ["layers.16.output"], name="gushing").best()
            >>> plan = steer.Plan(steer.Intervention(steer.Add(gushing.vector), gushing.site, strength=gushing.suggested_strength))
        """
        return self.strength_of(SUGGESTED_DOSE)

    def metric(self, name: str) -> float:
        """One of the metrics, in the units that `Direction` names. Raises ConfigError when it was not measured (vectors from elsewhere)."""
        if name not in self.metrics:
            raise _metric_error(self, name)
        return self.metrics[name]

    def check_unseen(self, rows: Iterable[Row], what: str) -> None:
        """Raises ContrastError when a text that is to judge the direction had a part in making it."""
        seen = sum(text_digest(row) in self.fitted_on for row in rows)
        if seen:
            raise _seen_error(what, seen)


def check_direction(value: Any) -> None:
    """Raises ConfigError unless this is one direction."""
    of_type(value, Direction, "the direction", "pass one Direction; of the Directions that steer.extract returns, `directions.best()`")


class Directions(Mapping[Site, Direction]):
    """One concept read at several sites, with its provenance.

    Args:
        entries: one direction per site.
        name: what it stands for.
        provenance: model fingerprint, hash of the data, extraction arguments.

    Raises:
        ConfigError: two directions at one site.

    Example:
        >>> directions = steer.extract(model, contrast, ["layers.10-20.output"], name="kind")
        >>> directions.best().metrics["auc"], directions["layers.12.output"].vector.shape
        >>> directions.save("kind")
        PosixPath('kind')
    """

    def __init__(self, entries: list[Direction], name: str, provenance: dict[str, Any]) -> None:
        of_type(entries, (list, tuple), "the entries of directions", "pass a list of Direction, one for each site")
        self.entries: dict[Site, Direction] = {}
        for entry in entries:
            check_direction(entry)
            if self.entries.setdefault(entry.site, entry) is not entry:
                raise _site_twice_error(name, self.entries[entry.site], entry)
        self.name = name
        self.provenance = provenance

    def __repr__(self) -> str:
        sites = list(self.entries)
        where = "at no site" if not sites else f"at {sites[0]}" if len(sites) == 1 else f"at {len(sites)} sites, {sites[0]} to {sites[-1]}"
        return f"Directions('{self.name}' {where})"

    def __contains__(self, site: object) -> bool:
        return isinstance(site, Site | str) and Site.parse(site) in self.entries

    def get(self, site: Site | str, default: Any = None) -> Any:
        return self.entries.get(Site.parse(site), default)

    def __getitem__(self, site: Site | str) -> Direction:
        try:
            return self.entries[Site.parse(site)]
        except KeyError:
            raise _unread_error(self, site) from None

    def __iter__(self) -> Iterator[Site]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def best(self) -> Direction:
        """Highest held-out AUC (of probes of numbers R2), on unseen groups where there were any; among equals the clearest separation in
        standard deviations.

        Raises:
            ConfigError: it was not measured; some were judged on unseen groups and others were not.
        """
        kinds = {entry.held_out: entry for entry in self.entries.values()}
        if {"groups", "texts"} <= kinds.keys():
            raise _kinds_error(self, kinds)
        return max(self.entries.values(), key=_quality)

    def save(self, path: str | Path) -> Path:
        """Writes manifest and safetensors, atomically."""
        tensors = {str(site): entry.vector for site, entry in self.entries.items()}
        described = {
            str(site): {"method": entry.method, "span": entry.span, "metrics": entry.metrics} for site, entry in self.entries.items()
        }
        return files.save_artifact(path, "directions", tensors, {"name": self.name, "directions": described, "provenance": self.provenance})

    @classmethod
    def load(cls, path: str | Path) -> Directions:
        """Raises DamagedFileError, UnsafeFileError, WrongKindError, NonFiniteError."""
        manifest, tensors = files.load_artifact(path, "directions")
        with damage_of(path, _PARTS, f"directions '{path}' lack a part, or hold one that does not fit", _REMEDY):
            check_kinds(manifest, {"name": str, "directions": dict, "provenance": dict})
            if tensors.keys() != manifest["directions"].keys():
                raise ValueError(f"tensors {', '.join(tensors) or 'none'} for the sites {', '.join(manifest['directions']) or 'none'}")
            seen = frozenset(manifest["provenance"].get("fitted_on", ()))
            entries = []
            for site, spec in manifest["directions"].items():
                check_kinds(spec, {"method": str, "span": (str, int), "metrics": dict})
                check_kinds(spec["metrics"], dict.fromkeys(spec["metrics"], (int, float)))
                entries.append(Direction(Site.parse(site), tensors[site], **spec, fitted_on=seen))
            return cls(entries, manifest["name"], manifest["provenance"])


def _quality(entry: Direction) -> tuple[float, float]:
    if "r2" in entry.metrics and "auc" not in entry.metrics:
        return entry.metrics["r2"], entry.metric("rank_correlation")
    return entry.metric("auc"), entry.metric("dprime")


_PARTS = "name and provenance, and for every site its tensor, method, span and metrics, which are numbers"
_REMEDY = "restore them from a backup, or extract and save them again"


def _shape_error(direction: Direction) -> WidthError:
    return WidthError(
        f"direction at '{direction.site}' is not a vector",
        expected="the shape [width]",
        found=list(direction.vector.shape),
        remedy="make one Direction of each row",
    )


def _zero_error(direction: Direction) -> ConfigError:
    return ConfigError(
        f"direction at '{direction.site}' is zero",
        expected="a vector with a length",
        found=f"|v| = 0 over {len(direction.vector)} entries",
        remedy="the two classes have the same mean here: choose another site or span",
    )


def _metric_error(direction: Direction, name: str) -> ConfigError:
    return ConfigError(
        f"'{name}' of the direction at '{direction.site}' was not measured",
        expected="a direction that steer.extract made",
        found=f"one by '{direction.method}' with {', '.join(direction.metrics) or 'no metrics'}",
        remedy="choose site and strength yourself, or extract the direction here",
    )


def _kinds_error(directions: Directions, kinds: Mapping[str, Direction]) -> ConfigError:
    return ConfigError(
        f"directions of '{directions.name}' were judged in different ways",
        expected="all of them on unseen groups, or none",
        found=f"{kinds['groups'].site} on groups, {kinds['texts'].site} on texts of groups that it may have seen",
        remedy="extract all of them from one contrast set, or choose a site yourself",
    )


def _seen_error(what: str, seen: int) -> ContrastError:
    return ContrastError(
        f"{what} use texts that the direction was made from",
        expected="texts that it has not seen",
        found=f"{seen} that it has",
        remedy="split the texts before you extract: `made_of, rest = contrast.split(0.5, seed)`, and give the rest here",
    )


def _site_twice_error(name: str, first: Direction, second: Direction) -> ConfigError:
    return ConfigError(
        f"'{name}' has two directions at '{second.site}'",
        expected="one direction per site",
        found=f"one by '{first.method}' and one by '{second.method}'",
        remedy="leave one out, or make Directions of each",
    )


def _unread_error(directions: Directions, site: Site | str) -> SiteError:
    return SiteError(
        f"'{directions.name}' was not read at '{site}'",
        expected=f"one of {', '.join(map(str, directions.entries))}",
        found=str(site),
        remedy="choose one of these, or name that site too when you extract",
    )
