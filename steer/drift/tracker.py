"""DriftTracker: watches directions while a model is trained, without a framework. A callback calls `measure` after optimiser steps."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.drift.accumulators import Reduce, identity
from steer.drift.metrics import benjamini_hochberg
from steer.drift.probe import PooledStates, probe_records
from steer.drift.records import DriftRecord
from steer.drift.store import DriftWriter
from steer.drift.stream import StreamReader, under
from steer.drift.watch import Watched, listed, watches
from steer.errors import AttachError, ConfigError, WidthError
from steer.model import hooks
from steer.model.anatomy import Anatomy, HookPoint, resolve
from steer.model.capture import capture
from steer.model.tokens import Row

LOGGED = ("effect_sd", "change", "z_controls", "p")


class DriftTracker:
    """Projections of a model in training on named directions, beside random control directions of the same sites.

    Two modes, both by default when there are probe prompts:

    * probe: a forward pass over fixed prompts at each `measure`, in evaluation mode and without gradients, compared prompt by prompt with
      the first `measure`. A plan that acts in training only is off in it; one that also acts in validation is part of what is measured.
    * stream: the response tokens of the training batches, read by hooks as they pass, hence with a training plan's edits when the tracker
      is attached after the plan. A steered site tells little about behaviour: watch other sites too.

    The controls are isotropic. Directions with the covariance of the states are not drawn: `z_covariance` is their limit in closed form.

    Args:
        directions: name -> a direction, several of them, or a `Directions` (one concept at many sites).
        probe: tokenised prompts, at least two; none for stream mode alone.
        controls: random directions per site.
        stream: read the training batches too.
        store: file of the records (see `steer.drift.store`), opened at the first measurement; None keeps none.
        seed: of the controls and of the sign flips.
        span: which tokens of a probe text are averaged, see `steer.model.span.span_of`.

    Attributes:
        last_step: step of the last measurement, -1 before the first.
        latest: its records.
        probe_seconds: wall time spent in probe passes so far.

    Raises:
        ConfigError: nothing to watch, or no mode. WidthError: directions of one site differ in width.
    """

    def __init__(
        self,
        directions: Mapping[str, Watched],
        *,
        probe: Sequence[Row] = (),
        controls: int = 16,
        stream: bool = True,
        store: str | Path | None = None,
        seed: int = 0,
        span: str | int = "prompt_last",
    ) -> None:
        of_type(directions, Mapping, "the directions of a tracker", "pass {name: direction}")
        for text in probe:
            of_type(text, Row, "a probe prompt", "tokenise it: steer.model.tokens.encode(tokenizer, prompt)")
        self.directions = {name: listed(given) for name, given in directions.items()}
        self.watches = watches(self.directions, controls, seed)
        self.probe, self.span, self.seed, self.store = list(probe), span, seed, store
        if len(self.probe) == 1 or (not self.probe and not stream):
            raise ConfigError(
                "the tracker has nothing to measure on",
                expected="two or more probe prompts, or none of them and stream=True",
                found=f"{len(self.probe)} probe prompts, stream={stream}",
                remedy="pass more prompts in probe=[...], or leave it out and pass stream=True",
            )
        self.readers = {site: StreamReader(watch) for site, watch in self.watches.items()} if stream else {}
        self.baseline: dict[str, Tensor] = {}  # site -> [prompts, width] fp32
        self.fingerprint: dict[str, Any] | None = None
        self.last_step = -1
        self.latest: list[DriftRecord] = []
        self.probe_seconds = 0.0
        self._model: nn.Module | None = None
        self._remove: Any = None
        self._writer: DriftWriter | None = None
        self._main = True
        self._reduce: Reduce = identity

    # ---- attaching

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
            raise AttachError(
                "this tracker is attached already",
                expected="a tracker that is not",
                found=f"one on a {type(self._model).__name__}",
                remedy="call tracker.detach() first, or make another tracker",
            )
        sites = list(self.watches)
        anatomy, points = resolve(model, sites)
        for site, point in zip(sites, points, strict=True):
            if point.width is not None and point.width != (width := self.watches[site].units.shape[1]):
                raise WidthError(
                    f"the directions at '{site}' do not fit the model",
                    expected=f"width {point.width}",
                    found=f"width {width}",
                    remedy="extract them on this model and at this site",
                )
        if self.fingerprint is None:
            self.fingerprint = {"class": type(model).__name__} if anatomy is None else anatomy.fingerprint()
        if self.readers:
            acts: list[tuple[HookPoint, hooks.Act]] = [(point, self.readers[site]) for point, site in zip(points, sites, strict=True)]
            _, self._remove = hooks.install(model, anatomy, acts)
        self._model, self._reduce, self._main = _callable(model, anatomy), reduce, main
        return self

    def detach(self) -> None:
        """Takes the hooks off and closes the store; what was measured stays. Raises AttachError when it is not attached."""
        self._attached_model()
        self._model = None
        if self._remove is not None:
            self._remove()
            self._remove = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @contextmanager
    def attached(self, model: nn.Module, *, reduce: Reduce = identity, main: bool = True) -> Iterator[DriftTracker]:
        """`attach` and `detach` around a block, on every exit path."""
        self.attach(model, reduce=reduce, main=main)
        try:
            yield self
        finally:
            self.detach()

    def _attached_model(self) -> nn.Module:
        if self._model is None:
            raise AttachError(
                "this tracker is not attached",
                expected="a tracker that is on a model",
                found="one that is on none",
                remedy="call tracker.attach(model) first",
            )
        return self._model

    # ---- measuring

    def measure(self, step: int) -> list[DriftRecord]:
        """Takes one measurement: the probe prompts as the model is now, and the window of training tokens since the last call.

        The first call is the baseline, so make it before the first optimiser step. All ranks must call it together; each runs the whole
        probe, which keeps sharded models in step and needs no reduction. Training mode and random state are left as they were.

        Args:
            step: optimiser steps done; greater than `last_step`.

        Returns:
            The records, which are also in the store by then.

        Raises:
            AttachError: not attached. ConfigError: the step was measured before. NonFiniteError: the model's activations are not finite.
            FileError and what derives from it: the store cannot be written.
        """
        model = self._attached_model()
        if step <= self.last_step:
            raise ConfigError(
                "this step was measured before",
                expected=f"a step after {self.last_step}",
                found=f"step {step}",
                remedy="skip steps up to tracker.last_step",
            )
        records = self._run_probe(model, step)
        for reader in self.readers.values():
            records += reader.close_window(step, self._reduce)
        if self.store is not None and self._main:
            if self._writer is None:
                tracked = [one for watch in self.watches.values() for one in watch.tracked()]
                assert self.fingerprint is not None
                self._writer = DriftWriter(self.store, fingerprint=self.fingerprint, tracked=tracked, from_step=self.last_step)
            self._writer.append(records)
        self.last_step, self.latest = step, records
        return records

    def _run_probe(self, model: nn.Module, step: int) -> list[DriftRecord]:
        if not self.probe:
            return []
        started = time.perf_counter()
        states = {site: PooledStates(len(self.probe), watch.units.shape[1]) for site, watch in self.watches.items()}
        device = next(model.parameters()).device
        # Uncompiled, because probe batches have shapes of their own, for which compiled training code would be compiled again.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.compiler.set_stance("force_eager"):
            capture(model, self.probe, dict(states), span=self.span)
        records: list[DriftRecord] = []
        for site, watch in self.watches.items():
            first = self.baseline.setdefault(str(site), states[site].values)
            records += probe_records(watch, states[site].values, first, step=step, seed=self.seed)
        q = iter(benjamini_hochberg(torch.tensor([one.p for one in records if one.p is not None])).tolist())
        records = [one if one.p is None else replace(one, q=next(q)) for one in records]
        self.probe_seconds += time.perf_counter() - started
        return records

    def log_values(self) -> dict[str, float]:
        """The latest measurement for a logger: `drift/<direction>@<site>/<value>` for named directions, `drift_stream/...` in stream mode;
        the values are those of `LOGGED`."""
        values = {}
        for one in self.latest:
            prefix = f"{'drift' if one.mode == 'probe' else 'drift_stream'}/{one.direction}@{one.site}"
            for name in LOGGED if one.kind == "named" else ():
                value = getattr(one, name)
                if value is not None and not math.isnan(value):
                    values[f"{prefix}/{name}"] = value
        return values

    # ---- keeping

    def state_dict(self) -> dict[str, Tensor]:
        """Everything an exact resume needs, as a flat dictionary of CPU tensors. All ranks must call it together."""
        state = {"last_step": torch.tensor(self.last_step), "digest": self._digest()}
        state["fingerprint"] = torch.tensor(list(json.dumps(self.fingerprint).encode()), dtype=torch.uint8)
        state |= {f"probe/{site}": tensor.clone() for site, tensor in self.baseline.items()}
        for site, reader in self.readers.items():
            state |= {f"stream/{site}/{name}": tensor for name, tensor in reader.state_dict(self._reduce).items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], *, main: bool = True) -> None:
        """Goes on from a saved state; the next measurement opens a new attempt in the store.

        Args:
            main: this is the main rank, which takes over the sums of all ranks.

        Raises:
            ConfigError: the state belongs to other directions, controls or prompts.
        """
        own, saved = (bytes(digest.tolist()).hex() for digest in (self._digest(), state["digest"]))
        if own != saved:
            raise ConfigError(
                "this state belongs to another tracker",
                expected=f"the same directions, sites, controls, seed, probe prompts and span, with the digest {own[:16]}",
                found=f"the digest {saved[:16]}",
                remedy="build the tracker as it was when the checkpoint was saved, or start from a checkpoint without it",
            )
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.last_step, self.latest = int(state["last_step"]), []
        # Of the model at the baseline: full training moves the embeddings that a fingerprint taken now would describe.
        self.fingerprint = json.loads(bytes(state["fingerprint"].tolist()))
        self.baseline = {site: tensor.cpu().clone() for site, tensor in under("probe/", state).items()}
        for site, reader in self.readers.items():
            reader.load_state_dict(under(f"stream/{site}/", state), main)

    def _digest(self) -> Tensor:
        """[32] uint8, SHA-256 over what is watched and on what."""
        tracked = [(one.direction, one.site, one.sha256) for watch in self.watches.values() for one in watch.tracked()]
        rows = [(row.ids, row.prompt) for row in self.probe]
        text = json.dumps([tracked, rows, self.span, self.seed, bool(self.readers)])
        return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)


def _callable(model: nn.Module, anatomy: Anatomy | None) -> nn.Module:
    """The outermost module that can be called with token ids: a LightningModule usually has no forward of its own."""
    chain = [model] if anatomy is None else anatomy.chain
    inner = [depth + 1 for depth, module in enumerate(chain[:-1]) if hasattr(module, "training_step")]
    return chain[max(inner, default=0)]
