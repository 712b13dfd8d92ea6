"""FeatureReading: what was read of the features of a dictionary, one card for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.errors import ConfigError, DamagedFileError
from steer.features.reading.card import Example, FeatureCard
from steer.features.reading.explainer import Explainer, explainer_of
from steer.files import load_artifact, save_artifact

KIND = "feature_reading"
NEEDED = ("features", "density", "mean", "maximum", "histogram", "top_text", "top_values", "top_tokens", "spread_text")


@dataclass(frozen=True, eq=False)
class FeatureReading:
    """Features of a dictionary as `read_features` found them; `reading[12]` is the card of feature 12.

    Attributes:
        tensors: a row for each feature that was read. pieces: text of every token that is shown.
        facts: dictionary, model, sizes of the texts; JSON-able.
        names: of features, from an explainer. named_by: its description.

    Example:
        >>> reading = steer.read_features(model, dictionary, texts, tokenizer=tokenizer, features=[3, 40], context=16)
        >>> reading.explain("peak_words").save("reading")
        >>> steer.FeatureReading.load("reading")[3].name
    """

    tensors: Mapping[str, Tensor]
    pieces: Mapping[int, str]
    facts: Mapping[str, Any]
    names: Mapping[int, str] = field(default_factory=dict)
    named_by: str = ""

    def __repr__(self) -> str:
        named = f", {len(self.names)} named" if self.names else ""
        return f"FeatureReading({len(self)} of {self.facts['width']} features{named}, {self.facts['tokens']:,} tokens of text)"

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[FeatureCard]:
        return map(self.__getitem__, self.features)

    @cached_property
    def features(self) -> list[int]:
        """Those that were read, in their order."""
        return self.tensors["features"].tolist()

    @cached_property
    def _place(self) -> dict[int, int]:
        return {feature: place for place, feature in enumerate(self.features)}

    def __getitem__(self, feature: int) -> FeatureCard:
        """The card of a feature. Raises ConfigError for one that was not read."""
        if feature not in self._place:
            raise _not_read(self, feature)
        place, tensors = self._place[feature], self.tensors
        maximum, bins = float(tensors["maximum"][place]), tensors["histogram"].shape[1]
        edges = tuple(maximum * step / bins for step in range(bins + 1))
        nearest = zip(tensors["nearest"][place].tolist(), tensors["cosines"][place].tolist(), strict=True)
        return FeatureCard(
            feature,
            float(tensors["density"][place]),
            float(tensors["mean"][place]),
            maximum,
            (edges, tuple(tensors["histogram"][place].tolist())),
            (*self._examples("top", place), *self._examples("spread", place)),
            self._tokens("promoted", place),
            self._tokens("suppressed", place),
            tuple(nearest),
            self.names.get(feature),
        )

    def explain(
        self, explainer: str | Explainer | Callable[[FeatureCard], str], features: Iterable[int] | None = None, **settings: Any
    ) -> FeatureReading:
        """The same with names, which an explainer gives to features, or to a few of them. Others keep the name that they had.

        Args:
            explainer: a name of `EXPLAINERS` with its settings, an explainer, or a function that makes a name of a `FeatureCard`.

        Raises:
            ConfigError: an unknown explainer, or one that gives no text. JudgeError: a server that does not answer.
        """
        method = explainer_of(explainer, settings)
        names = dict(self.names)
        for feature in self.features if features is None else features:
            card = self[feature]
            if card.examples:  # nothing is known of a feature that was never on
                names[feature] = method.named(card)
        return FeatureReading(self.tensors, self.pieces, self.facts, names, method.described())

    def save(self, path: str | Path) -> Path:
        """Writes it, sealed. Raises as `save_artifact`."""
        manifest = {"facts": dict(self.facts), "named_by": self.named_by, "names": {str(key): name for key, name in self.names.items()}}
        pieces = [list(self.pieces), list(self.pieces.values())]
        return save_artifact(path, KIND, dict(self.tensors), {**manifest, "pieces": pieces})

    @classmethod
    def load(cls, path: str | Path) -> FeatureReading:
        """Reads it. Raises as `load_artifact`, and DamagedFileError for a file that lacks a part."""
        manifest, tensors = load_artifact(path, KIND)
        missing = [name for name in NEEDED if name not in tensors]
        try:
            if missing:
                raise KeyError(missing[0])
            pieces = dict(zip(*manifest["pieces"], strict=True))
            names = {int(key): name for key, name in manifest["names"].items()}
            return cls(tensors, pieces, manifest["facts"], names, manifest["named_by"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(Path(path), error) from error

    def _examples(self, kind: str, place: int) -> Iterator[Example]:
        tokens, values = self.tensors[f"{kind}_tokens"][place].tolist(), self.tensors[f"{kind}_values"][place].tolist()
        for text, window, of_window, largest in zip(
            self.tensors[f"{kind}_text"][place].tolist(), tokens, values, self.tensors[f"{kind}_value"][place].tolist(), strict=True
        ):
            if text < 0:
                continue
            inside = [i for i, token in enumerate(window) if token >= 0]
            peak = self._before - inside[0]
            shown = [of_window[i] for i in inside]
            shown[peak] = largest  # windows are kept with fewer bits
            yield Example(tuple(self.pieces[window[i]] for i in inside), tuple(shown), peak, kind == "top")

    @property
    def _before(self) -> int:
        return int(self.facts["before"])

    def _tokens(self, kind: str, place: int) -> tuple[tuple[str, float], ...]:
        if f"{kind}_ids" not in self.tensors:
            return ()
        ids, logits = self.tensors[f"{kind}_ids"][place].tolist(), self.tensors[f"{kind}_logits"][place].tolist()
        return tuple((self.pieces[token], logit) for token, logit in zip(ids, logits, strict=True))


# ---- errors


def _not_read(reading: FeatureReading, feature: object) -> ConfigError:
    few = ", ".join(map(str, reading.features[:5]))
    remedy = "read it too: read_features(..., features=[...])"
    return ConfigError(f"feature {feature!r} was not read", expected=f"one of {len(reading)}: {few}, ...", found=feature, remedy=remedy)


def _damaged(path: Path, error: Exception) -> DamagedFileError:
    expected = "what FeatureReading.save writes"
    return DamagedFileError(
        f"{path} holds no whole reading of features", expected=expected, found=str(error), remedy="read the features again"
    )
