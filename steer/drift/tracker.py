"""DriftTracker: measures directions and features while a model is trained, without a framework: call `measure` after optimiser steps."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.drift.accumulators import Reduce, identity
from steer.drift.feature_groups import FeatureGroup, FeaturesLike
from steer.drift.feature_tracking import FeatureTracking
from steer.drift.measurement import Measurement
from steer.drift.metric import THINGS, check_metrics, compute_metrics
from steer.drift.metric_names import check_metric_names
from steer.drift.probe import Probe
from steer.drift.records import DriftRecord, log_values, records_of
from steer.drift.site_directions import DirectionsLike, SiteDirections, TrackedDirection, as_list, directions_by_site
from steer.drift.stream import StreamReader, under
from steer.drift.writer import DriftWriter
from steer.errors import AttachError, ConfigError, WidthError
from steer.model import hooks
from steer.model.anatomy import Anatomy, HookPoint, resolve
from steer.model.restoring import restoring
from steer.model.site import Site
from steer.model.tokens import Row
from steer.reading import parse_json, place_of


class DriftTracker:
    """Measures projections of a model in training on named directions, and features of dictionaries, beside random ones of the same sites.

    Two modes, both by default when there are probe prompts:

    * probe: a forward pass over fixed prompts at each `measure`, in evaluation mode and without gradients, compared prompt by prompt with
      the first `measure`. A plan that acts in training only is off in it; one that also acts in validation is part of what is measured.
    * stream: the response tokens of the training batches, read by hooks as they pass, hence with a training plan's edits when the tracker
      is attached after the plan. A steered site tells little about behaviour: track other sites too.

    The metrics are those of `steer.drift.METRICS`. The controls are isotropic. Directions with the covariance of the states are not drawn:
    the metric `z_covariance` is their limit in closed form.

    Args:
        directions: name -> a direction, several of them, or a `Directions` (one concept at many sites).
        features: name -> (dictionary, features), of a dictionary that reads one site; `TrackedFeatures` gives the densities by which random
            features are matched, where the dictionary did not record them. The dictionary itself is measured too, under the same name.
        probe: tokenised prompts, at least two; None for stream mode alone. `p` is never below 2 / 2^prompts: six can show p < .05.
        controls: random directions per site, and random features per name; at least one for each feature.
        stream: read the training batches too.
        store: file of the records (see `steer.drift.store`), opened at the first measurement; None keeps none.
        seed: of the controls and of the sign flips.
        span: which tokens of a probe text are averaged, see `steer.model.span.span_of`.
        feature_span: which tokens of a probe text the features are read at; those that a dictionary was not trained on are left out.

    Attributes:
        sites: named directions and controls by site.
        features: the features, see `FeatureTracking`.
        probe: the prompts and their baseline, None in stream mode alone.
        last_step: step of the last measurement, -1 before the first.
        latest: its records.
        probe_seconds: wall time spent in probe mode so far.

    Raises:
        ConfigError: nothing to track, no mode, or two names that loggers cannot tell apart.
        WidthError: directions of one site differ in width.

    Example:
        >>> tracker = steer.DriftTracker({"kind": directions}, probe=probe, store="drift.sqlite")
        >>> with tracker.attached(model):
        ...     records = tracker.measure(0)
        ...     train(model, optimizer)
        ...     records = tracker.measure(1)
    """

    def __init__(
        self,
        directions: Mapping[str, DirectionsLike] = MappingProxyType({}),
        *,
        features: Mapping[str, FeaturesLike] = MappingProxyType({}),
        probe: Sequence[Row] | None = None,
        controls: int = 16,
        stream: bool = True,
        store: str | Path | None = None,
        seed: int = 0,
        span: str | int = "prompt_last",
        feature_span: str | int = "all",
    ) -> None:
        of_type(directions, Mapping, "the directions of a tracker", "pass {name: direction}")
        self.probe = None if probe is None else Probe(probe, span, seed)
        self.directions = {name: as_list(name, of_name) for name, of_name in directions.items()}
        self.features = FeatureTracking(features, controls=controls, seed=seed, probe=probe or (), span=feature_span, stream=stream)
        # without features, there must be a direction
        self.sites: dict[Site, SiteDirections] = (
            directions_by_site(self.directions, controls, seed) if self.directions or not self.features.groups else {}
        )
        if (probe is not None and len(probe) < 2) or (probe is None and not stream):
            raise _nothing_to_measure(len(probe or ()), stream)
        names = [f"{each.direction}@{each.site}" for each in self._tracked()]
        if len(set(names)) < len(names):
            raise _name_taken(names)
        check_metric_names(names, "tracked directions or features" if self.features.groups else "tracked directions")
        self.readers = {site: StreamReader(own) for site, own in self.sites.items()} if stream else {}
        self.seed = seed
        self.span = span
        self.store = None if store is None else place_of(store)
        self.fingerprint: dict[str, Any] | None = None
        self.last_step = -1
        self.latest: list[DriftRecord] = []
        self.probe_seconds = 0.0
        self._model: nn.Module | None = None
        self._installation: hooks.Installation | None = None
        self._writer: DriftWriter | None = None
        self._main = True
        self._reduce: Reduce = identity

    def __repr__(self) -> str:
        modes = [*([] if self.probe is None else [repr(self.probe)]), *(["stream"] if self.streams else [])]
        state = "not attached" if self._model is None else "attached"
        names = ", ".join([*self.directions, *(group.name for group in self.features.groups)])
        sites = len({*self.sites, *self.features.sites})
        return f"DriftTracker({names} at {sites} sites, {' and '.join(modes)}, {state})"

    @property
    def streams(self) -> bool:
        """It reads the training batches too."""
        return bool(self.readers or self.features.readers)

    def _tracked(self) -> list[TrackedDirection]:
        of_groups = (group.tracked() for group in self.features.groups)
        return [tracked for each in (*(own.tracked() for own in self.sites.values()), *of_groups) for tracked in each]

    def attach(self, model: nn.Module, *, reduce: Reduce = identity, main: bool = True) -> DriftTracker:
        """Installs the read-only hooks of stream mode and remembers the model for the probe.

        Args:
            model: as `Plan.attach` takes it.
            reduce: sum of a tensor over ranks.
            main: this rank writes the store.

        Raises:
            AttachError: it is attached already. SiteError, WidthError: the directions do not fit the model.
        """
        if self._model is not None:
            raise _attached_already(self._model)
        anatomy, points = resolve(model, [*self.sites, *self.features.sites])
        tracked: list[SiteDirections | FeatureGroup] = [*self.sites.values(), *self.features.groups]
        for own, point in zip(tracked, points, strict=True):
            if point.width not in (None, own.width):
                raise _width_error(own, point)
        if self.fingerprint is None:
            self.fingerprint = {"class": type(model).__name__} if anatomy is None else anatomy.fingerprint()
        if self.streams:
            readers = [*self.readers.values(), *self.features.hooks()]
            self._installation = hooks.Installation(model, anatomy, list(zip(points, readers, strict=True)))
        try:
            if self._installation is not None:
                self._installation.install()
            self._model = _callable(model, anatomy)
            self._reduce = reduce
            self._main = main
            return self
        except BaseException:
            self._remove_hooks()
            raise

    def reset(self) -> None:
        """Forgets all measurements, so that the next one is a baseline again. Raises AttachError while it is attached."""
        if self._model is not None:
            raise _attached_already(self._model)
        self._close_store()
        if self.probe is not None:
            self.probe.load_state_dict({})
        for reader in self.readers.values():
            reader.load_state_dict({}, main=False)
        self.features.reset()
        self.fingerprint = None
        self.last_step = -1
        self.latest = []

    def detach(self) -> None:
        """Removes the hooks and closes the store; what was measured stays. Raises AttachError when it is not attached."""
        self._attached_model()
        self._close_store()
        self._remove_hooks()  # last: where this is interrupted, it is attached still, and may be detached again

    @property
    def is_attached(self) -> bool:
        """It is on a model."""
        return self._model is not None

    def _remove_hooks(self) -> None:
        if self._installation is not None:
            self._installation.remove()
            self._installation = None
        self._model = None

    @contextmanager
    def attached(self, model: nn.Module, *, reduce: Reduce = identity, main: bool = True) -> Iterator[DriftTracker]:
        """`attach` and `detach` around a block, on every exit path."""
        of_another = self._model is not None

        def put_back() -> None:
            if not of_another:
                self._remove_hooks()
                self._close_store()

        with restoring(put_back):
            yield self.attach(model, reduce=reduce, main=main)

    def _attached_model(self) -> nn.Module:
        if self._model is None:
            raise _not_attached()
        return self._model

    def measure(self, step: int) -> list[DriftRecord]:
        """Takes one measurement: the probe prompts as the model is now, and the window of training tokens since the last call.

        The first call is the baseline, so make it before the first optimiser step. All ranks must call it together; each runs the full
        probe, which keeps sharded models in step and needs no reduction. Training mode and random state are left as they were.

        Args:
            step: optimiser steps done; greater than `last_step`.

        Returns:
            The records, which are also in the store by then.

        Raises:
            AttachError: not attached. ConfigError: the step was measured before, or a drift metric returns no column of values.
            NonFiniteError: the model's activations are not finite. FileError and what derives from it: the store cannot be written.
        """
        model = self._attached_model()
        if step <= self.last_step:
            raise _measured_before(step, self.last_step)
        if self.last_step < 0 and self.readers:
            check_metrics("stream", self.sites.values())  # which would otherwise fail in the middle of training
        records: list[DriftRecord] = []
        if self.probe is not None:
            started = time.perf_counter()
            if self.sites:
                records += _computed(step, self.probe.measure(model, self.sites.values()))
            records += _computed(step, self.features.measure_probe(model))
            self.probe_seconds += time.perf_counter() - started
        windows = [reader.close_window(self._reduce) for reader in self.readers.values()]
        records += _computed(step, [window for window in windows if window is not None])
        records += _computed(step, self.features.close_windows(self._reduce))
        if self.store is not None and self._main:
            self._opened(self.store).append(records)
        self.last_step = step
        self.latest = records
        if self._main:
            self.features.warn(records)
        return records

    def _opened(self, store: str | Path) -> DriftWriter:
        if self._writer is None:
            assert self.fingerprint is not None
            self._writer = DriftWriter(store, fingerprint=self.fingerprint, tracked=self._tracked(), from_step=self.last_step)
        return self._writer

    def _close_store(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def log_values(self) -> dict[str, float]:
        """The latest measurement for a logger, see `steer.drift.records.log_values`."""
        return log_values(self.latest)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything an exact resume needs, as a flat dictionary of CPU tensors. All ranks must call it together."""
        fingerprint = torch.tensor(list(json.dumps(self.fingerprint).encode()), dtype=torch.uint8)
        state = {"last_step": torch.tensor(self.last_step), "digest": _digest(self), "fingerprint": fingerprint}
        if self.probe is not None:
            state |= {f"probe/{name}": tensor for name, tensor in self.probe.state_dict().items()}
        for site, reader in self.readers.items():
            state |= {f"stream/{site}/{name}": tensor for name, tensor in reader.state_dict(self._reduce).items()}
        return state | self.features.state_dict(self._reduce)

    def load_state_dict(self, state: Mapping[str, Tensor], *, main: bool = True) -> None:
        """Goes on from a saved state; the next measurement opens a new attempt in the store.

        Args:
            main: this is the main rank, which takes over the sums of all ranks.

        Raises:
            ConfigError: the state belongs to other directions, controls or prompts.
        """
        if missing := [name for name in ("digest", "last_step", "fingerprint") if not isinstance(state.get(name), Tensor)]:
            raise _no_state(missing, state)
        if not torch.equal(_digest(self), state["digest"]):
            raise _another_tracker(_digest(self), state["digest"])
        self._close_store()
        self.last_step = int(state["last_step"])
        self.latest = []
        # Of the model at the baseline: full training moves the embeddings that a fingerprint taken now would describe.
        self.fingerprint = parse_json(bytes(state["fingerprint"].tolist()), "the fingerprint in the state of a tracker")
        if self.probe is not None:
            self.probe.load_state_dict(under("probe/", state))
        for site, reader in self.readers.items():
            reader.load_state_dict(under(f"stream/{site}/", state), main)
        self.features.load_state_dict(state, main)


