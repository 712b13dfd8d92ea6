"""SteeringRun: what a plan does at each event of a training run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steer.checks import of_type
from steer.drift.metric_names import check_metric_names, metric_name
from steer.errors import AttachError, ConfigError, HookDidNotRunError
from steer.intervene import Attachment, Plan, attachment_state
from steer.intervene import schedule as schedules
from steer.model.context import PHASES
from steer.training import state as states
from steer.training.batches import BatchResponseMask
from steer.training.interval import Interval
from steer.training.learning import Learning
from steer.training.ranks import Ranks


class SteeringRun:
    """A plan in a training run: attached with the phases and the schedule of the run, its strengths following the optimiser steps.

        run = SteeringRun(plan, phases=("train",), every_n_steps=10)
        run.attach(model, Ranks())
        run.start(0, model, [optimizer])
        for step, batch in enumerate(batches, 1):
            run.batch_start(batch)
            model(**batch).loss.backward()
            run.learning.average_gradients()
            run.learning.step()
            optimizer.step()
            run.batch_end()
            metrics = run.advance(step)
        run.detach()

    Every training run starts from the plan as it was given, unless it goes on from a saved state (`renew`).

    Args:
        plan: what acts. Nothing of it changes but what it learns.
        phases: the interventions act in those of their own phases that are named here.
        schedule: takes the place of every intervention's own.
        every_n_steps: optimiser steps between two log entries.
        learning_rate: of the plan's parameters, see `Learning`.

    Attributes:
        attachment: the plan on the model, None before the first attach; its state and counts stay readable after the last detach.

    Raises:
        ConfigError: no plan, or a phase, schedule, interval or rate that does not exist.
    """

    def __init__(
        self, plan: Plan, *, phases: Sequence[str], schedule: Any = None, every_n_steps: int = 10, learning_rate: float | None = None
    ) -> None:
        of_type(plan, Plan, "the plan of a callback", "pass Plan([...]), not an intervention")
        self.plan = plan
        self.schedule = None if schedule is None else schedules.from_dict(schedule)
        self.phases = (phases,) if isinstance(phases, str) else tuple(phases)
        if not self.phases or not set(self.phases) <= set(PHASES):
            raise _unknown_phase(self.phases)
        self.interval = Interval(every_n_steps)
        self.learning = Learning(plan, learning_rate)
        self.names = [intervention.name for intervention in plan.interventions]
        check_metric_names(self.names, "interventions")
        self.response_mask = BatchResponseMask()
        self.ranks = Ranks()
        self.attachment: Attachment | None = None
        self._waiting_state: dict[str, Any] | None = None  # came before the first attach
        self._state_loaded = False  # since the last start
        self._last_step = 0
        self._learned_at_end: dict[str, dict[str, Tensor]] = {}  # by the last training run, of each intervention
        self._learned_at_start = _learned(plan)  # what each training run begins with
        self._tokens_before = torch.zeros(len(self.names), dtype=torch.long)  # steered before the attach, of this rank: [interventions]
        self._passes_before: int | None = None  # before the first batch; None until it starts
        self._first_batch_ran = False

    @property
    def name(self) -> str:
        """What tells this plan from another one in the same run."""
        return ",".join(self.names)

    def __repr__(self) -> str:
        return f"SteeringRun({self.attachment or self.plan} in {', '.join(self.phases)})"

    @property
    def is_attached(self) -> bool:
        """The hooks are on the model."""
        return self.attachment is not None and self.attachment.is_attached

    def attach(self, model: nn.Module, ranks: Ranks, *, stack: bool = False) -> None:
        """Attaches the plan; anew, with the state that it has, when it was attached before (a trainer may move the model).

        Raises:
            ConfigError: no intervention acts in any of the phases. Otherwise as `Plan.attach`.
        """
        self.detach()
        if not any(set(intervention.phases) & set(self.phases) for intervention in self.plan.interventions):
            raise _does_nothing(self.plan, self.phases)
        state = self._waiting_state if self.attachment is None else self.attachment.state_dict()
        tokens = self._tokens()
        self.attachment = attachment = self.plan.attach(model, stack=stack, phases=self.phases, schedule=self.schedule)
        self._tokens_before = tokens
        if state is not None:
            attachment.load_state_dict(state)
        self._waiting_state = None
        self.response_mask.install(model)
        self.ranks = ranks
        self._first_batch_ran = False
        self._passes_before = None

    def detach(self) -> None:
        """Detaches the plan; may be called at any time."""
        self.response_mask.remove()
        if self.attachment is not None and self.attachment.is_attached:
            self.attachment.detach()
            self._learned_at_end = _learned(self.plan)

    def renew(self) -> None:
        """Puts back what earlier training runs of this object changed: learned tensors, strengths, windows, counts.

        Called before the attach of a training run that begins at its first step: the next trial of a hyperparameter search, a second `fit`.
        Tensors that were set since the last run count as given. A state that was loaded since then stays.
        """
        self.detach()
        if self._state_loaded:
            return
        learned = _learned(self.plan)
        for intervention in self.plan.interventions:
            now, at_end = learned[intervention.name], self._learned_at_end.get(intervention.name, {})
            if at_end and all(torch.equal(tensor, at_end[name]) for name, tensor in now.items()):
                attachment_state.load_learned(intervention, self._learned_at_start[intervention.name])
            else:
                self._learned_at_start[intervention.name] = now
        self.attachment = None
        self._tokens_before = torch.zeros_like(self._tokens_before)
        self._last_step = 0

    def start(self, step: int, model: nn.Module, optimizers: Sequence[Optimizer], *, state_place: str = "a state of this plan") -> None:
        """Starts training, or goes on, after `step` optimiser steps. All ranks call it together.

        Args:
            model, optimizers: as of `Learning.start`.
            state_place: where the state is in a checkpoint that has one, for messages.

        Raises:
            ConfigError: the plan has parameters that nothing would train, or learned ones whose state the checkpoint does not hold.
        """
        attachment = self._attachment()
        if step not in (0, self._last_step) and not self._state_loaded:
            if any(parameter.requires_grad for parameter in self.plan.parameters()):
                raise _no_plan_state(step, state_place)
            warnings.warn(
                f"the checkpoint holds no state of this plan ({state_place}): its strengths are those it was made with", stacklevel=2
            )
        self.learning.start(attachment, model, optimizers, self.ranks)
        if not self._state_loaded:
            self._tokens_before = -self._fired()  # what a sanity check or an earlier run did is not counted
        self._state_loaded = False
        self._last_step = step
        attachment.step(step)

    def batch_start(self, batch: Any) -> None:
        """Takes the response mask of the training batch that is about to be run; None when there is no batch to read it from."""
        self.response_mask.read(batch)
        if not self._first_batch_ran and self._passes_before is None:
            self._passes_before = self._attachment().passes

    def batch_end(self) -> None:
        """Forgets the training batch. Raises HookDidNotRunError when no forward pass of the first one went through the plan."""
        self.response_mask.clear()
        if self._first_batch_ran:  # asked once only: the answer waits for the device
            return
        if self._passes_before == self._attachment().passes:
            raise _model_did_not_run(self.plan)
        self._first_batch_ran = True

    def advance(self, step: int) -> dict[str, float] | None:
        """Sets the strengths that belong to the next step, after `step` optimiser steps. All ranks call it together.

        Returns:
            Metrics of the step before when a log entry is due, otherwise None.
        """
        last_step = self._last_step
        if step == last_step:  # gradients are being accumulated
            return None
        metrics = self.metrics() if self.interval.is_due(step, last_step) else None
        self._last_step = step
        self._attachment().step(step)
        return metrics

    def metrics(self) -> dict[str, float]:
        """Strength now (mean over row slots), and tokens steered so far over all ranks, which must call this together."""
        attachment = self._attachment()
        tokens = self.ranks.sum(self._tokens()).tolist()
        strengths = {metric_name("steer", name, "strength"): float(attachment[name].strength.mean()) for name in self.names}
        return strengths | {metric_name("steer", name, "tokens"): float(count) for name, count in zip(self.names, tokens, strict=True)}

    def _attachment(self) -> Attachment:
        if self.attachment is None:
            raise _no_attach_so_far()
        return self.attachment

    def _fired(self) -> Tensor:
        """Tokens steered since the last attach, of this rank: [interventions]."""
        fired = {} if self.attachment is None else self.attachment.fired()
        return torch.tensor([fired.get(name, 0) for name in self.names])

    def _tokens(self) -> Tensor:
        """Tokens steered since the run began, of this rank: [interventions]."""
        return self._tokens_before + self._fired()

    # ---- checkpoints

    def _plan_state(self) -> dict[str, Any]:
        """State of the attachment; before the first attach the one that it will begin with."""
        if self.attachment is not None:
            return self.attachment.state_dict()
        return self._waiting_state or attachment_state.initial_state(self.plan)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat CPU tensors, see `steer.training.state`. All ranks must call it together."""
        tokens = self.ranks.sum(self._tokens()).tolist()
        plan_state = states.flatten(self._plan_state(), dict(zip(self.names, tokens, strict=True)))
        return plan_state | self.learning.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], *, is_first_rank: bool) -> None:
        """Goes on from a saved state; before the first attach it is held until then.

        Args:
            is_first_rank: this rank takes over what was summed over the ranks.

        Raises:
            ConfigError: the state belongs to a plan with other interventions.
        """
        plan_state = states.unflatten(state)
        if self.attachment is not None:
            self.attachment.load_state_dict(plan_state)
        else:
            attachment_state.check_state(self.plan, plan_state)
            self._waiting_state = plan_state
        self.learning.load_state_dict(state)
        saved_tokens = [states.steered_tokens(state, name) if is_first_rank else 0 for name in self.names]
        self._tokens_before = torch.tensor(saved_tokens) - self._fired()
        self._state_loaded = True

    def load_learned(self, state: Mapping[str, Tensor]) -> None:
        """Takes the learned tensors of a saved state, and nothing else of it."""
        for intervention in self.plan.interventions:
            attachment_state.load_learned(intervention, states.learned_tensors(state, intervention.name))


