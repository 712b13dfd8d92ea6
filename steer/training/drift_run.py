"""DriftRun: what a drift tracker does at each event of a training run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.drift.metric_names import metric_name
from steer.drift.tracker import DriftTracker
from steer.errors import ConfigError
from steer.training.batches import BatchResponseMask
from steer.training.interval import Interval
from steer.training.ranks import Ranks

LOGGED = "logged/"  # prefix of the last measurement's values in a checkpoint


class DriftRun:
    """A tracker in a training run: a baseline before the first step, then a measurement every so many optimiser steps, and at the end.

        run = DriftRun(tracker, every_n_steps=10)
        run.attach(model, Ranks())
        run.start(step=0)  # the baseline
        for step, batch in enumerate(batches, 1):
            train(batch)
            if run.is_due(step):
                print(run.measure(step))
        run.detach()

    Attributes:
        values: the last measurement, as a logger gets it; kept over a resume, for monitors that ask before the next one.

    Raises:
        ConfigError: no tracker, or no interval.
    """

    def __init__(self, tracker: DriftTracker, every_n_steps: int) -> None:
        of_type(tracker, DriftTracker, "the tracker of a callback", "pass DriftTracker({name: direction}, ...)")
        self.tracker = tracker
        self.interval = Interval(every_n_steps)
        self.response_mask = BatchResponseMask()
        self.ranks = Ranks()
        self.is_attached = False
        self.values: dict[str, float] = {}
        self._last_step = -1  # that this object measured or loaded
        self._state_loaded = False  # since the last start
        self._has_warned = False  # of a value that is older than the step it is read at
        self._n_runs = 1
        self._first_store: str | Path | None = None

    def __repr__(self) -> str:
        return f"DriftRun({self.tracker} every {self.interval.every_n_steps} steps)"

    @property
    def name(self) -> str:
        """What tells this tracker from another one in the same run."""
        modes = [mode for mode, is_on in (("probe", self.tracker.probe), ("stream", self.tracker.streams)) if is_on]
        watched = [f"{name}@{direction.site}" for name, directions in self.tracker.directions.items() for direction in directions]
        watched += [f"{group.name}@{group.site}" for group in self.tracker.features.groups]
        return f"{'+'.join(modes)}:{','.join(watched)}"

    def attach(self, model: nn.Module, ranks: Ranks) -> None:
        """Attaches the tracker, anew when it is attached already; raises as `DriftTracker.attach`."""
        self.detach()
        self.is_attached = not self.tracker.is_attached  # said before it is true, so that an interrupt takes off what is on
        try:
            self.tracker.attach(model, reduce=ranks.sum, main=ranks.writes_files)
            self.response_mask.install(model)
        except BaseException:
            self.detach()
            raise
        self.ranks = ranks

    def detach(self) -> None:
        """Detaches the tracker; may be called at any time."""
        if self.is_attached:
            self.response_mask.remove()
            if self.tracker.is_attached:
                self.tracker.detach()
            self.is_attached = False

    def renew(self) -> None:
        """Makes the tracker new for another training run of this object; what has measured elsewhere is refused at the start.

        Called before the attach of a training run that begins at its first step. Each run has a store of its own: after `drift.sqlite` come
        `drift.2.sqlite`, `drift.3.sqlite`, ...
        """
        self.detach()
        tracker = self.tracker
        if tracker.last_step < 0 or tracker.last_step != self._last_step or self._state_loaded:
            return
        tracker.reset()
        self._n_runs += 1
        if tracker.store is not None:
            first = self._first_store = Path(self._first_store or tracker.store)
            tracker.store = first.with_name(f"{first.stem}.{self._n_runs}{first.suffix}")
        self.values = {}
        self._last_step = -1

    def start(self, step: int, *, state_place: str = "a state of this tracker") -> bool:
        """Takes the baseline, unless the tracker has one, before training starts, or goes on, after `step` optimiser steps.

        Args:
            state_place: where the state is in a checkpoint that has one, for messages.

        Returns:
            True when the baseline was taken.

        Raises:
            ConfigError: the tracker knows later steps than this one, or the records go on from a checkpoint that does not.
        """
        tracker = self.tracker
        self._state_loaded = False
        if tracker.last_step > step:
            raise _measured_another_run(tracker.last_step, step)
        if tracker.last_step >= 0:
            return False
        if step > 0 and tracker.store is not None and Path(tracker.store).exists():
            raise _no_drift_state(tracker.store, step, state_place)
        if step > 0:
            warnings.warn(f"the checkpoint holds no drift state ({state_place}): the baseline is the model after step {step}", stacklevel=2)
        self.measure(step)
        return True

    def warn_if_stale(self, step: int, watched: Iterable[object]) -> None:
        """Warns once where a monitor reads a drift metric at a step whose drift was not measured: it gets the value of an earlier one.

        Args:
            step: optimiser steps done.
            watched: names of the metrics that monitors read.
        """
        stale = [str(name) for name in watched if str(name).removeprefix("eval_").startswith(("drift/", "drift_stream/"))]
        if not stale or self.tracker.last_step == step or self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"{stale[0]} is read after step {step}, and was measured after step {self.tracker.last_step}: a monitor takes the old value "
            f"for one that did not improve; measure wherever it looks, every_n_steps={self.interval.every_n_steps} does not",
            stacklevel=3,
        )

    def is_due(self, step: int, *, is_last: bool = False) -> bool:
        """True when a measurement is to be made after `step` optimiser steps; `is_last` when no more will follow."""
        last_step = self.tracker.last_step
        return step > last_step and (is_last or self.interval.is_due(step, last_step))

    def measure(self, step: int) -> dict[str, float]:
        """Measures, on all ranks together, and returns the values for a logger."""
        self.response_mask.clear()  # the probe's passes are no part of the batch
        self.tracker.measure(step)
        self._last_step = step
        self.values = self.tracker.log_values()
        return self.values

    def state_dict(self) -> dict[str, Tensor]:
        """Flat CPU tensors. All ranks must call it together."""
        logged = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.values.items() if math.isfinite(value)}
        return self.tracker.state_dict() | {f"{LOGGED}{name}": value for name, value in logged.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], *, is_first_rank: bool) -> None:
        """Goes on from a saved state.

        Args:
            is_first_rank: this rank takes over what was summed over the ranks.

        Raises:
            ConfigError: the state belongs to another tracker.
        """
        tracker_state = {name: tensor for name, tensor in state.items() if not name.startswith(LOGGED)}
        self.tracker.load_state_dict(tracker_state, main=is_first_rank)
        # older versions wrote names with an `@`
        self.values = {metric_name(name.removeprefix(LOGGED)): float(value) for name, value in state.items() if name.startswith(LOGGED)}
        self._last_step = self.tracker.last_step
        self._state_loaded = True


# ---- errors


def _measured_another_run(last_step: int, step: int) -> ConfigError:
    return ConfigError(
        "this tracker has measured another run",
        expected=f"no measurement after step {step}, where training starts",
        found=f"step {last_step}",
        remedy="make a new DriftTracker for each run, or resume from the checkpoint that belongs to its state",
    )


def _no_drift_state(store: str | Path, step: int, place: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint of step {step} holds no drift state",
        expected=f"{place}, which holds the baseline of the records",
        found=f"records of an earlier run in {store}, and no baseline to go on from",
        remedy="resume from another checkpoint, or give the tracker a new store to begin a new series",
    )
