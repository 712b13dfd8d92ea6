"""Measurements of dictionary features, and of the dictionary itself, from which drift metrics are computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from scipy.stats import t as student
from torch import Tensor

from steer.drift.feature_groups import FeatureGroup
from steer.drift.feature_sums import DictionarySums, FeatureSums, TextFeatures
from steer.drift.measurement import Measurement

LEVEL = 0.95  # of the intervals


@dataclass(frozen=True, eq=False)
class FeatureFigures:
    """Statistics of k features at one time; fp64 on the CPU.

    Attributes:
        mean, sd: [k] of the activation over texts (probe) or tokens (stream); 0 counts where a feature is off.
        density: [k] share of tokens with the feature on; in probe mode the mean over texts of each one's share.
        mean_on: [k] activation where it is on; nan where it never is.
        maximum: [k] largest activation.
        errors: [2, k] standard errors of mean and density, rows of batches being what varies; nan in probe mode, which compares texts.
        texts: number of texts (probe) or rows of batches (stream).
    """

    mean: Tensor
    sd: Tensor
    density: Tensor
    mean_on: Tensor
    maximum: Tensor
    errors: Tensor
    texts: int

    @classmethod
    def of_texts(cls, texts: TextFeatures, used: Tensor) -> FeatureFigures:
        """Probe mode. used: [texts] bool."""
        means, shares = _per_text(texts, used)
        sums, on = texts.sums[used].sum(0), texts.on[used].sum(0)
        nothing = torch.full((2, len(on)), torch.nan, dtype=torch.float64)
        maximum = texts.maximum[used].amax(0) if bool(used.any()) else torch.full_like(on, torch.nan)
        return cls(means.mean(0), means.std(0), shares.mean(0), sums / on, maximum, nothing, int(used.sum()))

    @classmethod
    def of_tokens(cls, sums: FeatureSums) -> FeatureFigures:
        """Stream mode."""
        n, texts = sums.moments.n, sums.texts
        ratios = torch.stack([sums.moments.mean, sums.on / n])  # [2, k]
        # sum over rows of (sum of the row - ratio * its size)^2: rows of one text, whose tokens are alike, count as one
        squares = sums.squares - 2 * ratios * sums.products + ratios.square() * sums.squared_sizes
        errors = (squares.clamp_min(0) * texts / (texts - 1)).sqrt() / n
        mean_on = n * sums.moments.mean / sums.on
        return cls(sums.moments.mean, sums.moments.sd, ratios[1], mean_on, sums.maximum, errors, int(texts))

    def copy(self) -> FeatureFigures:
        """The same with tensors of its own."""
        tensors = {name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return FeatureFigures(texts=self.texts, **tensors)


@dataclass(frozen=True, eq=False)
class FeatureMeasurement(Measurement):
    """Features of one group, now and at the baseline. Columns: the named features first, then the random ones.

    Attributes:
        tracked: the group.
        now, baseline: see `FeatureFigures`.
        text_changes: [2, texts, features] change of each text's mean activation and density; probe mode.
    """

    of: ClassVar[str] = "feature"

    tracked: FeatureGroup
    mode: str
    n: int
    now: FeatureFigures
    baseline: FeatureFigures
    seed: int = 0
    text_changes: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_texts(cls, group: FeatureGroup, texts: TextFeatures, baseline: TextFeatures, seed: int) -> FeatureMeasurement:
        """Probe mode: the texts that have a token that the dictionary was trained on, now and at the baseline."""
        used = (texts.counts > 0) & (baseline.counts > 0)
        changes = torch.stack(_per_text(texts, used)) - torch.stack(_per_text(baseline, used))
        readings = (FeatureFigures.of_texts(texts, used), FeatureFigures.of_texts(baseline, used))
        return cls(group, "probe", int(used.sum()), *readings, seed, changes)

    @classmethod
    def of_windows(cls, group: FeatureGroup, window: FeatureSums, baseline: FeatureSums) -> FeatureMeasurement:
        """Stream mode: from the sums of a window and of the first one."""
        now, before = FeatureFigures.of_tokens(window), FeatureFigures.of_tokens(baseline)
        if window is baseline:  # a window does not differ from itself by chance
            now = before = replace(now, errors=torch.zeros_like(now.errors))
        return cls(group, "stream", int(window.moments.n), now, before)

    @property
    def mean(self) -> Tensor:
        """[features]"""
        return self.now.mean

    @property
    def sd(self) -> Tensor:
        """[features]"""
        return self.now.sd

    @property
    def spread(self) -> Tensor:
        """[features], root mean square of the spreads before and now: a feature that was silent before has none of then."""
        return ((self.now.sd.square() + self.baseline.sd.square()) / 2).sqrt()

    @property
    def differences(self) -> Tensor:
        """[texts, features] mean activation of each text now minus its own at the baseline; probe mode."""
        assert self.text_changes is not None
        return self.text_changes[0]

    @cached_property
    def changes(self) -> Tensor:
        """[2, features] of mean activation and density."""
        if self.text_changes is not None:
            return self.text_changes.mean(1)
        return torch.stack([self.now.mean - self.baseline.mean, self.now.density - self.baseline.density])

    @cached_property
    def interval(self) -> Tensor:
        """[2 ends, 2, features], 95 % interval of `changes`: by texts, paired, in probe mode; by rows of batches in stream mode."""
        if self.text_changes is not None:
            count = self.text_changes.shape[1]
            error = self.text_changes.std(1) / max(count, 1) ** 0.5
        else:
            count = min(self.now.texts, self.baseline.texts)
            error = (self.now.errors.square() + self.baseline.errors.square()).sqrt()
        half = error * float(student.ppf((1 + LEVEL) / 2, max(count - 1, 1)))
        return torch.stack([self.changes - half, self.changes + half])

    def copy(self) -> FeatureMeasurement:
        """The same with tensors of its own, into which a metric of somebody else's may write."""
        changes = None if self.text_changes is None else self.text_changes.clone()
        values = {name: value.clone() for name, value in self.values.items()}
        return replace(self, now=self.now.copy(), baseline=self.baseline.copy(), text_changes=changes, values=values)


