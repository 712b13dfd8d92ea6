"""FoundFeatures: what a search has chosen for each concept, with the scores on development text and on other text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steer.checks import of_type
from steer.errors import ConfigError, DamagedFileError, did_you_mean
from steer.files import atomic_write, load_artifact, save_artifact
from steer.lens.plot import matplotlib_module

KIND = "found_features"
Number = float | None  # None where there is no score


@dataclass(frozen=True)
class FoundFeature:
    """A feature that was chosen for a concept.

    Attributes:
        rank: among the chosen ones of its concept, from 1, by development text.
        development, report: scores by column, on the text that it was chosen by and on other text; None where there is none.

    Example:
        >>> found = steer.find_features(model, dictionary, {"it or us": labelled}, tokenizer=tokenizer)
        >>> best = found.of("it or us")[0]
        >>> best.feature, best.development, best.report  # its scores on the text it was chosen by, and on other text
    """

    concept: str
    feature: int
    rank: int
    development: dict[str, Number]
    report: dict[str, Number] = field(default_factory=dict)

    @property
    def maximum(self) -> Number:
        """Its largest value on development text, or on the other text where the search did not look at values."""
        return self.development.get("maximum", self.report.get("maximum"))


@dataclass(frozen=True)
class FoundFeatures:
    """The features that a search has chosen, best first, of every concept that was tried.

    Attributes:
        by: name of the search. measure: column that ranked the features.
        concepts: all that were tried, in the order in which they were given.
        features: of all concepts.
        facts: sizes of the texts, number of features that were compared, the dictionary and the model; JSON-able.

    Example:
        >>> found = steer.find_features(model, dictionary, {"it or us": labelled}, tokenizer=tokenizer)
        >>> found.best("it or us")  # a feature
    """

    by: str
    measure: str
    concepts: tuple[str, ...]
    features: tuple[FoundFeature, ...]
    facts: dict[str, Any]

    def of(self, concept: str) -> list[FoundFeature]:
        """Those of a concept, best on development text first. Raises ConfigError for a concept that was not tried."""
        if concept not in self.concepts:
            raise _not_tried(concept, self.concepts)
        return [found for found in self.features if found.concept == concept]

    def best(self, concept: str) -> int:
        """The feature that was best on development text. Raises ConfigError as `of`, and where no feature has a score."""
        found = self.of(concept)
        if not found:
            raise _none_found(concept)
        return found[0].feature

    def __repr__(self) -> str:
        best = ", ".join(f"{name}: {self.of(name)[0].feature if self.of(name) else 'none'}" for name in self.concepts[:6])
        more = f", and {len(self.concepts) - 6} more" if len(self.concepts) > 6 else ""
        return f"FoundFeatures(by {self.by}, {best}{more})"

    def __str__(self) -> str:
        console = Console(width=140, no_color=True)
        with console.capture() as printed:
            console.print(self.table())
        return printed.get()

    def table(self) -> Table:
        """A table for a terminal: the measure on both texts, and what else is known of each feature."""
        compared = self.facts.get("compared")
        title = f"features by {self.by}" + (f", best of {compared:,}" if isinstance(compared, int) else "")
        further = [name for name in _columns(self.features) if name != self.measure]
        table = Table("concept", "feature", f"{self.measure}, development", f"{self.measure}, report", *further, title=title)
        for concept in self.concepts:
            found = self.of(concept)
            for one in found:
                values = {**one.development, **one.report}
                measured = (one.development.get(self.measure), one.report.get(self.measure), *(values.get(name) for name in further))
                table.add_row(Text(concept), str(one.feature), *map(_number, measured))
            if not found:
                table.add_row(Text(concept), "none", *[""] * (2 + len(further)))
        return table

    def save(self, path: str | Path) -> Path:
        """Writes it, sealed. Raises as `save_artifact`."""
        manifest = {"by": self.by, "measure": self.measure, "concepts": list(self.concepts), "facts": self.facts}
        indices = torch.tensor([found.feature for found in self.features], dtype=torch.long)
        return save_artifact(path, KIND, {"features": indices}, {**manifest, "found": [asdict(found) for found in self.features]})

    @classmethod
    def load(cls, path: str | Path) -> FoundFeatures:
        """Reads it. Raises as `load_artifact`. DamagedFileError: no found features in it."""
        manifest, _ = load_artifact(path, KIND)
        try:
            found = tuple(FoundFeature(**one) for one in manifest["found"])
            return cls(manifest["by"], manifest["measure"], tuple(manifest["concepts"]), found, manifest["facts"])
        except (KeyError, TypeError) as error:
            raise _damaged(Path(path), error) from error

    def plot(self, path: str | Path | None = None) -> Any:
        """A figure of each concept's chosen features: the measure on development text and on other text. Needs matplotlib.

        Raises:
            ConfigError: matplotlib is missing.
        """
        figure_module = matplotlib_module("matplotlib.figure")
        figure = figure_module.Figure(figsize=(6.4, 0.34 * max(len(self.concepts), 2) + 1.2), layout="constrained")
        ax = figure.subplots()
        for place, concept in enumerate(self.concepts):
            for one in self.of(concept):
                values = one.development.get(self.measure), one.report.get(self.measure)
                alpha = 1.0 if one.rank == 1 else 0.35
                for value, marker, label in zip(values, ("o", "D"), ("development", "report"), strict=True):
                    if value is not None:
                        face = "none" if marker == "o" else "C0"
                        ax.scatter(value, place, marker=marker, facecolors=face, edgecolors="C0", alpha=alpha, label=label, s=28)
        ax.set_yticks(range(len(self.concepts)), [name.replace("$", r"\$") for name in self.concepts])
        ax.invert_yaxis()
        ax.set_xlabel(self.measure.replace("_", " "))
        handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        ax.legend(handles.values(), handles.keys(), frameon=False, loc="best")
        if path is not None:
            import io

            buffer = io.BytesIO()
            figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "svg")
            atomic_write(path, buffer.getvalue())
        return figure


def numbers_of(scores: Mapping[str, Any], place: int) -> dict[str, Number]:
    """The scores of one feature, as Python's numbers; None for NaN."""
    values = {name: float(values[place]) for name, values in scores.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _columns(features: Sequence[FoundFeature]) -> list[str]:
    return list(dict.fromkeys(name for found in features for name in (*found.development, *found.report)))


def _number(value: Number) -> str:
    return "" if value is None else f"{value:.3g}"


# ---- errors


def _not_tried(concept: object, concepts: Sequence[str]) -> ConfigError:
    of_type(concept, str, "a concept", "pass its name")
    remedy = did_you_mean(str(concept), concepts) or "search for it first"
    return ConfigError(f"the concept '{concept}' was not tried", expected=", ".join(concepts), found=concept, remedy=remedy)


def _none_found(concept: str) -> ConfigError:
    return ConfigError(
        f"no feature was found for '{concept}'",
        expected="a feature with a score on development text",
        found="none",
        remedy="give more words or texts of the concept, or search by='activation'",
    )


def _damaged(path: Path, error: Exception) -> DamagedFileError:
    return DamagedFileError(
        f"{path} holds no found features", expected="what FoundFeatures.save writes", found=str(error), remedy="search again"
    )
