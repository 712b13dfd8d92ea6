"""Stage comparison: which of all features of a dictionary moved between two checkpoints, text by text, corrected for their number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.drift.feature_groups import of_one_read_site
from steer.drift.feature_sums import TILE, DictionarySums
from steer.drift.probe import undisturbed
from steer.drift.stage_tests import StageTests, sign_flips_of_features
from steer.errors import ConfigError
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.dictionary import Dictionary
from steer.model.capture import capture
from steer.model.span import span_of
from steer.model.tokens import Row

LEAST_TEXTS = 6  # below that no sign-flip test gives p < 0.05


class TextMeans:
    """Mean activation of every feature in every text, kept where it is not 0: a text has few of all features.

    Attributes:
        places: [entries] text * width + feature, in ascending order. means: [entries] fp32.
        counts: [texts] tokens that the dictionary was trained on.
        quality: sums over all tokens, of the dictionary.
        read: SHA-256 of the tokens that were read.
    """

    def __init__(self, dictionary: SparseAutoencoder, starts: Tensor, read: str = "") -> None:
        self.dictionary, self.read = dictionary, read
        self.starts = starts
        self.counts = torch.zeros(len(starts))
        self.quality = DictionarySums(dictionary)
        self._entries: list[tuple[Tensor, Tensor]] = []

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        """Takes a batch of `capture`, one text and a tile of tokens at a time."""
        h = h.detach()
        if self.quality.on.device != h.device:
            self.quality = self.quality.to(h.device)
        mask = weight > 0
        positions = mask.cumsum(1) - 1 + self.starts[rows].to(h.device)[:, None]
        inside = self.dictionary.untrained.trained_on(h, positions)
        mask = mask if inside is None else mask & inside
        for place, row in enumerate(rows.tolist()):
            tokens = h[place][mask[place]]  # [tokens, width]
            self.counts[row] = len(tokens)
            total = torch.zeros(self.dictionary.width, device=h.device)
            for part in tokens.split(max(1, TILE // self.dictionary.width)):
                total += self.quality.encoded(part).sum(0)
            on = total.nonzero()[:, 0]
            self._entries.append(((row * self.dictionary.width + on).cpu(), (total[on] / max(len(tokens), 1)).cpu()))

    def finish(self) -> None:
        """Puts the texts in order."""
        places = torch.cat([places for places, _ in self._entries])
        order = places.argsort()
        self.places, self.means = places[order], torch.cat([means for _, means in self._entries])[order]
        self._entries = []
        self.quality = self.quality.to(torch.device("cpu"))

    def columns(self, features: slice, texts: Tensor) -> Tensor:
        """[texts, features] fp64 of a run of features, 0 where they are off. texts: indices of those that are wanted."""
        width = self.dictionary.width
        feature = self.places % width
        chosen = (feature >= features.start) & (feature < features.stop)
        dense = torch.zeros(len(self.counts), features.stop - features.start, dtype=torch.float64)
        dense[self.places[chosen] // width, feature[chosen] - features.start] = self.means[chosen].double()
        return dense[texts]


@dataclass(frozen=True, eq=False)
class StageComparison:
    """Every feature of a dictionary at two stages of a model, compared text by text.

    Attributes:
        dictionary: whose features these are.
        texts: number of texts that were compared.
        alpha: level of `moved`, of the intervals and of `by_chance`.
        mean_a, mean_b: [width] mean activation over texts at either stage, texts counting alike.
        tests: what the tests gave, see `StageTests`.
        quality_a, quality_b: how well the dictionary explains either stage.

    Example:
        >>> comparison = steer.compare_features(dictionary, base, tuned, rows, draws=999)
        >>> comparison.moved, comparison.change[3], comparison.intervals[:, 3]
    """

    dictionary: Dictionary
    texts: int
    alpha: float
    mean_a: Tensor
    mean_b: Tensor
    tests: StageTests
    quality_a: DictionarySums
    quality_b: DictionarySums

    def __repr__(self) -> str:
        return f"StageComparison({len(self.moved)} of {self.tested} features moved, {self.texts} texts, {self.dictionary})"

    @property
    def change(self) -> Tensor:
        """[width] mean activation at the second stage minus that at the first."""
        return self.mean_b - self.mean_a

    @property
    def tested(self) -> int:
        """Number of features that are on in any text at either stage; the others cannot have moved."""
        return int(self.tests.tested.sum())

    @property
    def effect(self) -> Tensor:
        """[width] `change` / standard deviation of the change over texts; 0 where nothing changed."""
        return torch.where(self.change == 0, 0.0, self.change / self.tests.sd)

    @property
    def moved(self) -> list[int]:
        """Features whose p, corrected for the number of features, is at most alpha; the largest |effect| first."""
        found = (self.tests.p_adjusted <= self.alpha).nonzero()[:, 0]
        return found[self.effect[found].abs().argsort(descending=True, stable=True)].tolist()

    @property
    def intervals(self) -> Tensor:
        """[2, width] of the change, which hold together for all features at 1 - alpha: one leaves out 0 where the feature moved."""
        half = self.tests.critical_t * self.tests.sd / self.texts**0.5
        return torch.stack([self.change - half, self.change + half])

    @property
    def uncorrected(self) -> int:
        """Number of features with p <= alpha before any correction."""
        return int((self.tests.p <= self.alpha).sum())

    @property
    def by_chance(self) -> float:
        """Number of features with p <= alpha that chance alone would give, on average over the sign flips."""
        return self.tests.by_chance

    def table(self, most: int = 20) -> list[dict[str, float]]:
        """The features that moved most, a dictionary of numbers each: those of `moved`, then others by p."""
        listed = self.moved
        rest = [i for i in self.tests.p.nan_to_num(2.0).argsort(stable=True).tolist() if self.tests.tested[i]]
        order = [*listed, *(i for i in rest if i not in set(listed))][:most]
        low, high = self.intervals
        columns = {
            "mean_a": self.mean_a,
            "mean_b": self.mean_b,
            "change": self.change,
            "low": low,
            "high": high,
            "effect": self.effect,
            "texts_changed": self.tests.changed,
            "p": self.tests.p,
            "q": self.tests.q,
            "p_adjusted": self.tests.p_adjusted,
        }
        return [{"feature": i, **{name: float(column[i]) for name, column in columns.items()}} for i in order]

    def summary(self) -> str:
        """What was found in words, with what chance would give, and whether the dictionary still explains the model."""
        a, b = self.quality_a, self.quality_b
        level = f"p <= {self.alpha:g}"
        return (
            f"{len(self.moved)} of {self.tested} features moved ({level} by max-T over all of them, {self.texts} texts; by chance one or "
            f"more in {100 * self.alpha:g} % of comparisons). Before correction: {self.uncorrected} with {level}, {self.by_chance:.1f} "
            f"by chance. The dictionary leaves {float(b.fvu):.3f} of the variance over, {float(a.fvu):.3f} at the first stage; "
            f"{float(b.l0):.1f} features are on at a token, {float(a.l0):.1f} were."
        )


def text_means(dictionary: Dictionary, model: nn.Module, texts: Sequence[Row], *, span: str | int = "all") -> TextMeans:
    """Reads every feature of a dictionary in every text, for `compare_text_means`. The model may be freed or changed afterwards.

    Memory grows with the features that are on in a text, not with the width of the dictionary times the tokens.

    Args:
        dictionary: one that reads one site.
        model: as `Plan.attach` takes it.
        texts: tokenised, the same for both stages.
        span: which tokens are read; those that the dictionary was not trained on are left out.

    Example:
        >>> before = steer.drift.text_means(dictionary, base, rows)
        >>> after = steer.drift.text_means(dictionary, tuned, rows)
        >>> steer.drift.compare_text_means(before, after).moved  # features, the largest effect first
    """
    own = of_one_read_site("a stage comparison", dictionary)
    spans = [span_of(row, span) for row in texts]
    read = hashlib.sha256(json.dumps([(row.ids, of_row) for row, of_row in zip(texts, spans, strict=True)]).encode()).hexdigest()
    means = TextMeans(own, torch.tensor([start for start, _ in spans]), read)
    with undisturbed(model):
        capture(model, texts, {own.reads[0]: means}, span=span)
    means.finish()
    return means


def compare_text_means(a: TextMeans, b: TextMeans, *, alpha: float = 0.05, draws: int = 9999, seed: int = 0) -> StageComparison:
    """Compares what `text_means` gave at two stages; arguments and errors as of `compare_features`.

    Args:
        a, b: readings of the same texts by the same dictionary.
        alpha, draws: as of `compare_features`.

    Raises:
        ConfigError: readings that cannot be compared, too few texts, or no level.

    Example:
        >>> before, after = (steer.drift.text_means(dictionary, stage, rows) for stage in (base, tuned))
        >>> print(steer.drift.compare_text_means(before, after, draws=999).summary())
    """
    if a.dictionary is not b.dictionary or a.read != b.read:
        raise _unpaired(a, b)
    if not 0 < alpha < 1:
        raise _no_level(alpha)
    used = ((a.counts > 0) & (b.counts > 0)).nonzero()[:, 0]
    if len(used) < LEAST_TEXTS:
        raise _few_texts(len(used))
    means = torch.zeros(2, a.dictionary.width, dtype=torch.float64)

    def differences(features: slice) -> tuple[Tensor, Tensor]:
        of_a, of_b = a.columns(features, used), b.columns(features, used)
        means[:, features] = torch.stack([of_a.mean(0), of_b.mean(0)])
        return of_b - of_a, ((of_a != 0) | (of_b != 0)).any(0)

    tests = sign_flips_of_features(differences, a.dictionary.width, len(used), alpha=alpha, draws=draws, seed=seed)
    return StageComparison(a.dictionary, len(used), alpha, means[0], means[1], tests, a.quality, b.quality)


def compare_features(
    dictionary: Dictionary,
    stage_a: nn.Module,
    stage_b: nn.Module,
    texts: Sequence[Row],
    *,
    span: str | int = "all",
    alpha: float = 0.05,
    draws: int = 9999,
    seed: int = 0,
) -> StageComparison:
    """Tells which of all features of a dictionary moved between two checkpoints of a model.

    Both stages read the same texts. A feature is compared by its mean activation in each text, so that tokens of one text count as one
    observation. Most differences of most features are 0; the sign-flip test takes that as it is, since a difference of 0 has no sign, where
    a t-test of so few others would be wrong. The correction for their number is the largest statistic of all features under each pattern of
    signs (max-T, Westfall and Young 1993): features that go together count together.

    Args:
        dictionary: one that reads one site, an autoencoder or a transcoder, the same for both stages.
        stage_a, stage_b: the models. Where there is room for one, use `text_means` and `compare_text_means`.
        texts: six or more, none of those that the model was trained on; more texts find smaller changes.
        span: which tokens are read.
        alpha: family-wise error rate.
        draws: random sign patterns; all patterns up to 14 texts.

    Raises:
        ConfigError: a dictionary of several sites, too few texts, alpha that is no level. Otherwise as `steer.capture`.

    Example:
        >>> comparison = steer.compare_features(dictionary, base, tuned, rows)
        >>> print(comparison.summary(), comparison.table(10))
    """
    of_type(dictionary, Dictionary, "the dictionary", "load one with steer.load_dictionary")
    readings = [text_means(dictionary, model, texts, span=span) for model in (stage_a, stage_b)]
    return compare_text_means(*readings, alpha=alpha, draws=draws, seed=seed)


# ---- errors


def _few_texts(count: int) -> ConfigError:
    return ConfigError(
        "too few texts for a stage comparison",
        expected=f"{LEAST_TEXTS} or more with tokens that the dictionary was trained on",
        found=count,
        remedy="give more texts; some hundreds find changes of half a standard deviation among thousands of features",
    )


def _no_level(alpha: float) -> ConfigError:
    return ConfigError("alpha of a stage comparison is no level", expected="between 0 and 1", found=alpha, remedy="pass alpha=0.05")


def _unpaired(a: TextMeans, b: TextMeans) -> ConfigError:
    same = "one dictionary" if a.dictionary is b.dictionary else "two dictionaries"
    texts = f"{len(a.counts)} and {len(b.counts)} texts"
    if a.dictionary is b.dictionary and len(a.counts) == len(b.counts):
        texts = f"{texts} with other tokens, or another span of them"
    return ConfigError(
        "two readings of features cannot be compared",
        expected="readings of the same texts by the same dictionary object",
        found=f"{texts}, {same}",
        remedy="call text_means for both stages with the same dictionary and texts",
    )
