"""HFSteeringCallback: a plan of interventions that acts while a Hugging Face Trainer, or one of TRL's, trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from steer.callbacks.hf import TrainerRun
from steer.errors import ConfigError
from steer.intervene import Attachment, Plan
from steer.intervene.deploy import Handover
from steer.model.restoring import replaced
from steer.training.ranks import Ranks
from steer.training.steering_run import SteeringRun


class HFSteeringCallback(TrainerRun):
    """Steers the model of a `transformers.Trainer`, TRL's SFT, DPO and GRPO trainers included, between its begin and its end.

    The twin of `SteeringCallback`: same arguments, same rules. The reference pass of DPO and GRPO is never steered.
    `phases=("train",)` leaves alone evaluations, the completions that GRPO samples, and the passes without gradients in which GRPO takes
    the old log-probabilities (with several iterations or steps per generation); name `validate` to steer those passes and evaluations.

    What the plan learns follows the trainer's optimiser as in `SteeringCallback`. Its gradients are clipped with `max_grad_norm`, unless
    its parameters are in an optimiser that the trainer was given: the trainer clips those of its model only. With
    `load_best_model_at_end` they end as they were in the best checkpoint, too.

    Metrics `steer/<intervention>/strength` and `/tokens` join the trainer's own log entries.

    An engine that samples completions by itself (vLLM) gets the weights of the model and no hooks, which is said at the start, or refused
    when the plan shall act in the phase `generate`. With `bake_rollouts=True` the weights hold the plan while TRL synchronises them, see
    `steer.Handover` for what they can hold:

        HFSteeringCallback(plan, phases=("train", "generate"), bake_rollouts=True).attach(trainer)

    Args:
        plan, schedule, phases, every_n_steps, learning_rate: as of `SteeringCallback`.
        bake_rollouts: see above.

    Raises:
        ConfigError: as of `SteeringCallback`; baked rollouts of a plan that does not act in the phase `generate`.

    Example:
        >>> steering = HFSteeringCallback(plan)
        >>> steering.attach(trainer)  # a transformers.Trainer, or one of TRL's
        >>> trainer.train()
        >>> steering.attachment.fired()
    """

    kind = "steering_state"
    _run: SteeringRun

    def __init__(
        self,
        plan: Plan,
        *,
        schedule: Any = None,
        phases: Sequence[str] = ("train",),
        every_n_steps: int = 10,
        learning_rate: float | None = None,
        bake_rollouts: bool = False,
    ) -> None:
        super().__init__(SteeringRun(plan, schedule=schedule, phases=phases, every_n_steps=every_n_steps, learning_rate=learning_rate))
        if bake_rollouts and "generate" not in self._run.phases:
            raise _no_rollouts_to_bake(self._run.phases)
        self.plan = plan
        self._bake_rollouts = bake_rollouts
        self._handover: Handover | None = None  # while the completions of a training run are sampled elsewhere

    @property
    def attachment(self) -> Attachment | None:
        """The plan on the model: `attachment.fired()` tells what it steered, during training and after. None before the first attach."""
        return self._run.attachment

    def begin(self, model: nn.Module, ranks: Ranks) -> None:
        callbacks = self._trainer.callback_handler.callbacks
        steering = [callback for callback in callbacks if isinstance(callback, HFSteeringCallback) and callback is not self]
        stack = any(callback._run.is_attached for callback in steering)
        engine = rollout_engine(self._trainer)
        if engine is not None and self._bake_rollouts:
            if synchronisation(self._trainer) is None:
                raise _no_synchronisation(engine)
            self._run.detach()
            self._handover = Handover(self.plan, model)  # proved on the model without hooks
        self._run.attach(model, ranks, stack=stack)
        if engine is not None and self._handover is None:
            self._check_rollouts(engine)

    def _check_rollouts(self, engine: str) -> None:
        """Says, or refuses, that completions are sampled by an engine of its own, which gets the weights and no hooks."""
        attachment = self._run.attachment
        assert attachment is not None
        generating = [name for name in self._run.names if "generate" in attachment[name].phases]
        if generating:
            raise _rollouts_elsewhere(engine, generating)
        warnings.warn(
            f"completions are sampled by {engine}, which never sees the plan: only the passes of the trainer's own model are steered",
            stacklevel=2,
        )

    def start(self, step: int) -> None:
        trainer = self._trainer
        if self.plan.parameters() and trainer.is_deepspeed_enabled:
            raise _steps_by_itself()
        optimizers = [getattr(trainer.optimizer, "optimizer", trainer.optimizer)]  # unwrapped
        self._run.start(step, trainer.model, optimizers, state_place=self.state_place())

    @contextmanager
    def wrapped_methods(self, trainer: Trainer) -> Iterator[None]:
        with (
            super().wrapped_methods(trainer),
            replaced(trainer, "training_step", self._wrap_training_step(trainer.training_step)),
            self._wrapped_synchronisation(trainer),
        ):
            yield

    @contextmanager
    def _wrapped_synchronisation(self, trainer: Trainer) -> Iterator[None]:
        """The weights hold the plan while the engine that samples completions copies them."""
        if not self._bake_rollouts or (found := synchronisation(trainer)) is None:
            yield
            return
        owner, name = found
        synchronise = getattr(owner, name)

        @wraps(synchronise)
        def synchronise_with_plan(*args: Any, **kwargs: Any) -> Any:
            attachment = self._run.attachment
            assert self._handover is not None and attachment is not None
            with self._handover.weights(attachment):
                return synchronise(*args, **kwargs)

        with replaced(owner, name, synchronise_with_plan):
            try:
                yield
            finally:
                self._handover = None

    def _wrap_training_step(self, training_step: Callable[..., Any]) -> Callable[..., Any]:
        """No event lies between the backward pass and the clipping of gradients."""

        @wraps(training_step)
        def training_step_with_average(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            self._run.learning.average_gradients()
            return loss

        return training_step_with_average

    # ---- events

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.batch_start(None)  # compute_loss tells of the batch

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.batch_end()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.learning.check_gradients()
        self._run.learning.step(scaler=self._trainer.accelerator.scaler, clip=args.max_grad_norm or 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.learning.zero_grad()  # the trainer drops those of its model
        self._run.batch_end()
        metrics = self._run.advance(state.global_step)
        if metrics is not None:
            self.report(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is None:
            return
        if (saved := self.load(Path(best))) is not None:
            self._run.load_learned(saved)
        elif self.plan.parameters():
            warnings.warn(f"the best checkpoint lacks {self.file(Path(best)).name}: the plan stays as it was learned last", stacklevel=2)


def rollout_engine(trainer: Any) -> str | None:
    """What samples the completions of a trainer of TRL's, where it is not the trained model itself; None otherwise."""
    if getattr(trainer, "use_vllm", False) or getattr(trainer.args, "use_vllm", False):
        mode = getattr(trainer, "vllm_mode", None) or getattr(trainer.args, "vllm_mode", None)
        return f"vLLM ({mode})" if mode else "vLLM"
    if getattr(trainer, "rollout_func", None) is not None:
        return "a rollout_func"
    if getattr(trainer.args, "vllm_server_base_url", None) and not hasattr(
        trainer.args, "use_vllm"
    ):  # asynchronous trainers have no choice
        return "a vLLM server"
    return None