@dataclass(frozen=True, eq=False)
class TrackedDictionary:
    """A dictionary as a measurement knows it: one column.

    Attributes:
        names: the name of the group that it is measured under.
    """

    names: tuple[str]
    site: object
    named_count: int = 1

    def kind(self, index: int) -> str:
        """`dictionary`"""
        return "dictionary"


@dataclass(frozen=True, eq=False)
class DictionaryMeasurement(Measurement):
    """A dictionary, now and at the baseline.

    Attributes:
        now, baseline: sums over the tokens of the probe texts, or of the first batch of a window.
    """

    of: ClassVar[str] = "dictionary"

    tracked: TrackedDictionary
    mode: str
    now: DictionarySums
    baseline: DictionarySums
    seed: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_sums(cls, group: FeatureGroup, mode: str, now: DictionarySums, baseline: DictionarySums) -> DictionaryMeasurement:
        """From the sums over all ranks."""
        return cls(TrackedDictionary((group.name,), group.site), mode, now, baseline)

    @property
    def n(self) -> int:
        """Number of tokens."""
        return int(self.now.tokens)

    def copy(self) -> DictionaryMeasurement:
        """The same with tensors of its own."""
        cpu = torch.device("cpu")
        values = {name: value.clone() for name, value in self.values.items()}
        return replace(self, now=self.now.to(cpu), baseline=self.baseline.to(cpu), values=values)


def _per_text(texts: TextFeatures, used: Tensor) -> tuple[Tensor, Tensor]:
    """[used, k] mean activation of each text, and share of its tokens with the feature on."""
    counts = texts.counts[used][:, None]
    return texts.sums[used] / counts, texts.on[used] / counts
