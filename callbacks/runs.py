"""What a steered and a tracked training run do at each event, whatever the framework. The callbacks translate events into these calls."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steer.callbacks.batches import ResponseHint
from steer.callbacks.learning import Learning
from steer.callbacks.ranks import Ranks
from steer.checks import of_type, whole_number
from steer.drift.tracker import DriftTracker
from steer.errors import ConfigError, HookDidNotRunError
from steer.intervene import Plan
from steer.intervene import schedule as schedules
from steer.model.context import PHASES


def every(steps: int) -> int:
    """Checks an interval of optimiser steps."""
    whole_number(steps, "every_n_steps")
    if steps < 1:
        remedy = "pass every_n_steps=1 to measure after every step, a larger number to measure less often"
        raise ConfigError("every_n_steps is too small", expected=">= 1", found=steps, remedy=remedy)
    return steps


class SteeringRun:
    """A plan on loan to a training run: its phases narrowed, its schedules perhaps replaced, both given back at the end.

    Args:
        schedule: takes the place of every intervention's own.
        phases: the interventions act in those of their own phases that are named here.
        learning_rate: of the plan's parameters, see `Learning`.
    """

    def __init__(self, plan: Plan, schedule: Any, phases: Sequence[str], learning_rate: float | None) -> None:
        of_type(plan, Plan, "the plan of a callback", "pass Plan([...]), not an intervention")
        self.plan = plan
        self.schedule = None if schedule is None else schedules.from_dict(schedule)
        self.phases = (phases,) if isinstance(phases, str) else tuple(phases)
        if not self.phases or not set(self.phases) <= set(PHASES):
            remedy = f"name the phases in which the plan acts, e.g. phases=('{PHASES[0]}',)"
            raise ConfigError(
                "unknown or missing phase", expected=f"some of {', '.join(PHASES)}", found=self.phases or "none", remedy=remedy
            )
        self.names = [one.name for one in plan.interventions]
        self.name = ",".join(self.names)  # what tells this plan from another one in the same run
        self.hint, self.ranks = ResponseHint(), Ranks()
        self.learning = Learning(plan, learning_rate)
        self.attached = self.loaded = False
        self._own: list[tuple[Any, Any]] = []
        self._earlier = torch.zeros(len(self.names), dtype=torch.long)  # tokens steered before the attach, of this rank
        self._passes: int | None = None  # before the first batch; None when not yet, or no longer, asked for
        self._checked = False

    def begin(self, model: nn.Module, ranks: Ranks, *, stack: bool = False) -> None:
        """Attaches the plan.

        Raises:
            ConfigError: no intervention acts in any of the phases. Otherwise as `Plan.attach`.
        """
        narrowed = [tuple(phase for phase in one.phases if phase in self.phases) for one in self.plan.interventions]
        if not any(narrowed):
            raise ConfigError(
                "this plan does nothing in this run",
                expected=f"an intervention that acts in one of: {', '.join(self.phases)}",
                found={one.name: one.phases for one in self.plan.interventions},
                remedy="pass phases=... to the callback, or to the interventions",
            )
        self._own = [(one.schedule, one.phases) for one in self.plan.interventions]
        for one, phases in zip(self.plan.interventions, narrowed, strict=True):
            one.set_phases(phases)
            one.schedule = one.schedule if self.schedule is None else self.schedule
        try:
            self.plan.step(self.plan.current_step)
            self.plan.attach(model, stack=stack)
        except BaseException:
            self._give_back()
            raise
        self.hint.install(model)
        self.ranks, self.attached = ranks, True
        self._checked, self._passes = False, None

    def end(self) -> None:
        """Detaches the plan and gives it back as it was; may be called at any time."""
        if not self.attached:
            return
        self._earlier, self.attached = self._tokens(), False
        self.hint.remove()
        self.plan.detach()
        self._give_back()

    def _give_back(self) -> None:
        for one, (schedule, phases) in zip(self.plan.interventions, self._own, strict=True):
            one.schedule = schedule
            one.set_phases(phases)
        self.plan.step(self.plan.current_step)

    def start(self, step: int, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Training starts, or goes on, after `step` optimiser steps. All ranks call it together.

        Raises:
            ConfigError: the plan has parameters that nothing would train.
        """
        self.learning.start(model, optimizers, self.ranks)
        if step > 0 and not self.loaded:
            warnings.warn("the checkpoint holds no state of this plan: its strengths are those it was made with", stacklevel=2)
        if not self.loaded:
            self._earlier = -self._fired()  # what a sanity check or an earlier run did is not counted
        self.loaded = False
        self.plan.step(step)

    def batch(self, batch: Any) -> None:
        """A batch is about to be run."""
        self.hint.show(batch)
        if not self._checked and self._passes is None:
            self._passes = self.plan.passes

    def ran(self) -> None:
        """A training batch was run. Raises HookDidNotRunError when none of its forward passes went through the plan."""
        self.hint.show(None)
        if self._checked:  # asked once only: the answer waits for the device
            return
        if self._passes == self.plan.passes:
            raise HookDidNotRunError(
                "the first training batch did not run the steered model",
                expected="at least one forward pass through it",
                found=f"none, though the plan is attached at {', '.join(sorted({str(one.site) for one in self.plan.interventions}))}",
                remedy="train the model that the callback was given, not a copy, and do not bypass its __call__",
            )
        self._checked, self._passes = True, None

    def _fired(self) -> Tensor:
        fired = self.plan.fired() if self.attached else {}
        return torch.tensor([fired.get(name, 0) for name in self.names])

    def _tokens(self) -> Tensor:
        return self._earlier + self._fired()

    def metrics(self) -> dict[str, float]:
        """For a logger: strength now (mean over row slots), and tokens steered so far over all ranks, which must call this together."""
        tokens = self.ranks.sum(self._tokens()).tolist()
        values = {f"steer/{one.name}/strength": float(one.effective.mean()) for one in self.plan.interventions}
        return values | {f"steer/{name}/tokens": float(count) for name, count in zip(self.names, tokens, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """Flat CPU tensors. All ranks must call it together."""
        plan, tokens = self.plan.state_dict(), self.ranks.sum(self._tokens())
        state = {"step": torch.tensor(plan["step"])}
        for i, name in enumerate(self.names):
            one = plan["interventions"][name]
            state |= {f"{name}/base": one["base"], f"{name}/enabled": torch.tensor(one["enabled"]), f"{name}/tokens": tokens[i].clone()}
            if one["window"] is not None:  # whether it has each end, and where
                state[f"{name}/window"] = torch.tensor([[end is not None, end or 0] for end in one["window"]])
            state |= {f"{name}/learned/{key}": tensor for key, tensor in one["learned"].items()}
        return state | self.learning.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], *, first: bool) -> None:
        """Raises ConfigError when the state belongs to a plan with other interventions."""
        ones = {}
        for name in (key.removesuffix("/base") for key in state if key.endswith("/base")):
            window = state.get(f"{name}/window")
            ones[name] = {
                "base": state[f"{name}/base"],
                "enabled": bool(state[f"{name}/enabled"]),
                "window": None if window is None else tuple(end if known else None for known, end in window.tolist()),
                "learned": _learned(state, name),
            }
        self.plan.load_state_dict({"step": int(state["step"]), "interventions": ones})
        self.learning.load_state_dict(state)
        self._earlier = torch.tensor([int(state[f"{name}/tokens"]) if first else 0 for name in self.names]) - self._fired()
        self.loaded = True

    def load_learned(self, state: Mapping[str, Tensor]) -> None:
        """Takes what was learned from a state, and nothing else of it."""
        for one in self.plan.interventions:
            one.load_learned(_learned(state, one.name))