def synchronisation(trainer: Any) -> tuple[Any, str] | None:
    """The method of TRL's that copies the weights of the model to the engine, as its owner and name; None where there is none."""
    engine = getattr(trainer, "vllm_generation", None)
    if hasattr(engine, "sync_weights"):
        return engine, "sync_weights"
    return (trainer, "_move_model_to_vllm") if hasattr(trainer, "_move_model_to_vllm") else None


# ---- errors


def _rollouts_elsewhere(engine: str, names: list[str]) -> ConfigError:
    return ConfigError(
        f"completions are sampled by {engine}, which gets the weights of the model and never sees the plan",
        expected="rollouts of the trained model itself, where an intervention acts in the phase 'generate'",
        found=f"{engine}, and {', '.join(names)} in that phase",
        remedy="pass use_vllm=False (and no rollout_func), leave 'generate' out of phases=..., or let the weights carry the plan: "
        "bake_rollouts=True, or steer.bake(plan, model) beforehand",
    )


def _no_rollouts_to_bake(phases: Sequence[str]) -> ConfigError:
    return ConfigError(
        "bake_rollouts=True is for a plan that acts in rollouts",
        expected="the phase 'generate' among phases=...",
        found=", ".join(phases),
        remedy="pass phases=('train', 'generate'), or leave bake_rollouts out",
    )


def _no_synchronisation(engine: str) -> ConfigError:
    return ConfigError(
        f"completions are sampled by {engine}, and it is not known where it gets the weights of the model",
        expected="a trainer of TRL's that copies them: vllm_generation.sync_weights, or _move_model_to_vllm",
        found="neither",
        remedy="copy the weights inside `with steer.Handover(plan, model).weights(attachment):` yourself, and leave bake_rollouts out",
    )


def _steps_by_itself() -> ConfigError:
    return ConfigError(
        "DeepSpeed steps by itself, so that a plan cannot learn beside it",
        expected="an optimiser that the trainer steps",
        found="a DeepSpeed engine",
        remedy="train the plan with DDP or FSDP",
    )