def _computed(step: int, measurements: Sequence[Measurement]) -> list[DriftRecord]:
    for thing in THINGS:
        compute_metrics([measurement for measurement in measurements if measurement.of == thing])
    return [record for measurement in measurements for record in records_of(step, measurement)]


def _digest(tracker: DriftTracker) -> Tensor:
    """[32] uint8, SHA-256 over what is tracked and on which prompts."""
    directions = [(tracked.direction, tracked.site, tracked.sha256) for own in tracker.sites.values() for tracked in own.tracked()]
    prompts = [] if tracker.probe is None else [(prompt.ids, prompt.prompt) for prompt in tracker.probe.prompts]
    features = tracker.features.digest()  # nothing without features: states of older versions have none
    text = json.dumps([directions, prompts, tracker.span, tracker.seed, bool(tracker.readers), *features])
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)


def _callable(model: nn.Module, anatomy: Anatomy | None) -> nn.Module:
    """The outermost module that can be called with token ids: a LightningModule usually has no forward of its own."""
    chain = [model] if anatomy is None else anatomy.chain
    inner = [depth + 1 for depth, module in enumerate(chain[:-1]) if hasattr(module, "training_step")]
    return chain[max(inner, default=0)]


def _nothing_to_measure(prompts: int, stream: bool) -> ConfigError:
    return ConfigError(
        "the tracker has nothing to measure on",
        expected="two or more probe prompts, or none of them and stream=True",
        found=f"{prompts} probe prompts, stream={stream}",
        remedy="pass more prompts in probe=[...], or leave it out and pass stream=True",
    )