def _learned(plan: Plan) -> dict[str, dict[str, Tensor]]:
    """Copies of the parameters of a plan: intervention -> name -> tensor."""
    return {
        intervention.name: {name: parameter.detach().cpu().clone() for name, parameter in intervention.parameters.items()}
        for intervention in plan.interventions
    }


# ---- errors


def _no_plan_state(step: int, place: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint of step {step} holds no state of a plan that learns, which would begin again from its first values",
        expected=place,
        found="no such state: the checkpoint was saved without this callback, or is not whole",
        remedy="resume from an earlier checkpoint that has it; to begin with this plan here, start a new run from the checkpoint's weights",
    )


def _unknown_phase(phases: tuple[str, ...]) -> ConfigError:
    remedy = f"name the phases in which the plan acts, e.g. phases=('{PHASES[0]}',)"
    return ConfigError("unknown or missing phase", expected=f"some of {', '.join(PHASES)}", found=phases or "none", remedy=remedy)


def _does_nothing(plan: Plan, phases: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        "this plan does nothing in this run",
        expected=f"an intervention that acts in one of: {', '.join(phases)}",
        found={intervention.name: intervention.phases for intervention in plan.interventions},
        remedy="pass phases=... to the callback, or to the interventions",
    )


def _no_attach_so_far() -> AttachError:
    return AttachError(
        "this run has no model yet",
        expected="a call of attach before training starts",
        found="no attach so far",
        remedy="call run.attach(model, Ranks()) first",
    )


def _model_did_not_run(plan: Plan) -> HookDidNotRunError:
    sites = sorted({str(intervention.site) for intervention in plan.interventions})
    return HookDidNotRunError(
        "the first training batch did not run the steered model",
        expected="at least one forward pass through it",
        found=f"none, though the plan is attached at {', '.join(sites)}",
        remedy="train the model that the callback was given, not a copy, and do not bypass its __call__",
    )
