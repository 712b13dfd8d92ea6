"""EditRun: what edits of facts do at each event of a training run: applied, measured, protected, solved again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steer.checks import number_within, of_type, one_of, whole_number
from steer.drift.metric_names import check_metric_names, metric_name
from steer.edits.edit import Edit
from steer.errors import AttachError, ConfigError, WrongModelError
from steer.model.tokens import check_tokenizer
from steer.training.batches import BatchResponseMask
from steer.training.edit_adapter_host import AdapterHost
from steer.training.edit_hosts import BaseHost, EditHost, EditNotAppliedWarning
from steer.training.edit_protection import PROTECTIONS, Protection, no_keys
from steer.training.edit_readings import check_weighting, has_keys, has_values, key_drift, keys_now, target_probability
from steer.training.edit_resolve import solve_again
from steer.training.edit_state import SavedWeights, edit_tensors, edits_from
from steer.training.interval import Interval
from steer.training.metric_crossing import MetricCrossing
from steer.training.ranks import Ranks

HOSTS = {host.name: host for host in (BaseHost, AdapterHost)}

_MOVED = 1e-3  # drift of keys from which an edit that is applied is solved for those of now


class EditFadesWarning(UserWarning):
    """An edit whose targets have become much less likely during training than they were right after it was applied."""


class EditRun:
    """Edits in a training run: put into the model at a step or when a metric crosses a value, then measured every so many steps.

        run = EditRun([edit], tokenizer, at_step=100, protect="resolve")
        run.attach(model, Ranks())  # before optimisers and DDP
        metrics = run.start(0, [optimizer])
        for step, batch in enumerate(batches, 1):
            model(**batch).loss.backward()
            run.before_step()
            optimizer.step()
            metrics = run.advance(step)
        run.detach()

    Args:
        edits: one or several.
        tokenizer: of the model.
        at_step: optimiser steps before they are applied.
        on_metric: what they wait for instead.
        every_n_steps: optimiser steps between two measurements, from the application on.
        protect: `alarm`, `resolve`, `project`, `freeze` or `damp`, see `EditCallback`.
        into: `base` or `adapter`.
        keep: share of the probability right after the application below which an edit has faded.
        damping: share of each step that layers keep under `damp`.

    Attributes:
        edits: as they are now; solved again, they have other factors and keys.
        is_applied: they are in the model.

    When a run begins, the matrices that edits touch have to be those that they were solved for; a resumed one has a state that says what
    is in its weights. With `resolve`, edits for other weights, or whose keys have moved, are solved again when they are applied.

    Raises:
        ConfigError: a value out of its range, two edits of one name, or edits that this protection cannot protect.
    """

    def __init__(
        self,
        edits: Edit | Sequence[Edit],
        tokenizer: Any,
        *,
        at_step: int = 0,
        on_metric: MetricCrossing | None = None,
        every_n_steps: int = 10,
        protect: str = "alarm",
        into: str = "base",
        keep: float = 0.8,
        damping: float = 0.1,
    ) -> None:
        of_type(edits, (Edit, list, tuple), "the edits of a callback", "pass a steer.edits.Edit, or a list of them")
        self.given = (edits,) if isinstance(edits, Edit) else tuple(edits)
        for edit in self.given:
            of_type(edit, Edit, "one of the edits of a callback", "pass a steer.edits.Edit, or a list of them")
        names = [edit.name for edit in self.given]
        if not names or len(set(names)) < len(names):
            raise _unclear_edits(names)
        check_metric_names(names, "edits")
        check_tokenizer(tokenizer)
        whole_number(at_step, "at_step")
        of_type(on_metric, (MetricCrossing, type(None)), "on_metric", "pass MetricCrossing('val_loss', below=2.0)")
        if on_metric is not None and at_step:
            raise _step_and_metric(at_step, on_metric)
        number_within(keep, "keep", 0.0, 1.0)
        number_within(damping, "damping", 0.0, 1.0)
        self.tokenizer = tokenizer
        self.at_step, self.on_metric = at_step, on_metric
        self.interval = Interval(every_n_steps)
        self.protect: str = one_of(protect, tuple(PROTECTIONS), "protect")
        self.into: str = one_of(into, tuple(HOSTS), "into")
        self.keep, self.damping = keep, damping
        for edit in self.given if protect == "resolve" else ():
            check_weighting(edit)
            if not (has_keys(edit) and has_values(edit)):
                raise no_keys(edit, protect, "keys and values")
        self.response_mask = BatchResponseMask()  # nothing here reads it
        self.ranks = Ranks()
        self.edits = list(self.given)
        self.is_applied = False
        self._host: EditHost | None = None
        self._protection: Protection | None = None
        self._loaded: dict[str, Tensor] | None = None  # of a checkpoint, until the start
        self._before: tuple[object, dict[str, Tensor]] | None = None  # whose weights, and these before a checkpoint, until the start
        self._to_check: SavedWeights | None = None  # of a checkpoint that was loaded, until the first step
        self._last_step = 0
        self._at_application: list[float] = []  # probability of each edit
        self._faded: list[bool] = []
        self._resolved = 0  # how often edits were solved again

    @property
    def name(self) -> str:
        """What tells these edits from others in the same run."""
        return ",".join(edit.name for edit in self.given)

    def __repr__(self) -> str:
        when = f"at step {self.at_step}" if self.on_metric is None else f"on {self.on_metric.metric}"
        return f"EditRun({self.name} {when}, into {self.into}, protect={self.protect})"

    @property
    def is_attached(self) -> bool:
        return self._host is not None

    # ---- life

    def attach(self, model: nn.Module, ranks: Ranks) -> None:
        """Finds the places of the edits in a model, and makes the adapter for them, before optimisers and DDP are made.

        Raises:
            EditError, WrongModelError: matrices that cannot be edited, or another model. ConfigError: no adapter to put one beside; an
            adapter that would be as large as the matrices; edits that this protection cannot protect.
        """
        self.detach()
        host = HOSTS[self.into](model)
        protection = PROTECTIONS[self.protect](model, host, self.damping)
        protection.check(self.given)
        self.ranks, self._host, self._protection = ranks, host, protection
        try:
            host.prepare(self.given)
            if self._before is None or self._before[0] is not host.edited:
                self._before = host.edited, host.weights(self.given)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Leaves the optimisers alone; edits that were applied stay in the model. May be called at any time."""
        if self._protection is not None:
            self._protection.detach()
        if self._host is not None:
            self._host.settle()
        self._protection = self._host = None

    def end(self) -> None:
        """When training has come to its end: warns where the edits were never applied (EditNotAppliedWarning)."""
        if not self.is_applied:
            awaited = f"step {self.at_step}" if self.on_metric is None else f"the metric '{self.on_metric.metric}'"
            warnings.warn(
                f"edits {self.name} are not in the model: training ended at step {self._last_step}, and they waited for {awaited}",
                EditNotAppliedWarning,
                stacklevel=2,
            )

    def renew(self) -> None:
        """Begins another training run of this object, with the edits as they were given."""
        self.detach()
        self.edits, self.is_applied = list(self.given), False
        self._loaded, self._to_check, self._last_step = None, None, 0
        self._at_application, self._faded, self._resolved = [], [], 0

    def start(self, step: int, optimizers: Sequence[Optimizer], *, state_place: str = "a state of these edits") -> dict[str, float] | None:
        """Starts training, or goes on, after `step` optimiser steps; weights are loaded by then. All ranks call it together.

        Args:
            state_place: where the state is in a checkpoint that has one, for messages.

        Returns:
            Metrics where edits were applied.

        Raises:
            ConfigError: the checkpoint does not say whether the edits are in its weights. DamagedFileError: other weights than those that
            the state belongs to. WrongModelError: a run begins with weights that edits were not solved for, and does not solve them again.
            EditError: weights with edits that were changed outside of a run. Otherwise as `EditedWeights.apply`.
        """
        host, protection = self._attached()
        host.start()
        before = {} if self._before is None else self._before[1]
        self._before = None
        if self._loaded is not None:
            self._to_check = self._restore(self._loaded, before)
            self._loaded = None
        elif step != self._last_step and (step > self.at_step or self.on_metric is not None):
            raise _no_state(step, state_place)
        else:
            if step == 0:  # otherwise a checkpoint was loaded, of which other runs may know more
                host.check_unchanged()
            other = host.solved_elsewhere(self.edits, before)
            if other and self.protect != "resolve":
                raise _other_weights(other)
        self._last_step = step
        host.is_training = True
        protection.hook(optimizers)
        if not self.is_applied and self.on_metric is None and step >= self.at_step:
            return self._apply()
        return None

    def before_step(self) -> None:
        """When gradients are complete, before an optimiser uses them.

        Raises:
            ConfigError, DamagedFileError: before the first step after a checkpoint was loaded, whose edits or weights are not all there.
        """
        if self._to_check is not None:
            self._attached()[0].check_restored(self.edits if self._to_check.hashes else [], self._to_check)
            self._to_check = None
        if self.is_applied and self._protection is not None:
            self._protection.before_step()

    def advance(self, step: int, metrics: Mapping[str, Any] | None = None) -> dict[str, float] | None:
        """After `step` optimiser steps. All ranks call it together.

        Args:
            metrics: of the trainer, for edits that wait for one.

        Returns:
            Metrics when the edits were applied or measured, otherwise None.
        """
        last_step, self._last_step = self._last_step, step
        if step == last_step:  # gradients are being accumulated
            return None
        if not self.is_applied:
            if self.on_metric is None and step >= self.at_step:
                return self._apply()
            return self.seen(metrics or {})
        return self._measure() if self.interval.is_due(step, last_step) else None

    def seen(self, metrics: Mapping[str, Any]) -> dict[str, float] | None:
        """Applies the edits when these metrics are what they wait for. All ranks call it together; the first one decides."""
        if self.is_applied or self.on_metric is None or self._host is None:
            return None
        crossed = torch.tensor(self.on_metric.is_in(metrics), dtype=torch.uint8)
        self.ranks.broadcast(crossed)
        return self._apply() if bool(crossed) else None

    # ---- edits on the model

    def _attached(self) -> tuple[EditHost, Protection]:
        if self._host is None or self._protection is None:
            raise _no_attach_so_far()
        return self._host, self._protection

    def _apply(self) -> dict[str, float]:
        host, protection = self._attached()
        solves = self.protect == "resolve"
        is_stale = solves and bool(host.solved_elsewhere(self.edits, {}))
        self.edits = host.put(self.edits)
        self.is_applied = True
        protection.protect(self.edits)
        if is_stale or (solves and max(self._read()[1]) > _MOVED):
            self._resolve()
        return self._measure()

    def _measure(self) -> dict[str, float]:
        """Metrics of the edits as they are now; those that faded are solved again first where that is asked for."""
        probabilities, drifts = self._read()
        is_first = not self._at_application
        if is_first:
            self._at_application, self._faded = probabilities, [False] * len(self.edits)
        faded = self._fading(probabilities)
        if any(faded) and self.protect == "resolve":
            self._resolve()
            probabilities, drifts = self._read()
            faded = self._fading(probabilities)
        for edit, p, first, is_faded, was_faded in zip(self.edits, probabilities, self._at_application, faded, self._faded, strict=True):
            if is_faded and not was_faded:
                warnings.warn(
                    f"edit '{edit.name}' fades: the probability of its targets is {p:.3f}, {first:.3f} when it was applied",
                    EditFadesWarning,
                    stacklevel=2,
                )
        self._faded = faded
        metrics = {metric_name("edit", edit.name, "probability"): p for edit, p in zip(self.edits, probabilities, strict=True)}
        metrics |= {metric_name("edit", edit.name, "key_drift"): d for edit, d in zip(self.edits, drifts, strict=True)}
        if self.protect == "resolve":
            metrics[metric_name("edit", "resolved")] = float(self._resolved)
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def _fading(self, probabilities: Sequence[float]) -> list[bool]:
        return [p < self.keep * first for p, first in zip(probabilities, self._at_application, strict=True)]

    def _read(self) -> tuple[list[float], list[float]]:
        """Probability and key drift of each edit, those of the first rank on all ranks; NaN where there is none."""
        model = self._attached()[0].edited.model
        probabilities = target_probability(model, self.tokenizer, self.edits)
        drifts = [key_drift(edit, keys_now(model, self.tokenizer, edit)) if has_keys(edit) else math.nan for edit in self.edits]
        both = torch.tensor([probabilities, drifts], dtype=torch.float64)
        self.ranks.broadcast(both)
        first, second = both.tolist()
        return first, second

    def _resolve(self) -> None:
        host, protection = self._attached()
        self.edits = solve_again(self.tokenizer, host, self.edits, self.ranks)
        self._resolved += 1
        protection.protect(self.edits)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """Flat CPU tensors: the step, and of edits that are applied their factors, keys, values and readings, and hashes of the weights.

        See `steer.training.edit_state` for the names.
        """
        if self._loaded is not None:  # not started yet
            return dict(self._loaded)
        state = {"step": torch.tensor(self._last_step), "applied": torch.tensor(self.is_applied)}
        if self._host is None or self._protection is None:
            return state
        if not self.is_applied:
            return state | self._host.saved([]).tensors()
        state["probability"] = torch.tensor(self._at_application, dtype=torch.float64)
        state["faded"], state["resolved"] = torch.tensor(self._faded), torch.tensor(self._resolved)
        state |= edit_tensors(self.edits) | self._host.saved(self.edits).tensors()
        return state | {f"protection/{name}": tensor for name, tensor in self._protection.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor], *, is_first_rank: bool) -> None:
        """Holds a saved state until the start, when the weights of the checkpoint are loaded."""
        edits_from(state, self.given)  # finds fault with it now
        self._loaded = dict(state)

    def reload(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to the edits of a saved state whose weights were loaded into the model, as when a trainer ends with its best one.

        Warns (EditNotAppliedWarning) of a state from before the application, and of other edits that it has and the model has not.
        """
        self._restore(dict(state), {})
        told = [f"edits {self.name} are not in the model: the checkpoint of step {self._last_step} is from before they were applied"]
        told = [] if self.is_applied else told
        told += [f"edit '{name}' is in the weights, and not on the model" for name in self._attached()[0].missing(SavedWeights.of(state))]
        for text in told:
            warnings.warn(text, EditNotAppliedWarning, stacklevel=2)

    def _restore(self, state: dict[str, Tensor], before: Mapping[str, Tensor]) -> SavedWeights | None:
        """Returns what the weights of the checkpoint held where that is to be compared before the first step."""
        host, protection = self._attached()
        saved = SavedWeights.of(state)
        self._last_step = int(state["step"])
        self.is_applied = False
        self.edits = list(self.given)
        if not bool(state["applied"]):
            self._at_application, self._faded, self._resolved = [], [], 0
            host.withdraw(self.edits, saved)
            return saved if host.missing(saved) else None
        edits = edits_from(state, self.given)
        is_sure = host.restore(edits, saved, before)
        self.edits, self.is_applied = edits, True
        self._at_application = state["probability"].tolist()
        self._faded, self._resolved = state["faded"].tolist(), int(state["resolved"])
        prefix = "protection/"
        of_protection = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        protection.load_state_dict(of_protection, self.edits)
        return None if is_sure and not host.missing(saved) else saved


# ---- errors


def _step_and_metric(at_step: int, on_metric: MetricCrossing) -> ConfigError:
    return ConfigError(
        "edits wait for a step and for a metric",
        expected="at_step or on_metric, not both",
        found=f"at_step={at_step} and on_metric for '{on_metric.metric}'",
        remedy="leave one of them out",
    )


def _unclear_edits(names: Sequence[str]) -> ConfigError:
    twice = next((name for name in names if names.count(name) > 1), None)
    return ConfigError(
        "the edits of a run need names of their own",
        expected="one or more edits, each of another name",
        found="none" if twice is None else f"two called '{twice}'",
        remedy="pass a list of edits" if twice is None else "rename one: edit.named('...')",
    )


def _other_weights(other: Mapping[str, Sequence[str]]) -> WrongModelError:
    name, paths = next(iter(other.items()))
    return WrongModelError(
        f"edit '{name}' was solved for other weights than training begins with",
        expected="the matrices whose hashes it holds, in the dtype that they had",
        found=f"other numbers in {', '.join(paths[:3])}",
        remedy="solve it for this model, loaded as it is trained; or pass protect='resolve', which solves it again when it is applied",
    )


def _no_state(step: int, place: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint of step {step} holds no state of these edits, so that it is not known whether they are in its weights",
        expected=place,
        found="no such state: the checkpoint was saved without this callback, or is not whole",
        remedy="resume from an earlier checkpoint that has it; to begin with the edits here, start a new run from the checkpoint's weights",
    )


def _no_attach_so_far() -> AttachError:
    return AttachError(
        "this run has no model yet",
        expected="a call of attach before training starts",
        found="no attach so far",
        remedy="call run.attach(model, Ranks()) first",
    )
