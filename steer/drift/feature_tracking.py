"""What a tracker does with dictionary features: reads them in probe mode and in stream mode, beside random ones, and their dictionaries."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from steer.drift.accumulators import Reduce
from steer.drift.feature_groups import FeatureGroup, FeaturesLike, feature_groups
from steer.drift.feature_measurement import DictionaryMeasurement, FeatureMeasurement
from steer.drift.feature_sums import DictionarySums, FeatureSums, TextFeatures
from steer.drift.measurement import Measurement
from steer.drift.probe import undisturbed
from steer.drift.records import DriftRecord
from steer.drift.stream import StreamMask, under
from steer.features.provenance import Untrained
from steer.intervene.low_rank import without_autocast
from steer.model.accumulator import Accumulator
from steer.model.capture import capture
from steer.model.context import ForwardContext
from steer.model.hooks import HookFunction
from steer.model.site import Site
from steer.model.span import span_of
from steer.model.tokens import Row

FVU_RISE = 0.25  # of what was left unexplained at the baseline, and
LEAST_FVU_RISE = 0.05  # of the variance: a dictionary is warned of that leaves so much more,
LEAST_TOKENS = 256  # measured on so many tokens; the FVU of a few depends on which they are


class FeatureReader:
    """Stream mode: reads the features of a group during training; never changes the activation. It counts what `StreamReader` counts.

    The dictionary as a whole is read in the first pass of each window alone, since that takes all of its rows.

    Attributes:
        window, baseline: sums since the last check, of this rank, and of the first window, over all ranks.
        quality, quality_baseline: the same of the dictionary; None where another group measures it.
    """

    def __init__(self, group: FeatureGroup) -> None:
        self.group = group
        self.mask = StreamMask(group.site)
        self.window = FeatureSums(len(group.names))
        self.baseline: FeatureSums | None = None
        self.quality = DictionarySums(group.dictionary) if group.measures_dictionary else None
        self.quality_baseline: DictionarySums | None = None
        self._quality_is_due = True

    def __call__(self, h: Tensor, context: ForwardContext) -> None:
        """Hook function: adds the response tokens of h [batch, tokens, width] to the window."""
        mask = self.mask(h, context)
        if mask is None:
            return
        if self.window.on.device != h.device:  # Lightning moves the model after the attach
            self.move(h.device)
        with torch.no_grad(), without_autocast(h):
            h = h.detach()
            untrained = self.group.dictionary.untrained
            mask = _trained(h, mask, untrained, context.positions if untrained.first else None)
            self.window.update(self.group.encode(h), mask)
            if self.quality is not None:
                self._read_dictionary(h, mask)

    @torch.compiler.disable  # compiled code would depend on what is read in the first pass of a window alone
    def _read_dictionary(self, h: Tensor, mask: Tensor) -> None:
        if self.quality is not None and self._quality_is_due and len(tokens := h[mask]):  # the first pass that has any
            self.quality.update(tokens)
            self._quality_is_due = False

    def move(self, device: torch.device) -> None:
        """Moves the sums to a device."""
        self.window = self.window.to(device)
        if self.quality is not None:
            self.quality = self.quality.to(device)

    def close_window(self, reduce: Reduce) -> Iterator[Measurement]:
        """Measures the window that ends here, over all ranks; nothing when it has no token. The next window starts empty."""
        window = self.window.reduced(reduce)
        quality = None if self.quality is None else self.quality.reduced(reduce)
        self.reset()
        if int(window.moments.n) == 0:
            return
        self.baseline = self.baseline or window
        yield FeatureMeasurement.of_windows(self.group, window, self.baseline)
        if quality is not None:
            self.quality_baseline = self.quality_baseline or quality
            yield DictionaryMeasurement.of_sums(self.group, "stream", quality, self.quality_baseline)

    def reset(self) -> None:
        """Begins a window."""
        self.window.reset()
        if self.quality is not None:
            self.quality.reset()
        self._quality_is_due = True

    def state_dict(self, reduce: Reduce) -> dict[str, Tensor]:
        """Windows over all ranks, and baselines."""
        parts: dict[str, FeatureSums | DictionarySums | None] = {"window": self.window.reduced(reduce), "baseline": self.baseline}
        if self.quality is not None:
            parts |= {"quality": self.quality.reduced(reduce), "quality_baseline": self.quality_baseline}
        state = {f"{part}/{name}": t for part, sums in parts.items() if sums is not None for name, t in sums.state_dict().items()}
        return state | {"quality_is_due": torch.tensor(self._quality_is_due)}

    def load_state_dict(self, state: Mapping[str, Tensor], main: bool) -> None:
        """Takes over a saved state; its window goes to the main rank alone, since it is the sum over all of them."""
        self.reset()
        self.baseline = self.quality_baseline = None
        if main and state:
            self.window.load_state_dict(under("window/", state))
        if baseline := under("baseline/", state):
            self.baseline = FeatureSums(len(self.group.names))
            self.baseline.load_state_dict(baseline)
        if self.quality is not None and state:
            if main:
                self.quality.load_state_dict(under("quality/", state))
            if baseline := under("quality_baseline/", state):
                self.quality_baseline = DictionarySums(self.group.dictionary)
                self.quality_baseline.load_state_dict(baseline)
        self._quality_is_due = bool(state.get("quality_is_due", True))


class _ProbeReading:
    """Accumulator of `capture`: a group of features in each text, and its dictionary over all of them."""

    def __init__(self, group: FeatureGroup, starts: Tensor) -> None:
        self.group = group
        self.starts = starts  # [texts] first token of each span
        self.texts = TextFeatures(len(starts), len(group.names))
        self.quality = DictionarySums(group.dictionary) if group.measures_dictionary else None

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        h = h.detach()
        mask = weight > 0
        positions = mask.cumsum(1) - 1 + self.starts[rows].to(h.device)[:, None]
        mask = _trained(h, mask, self.group.dictionary.untrained, positions)
        self.texts.add(self.group.encode(h), mask, rows)
        if self.quality is not None:
            if self.quality.on.device != h.device:
                self.quality = self.quality.to(h.device)
            self.quality.update(h[mask])


class _Several:
    """Accumulator of one site that hands everything on to several."""

    def __init__(self, accumulators: Sequence[Accumulator]) -> None:
        self.accumulators = accumulators

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        for accumulator in self.accumulators:
            accumulator.update(h, weight, rows)


class FeatureTracking:
    """The features of a tracker.

    Args:
        features: name -> (dictionary, features), or `TrackedFeatures`.
        probe: the texts; empty for stream mode alone.
        span: which tokens of them are read.

    Attributes:
        groups: the features with their random ones.
        readers: of stream mode, a reader a group; empty without it.
        baseline: of probe mode, by name of the group; empty before the first measurement.
        quality_baseline: of the dictionaries likewise.
    """

    def __init__(
        self, features: Mapping[str, FeaturesLike], *, controls: int, seed: int, probe: Sequence[Row], span: str | int, stream: bool
    ) -> None:
        self.groups = feature_groups(features, controls, seed)
        self.probe = list(probe)
        self.span = span
        self.seed = seed
        self.readers = [FeatureReader(group) for group in self.groups] if stream else []
        self.baseline: dict[str, TextFeatures] = {}
        self.quality_baseline: dict[str, DictionarySums] = {}
        self._warned: set[tuple[str, str]] = set()

    @property
    def sites(self) -> list[Site]:
        """A site for each group."""
        return [group.site for group in self.groups]

    def hooks(self) -> list[HookFunction]:
        """What reads the training passes, in the order of `sites`."""
        return [reader for reader in self.readers]  # a list of the protocol's type

    def measure_probe(self, model: nn.Module) -> list[Measurement]:
        """Runs the texts through the model as it is now; the first call is the baseline. Raises NonFiniteError."""
        if not self.groups or not self.probe:
            return []
        starts = torch.tensor([span_of(row, self.span)[0] for row in self.probe])
        readings = [_ProbeReading(group, starts) for group in self.groups]
        by_site: dict[Site, list[Accumulator]] = {}
        for reading in readings:
            by_site.setdefault(reading.group.site, []).append(reading)
        with undisturbed(model):
            capture(model, self.probe, {site: _Several(of_site) for site, of_site in by_site.items()}, span=self.span)
        measured: list[Measurement] = []
        for reading in readings:
            group = reading.group
            texts = self.baseline.setdefault(group.name, reading.texts)
            measured.append(FeatureMeasurement.of_texts(group, reading.texts, texts, self.seed))
            if reading.quality is not None:
                quality = reading.quality.to(torch.device("cpu"))
                before = self.quality_baseline.setdefault(group.name, quality)
                measured.append(DictionaryMeasurement.of_sums(group, "probe", quality, before))
        return measured

    def close_windows(self, reduce: Reduce) -> list[Measurement]:
        """What the training passes since the last call gave, over all ranks."""
        return [measured for reader in self.readers for measured in reader.close_window(reduce)]

    def warn(self, records: Sequence[DriftRecord]) -> None:
        """Warns, once a dictionary and mode, where a dictionary no longer explains the model."""
        for record in records:
            key = (record.direction, record.mode)
            if record.kind != "dictionary" or key in self._warned or record.n < LEAST_TOKENS:
                continue
            change = record.metrics["fvu_change"]
            if change > max(LEAST_FVU_RISE, FVU_RISE * (record.metrics["fvu"] - change)):
                self._warned.add(key)
                warnings.warn(_explains_less(record), stacklevel=3)

    def digest(self) -> list[object]:
        """What tells these features from others, JSON-able; empty without any."""
        tracked = [(each.direction, each.site, each.sha256) for group in self.groups for each in group.tracked()]
        ids = hashlib.sha256(json.dumps([row.ids for row in self.probe]).encode()).hexdigest()
        return [tracked, ids, self.span, bool(self.readers)] if tracked else []

    def reset(self) -> None:
        """Forgets all measurements."""
        self.load_state_dict({}, main=False)
        self._warned = set()

    def state_dict(self, reduce: Reduce) -> dict[str, Tensor]:
        """Everything an exact resume needs, as a flat dictionary."""
        state: dict[str, Tensor] = {}
        for name, texts in self.baseline.items():
            state |= {f"features/{name}/probe/{key}": tensor for key, tensor in texts.state_dict().items()}
        for name, sums in self.quality_baseline.items():
            state |= {f"features/{name}/dictionary/{key}": tensor for key, tensor in sums.state_dict().items()}
        for reader in self.readers:
            state |= {f"features/{reader.group.name}/stream/{key}": tensor for key, tensor in reader.state_dict(reduce).items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], main: bool) -> None:
        """Goes on from a saved state."""
        self.baseline, self.quality_baseline = {}, {}
        for group in self.groups:
            if texts := under(f"features/{group.name}/probe/", state):
                self.baseline[group.name] = TextFeatures.from_state(texts)
            if sums := under(f"features/{group.name}/dictionary/", state):
                self.quality_baseline[group.name] = DictionarySums(group.dictionary)
                self.quality_baseline[group.name].load_state_dict(sums)
        for reader in self.readers:
            reader.load_state_dict(under(f"features/{reader.group.name}/stream/", state), main)


def _trained(h: Tensor, mask: Tensor, untrained: Untrained, positions: Tensor | None) -> Tensor:
    """[batch, tokens] the tokens of a mask that the dictionary was trained on."""
    inside = untrained.trained_on(h, positions)
    return mask if inside is None else mask & inside


def _explains_less(record: DriftRecord) -> str:
    fvu, change = record.metrics["fvu"], record.metrics["fvu_change"]
    return (
        f"the dictionary of '{record.direction}' at '{record.site}' explains the model less well than at the baseline (step {record.step}, "
        f"{record.mode} mode): {fvu:.2f} of the variance is left over, {fvu - change:.2f} were. Its features may no longer mean what they "
        "meant; do not read their changes by their names, or train a dictionary on this model"
    )