def _attached_already(model: nn.Module) -> AttachError:
    return AttachError(
        "this tracker is attached already",
        expected="a tracker that is not",
        found=f"one on a {type(model).__name__}",
        remedy="call tracker.detach() first, or make another tracker",
    )


def _not_attached() -> AttachError:
    return AttachError(
        "this tracker is not attached",
        expected="a tracker that is on a model",
        found="one that is on none",
        remedy="call tracker.attach(model) first",
    )


def _name_taken(names: list[str]) -> ConfigError:
    return ConfigError(
        "two tracked things have one name at one site",
        expected="another name for features than for directions of their site, since their dictionary is tracked by it too",
        found=f"{', '.join(sorted(name for name, count in Counter(names).items() if count > 1))} more than once",
        remedy="rename the features",
    )


def _width_error(tracked: SiteDirections | FeatureGroup, point: HookPoint) -> WidthError:
    return WidthError(
        f"the {'features' if isinstance(tracked, FeatureGroup) else 'directions'} at '{tracked.site}' do not fit the model",
        expected=f"width {point.width}",
        found=f"width {tracked.width} of {tracked}",
        remedy="extract directions, or train dictionaries, on this model and at this site",
    )


def _measured_before(step: int, last_step: int) -> ConfigError:
    return ConfigError(
        "this step was measured before",
        expected=f"a step after {last_step}",
        found=f"step {step}",
        remedy="skip steps up to tracker.last_step",
    )


def _no_state(missing: list[str], state: Mapping[str, Tensor]) -> ConfigError:
    return ConfigError(
        "this is no state of a drift tracker",
        expected="what `state_dict()` of one returned",
        found=f"no tensor '{missing[0]}' beside {', '.join(list(state)[:5]) or 'nothing'}",
        remedy="resume from a checkpoint that was saved with the tracker",
    )


def _another_tracker(digest: Tensor, saved: Tensor) -> ConfigError:
    own_hex, saved_hex = (bytes(hashed.tolist()).hex()[:16] for hashed in (digest, saved))
    return ConfigError(
        "this state belongs to another tracker",
        expected=f"the same directions, sites, controls, seed, probe prompts and span, with the digest {own_hex}",
        found=f"the digest {saved_hex}",
        remedy="build the tracker as it was when the checkpoint was saved, or start from a checkpoint without it",
    )