def _learned(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    mark = f"{name}/learned/"
    return {key.removeprefix(mark): tensor for key, tensor in state.items() if key.startswith(mark)}


class DriftRun:
    """A tracker in a training run: a baseline before the first step, then a measurement every so many optimiser steps, and at the end.

    Attributes:
        values: the last measurement, as a logger gets it; kept over a resume, for monitors that ask before the next one.
    """

    def __init__(self, tracker: DriftTracker, every_n_steps: int) -> None:
        of_type(tracker, DriftTracker, "the tracker of a callback", "pass DriftTracker({name: direction}, ...)")
        self.tracker, self.every = tracker, every(every_n_steps)
        self.hint, self.ranks = ResponseHint(), Ranks()
        self.attached = False
        self.values: dict[str, float] = {}

    @property
    def name(self) -> str:
        """What tells this tracker from another one in the same run."""
        modes = [mode for mode, on in (("probe", self.tracker.probe), ("stream", self.tracker.readers)) if on]
        watched = [f"{name}@{one.site}" for name, ones in self.tracker.directions.items() for one in ones]
        return f"{'+'.join(modes)}:{','.join(watched)}"

    def begin(self, model: nn.Module, ranks: Ranks) -> None:
        """Attaches the tracker; raises as `DriftTracker.attach`."""
        self.tracker.attach(model, reduce=ranks.sum, main=ranks.writes)
        self.hint.install(model)
        self.ranks, self.attached = ranks, True

    def end(self) -> None:
        """Detaches the tracker; may be called at any time."""
        if self.attached:
            self.attached = False
            self.hint.remove()
            self.tracker.detach()

    def start(self, step: int) -> bool:
        """Training starts, or goes on, after `step` optimiser steps: takes the baseline unless the tracker has one.

        Returns:
            True when it was taken.

        Raises:
            ConfigError: the tracker knows later steps than this one, or the records go on from a checkpoint that does not.
        """
        tracker = self.tracker
        if tracker.last_step > step:
            raise ConfigError(
                "this tracker has measured another run",
                expected=f"no measurement after step {step}, where training starts",
                found=f"step {tracker.last_step}",
                remedy="make a new DriftTracker for each run, or resume from the checkpoint that belongs to its state",
            )
        if tracker.last_step >= 0:
            return False
        if step > 0 and tracker.store is not None and Path(tracker.store).exists():
            raise ConfigError(
                f"the checkpoint of step {step} holds no drift state",
                expected="a checkpoint saved with this callback, which holds the baseline of the records",
                found=f"records of an earlier run in {tracker.store}, and no baseline to go on from",
                remedy="resume from another checkpoint, or give the tracker a new store to begin a new series",
            )
        if step > 0:
            warnings.warn(f"the checkpoint holds no drift state: the baseline is the model after step {step}", stacklevel=2)
        self.measure(step)
        return True

    def due(self, step: int, *, last: bool = False) -> bool:
        """True when a measurement is to be made after `step` optimiser steps; `last` when no more will follow."""
        done = self.tracker.last_step
        return step > done and (last or step // self.every > done // self.every)

    def measure(self, step: int) -> dict[str, float]:
        """Measures, on all ranks together, and returns what belongs into a logger."""
        self.hint.show(None)  # the probe's passes are no part of the batch
        self.tracker.measure(step)
        self.values = self.tracker.log_values()
        return self.values

    def state_dict(self) -> dict[str, Tensor]:
        """Flat CPU tensors. All ranks must call it together."""
        logged = {f"logged/{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.values.items() if math.isfinite(value)}
        return self.tracker.state_dict() | logged

    def load_state_dict(self, state: Mapping[str, Tensor], *, first: bool) -> None:
        """Raises ConfigError when the state belongs to another tracker."""
        self.tracker.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("logged/")}, main=first)
        self.values = {name.removeprefix("logged/"): float(value) for name, value in state.items() if name.startswith("logged/")}
