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

from steer.callbacks.hf import TrainerRun, replaced
from steer.errors import ConfigError
from steer.intervene import Attachment, Plan
from steer.training.ranks import Ranks
from steer.training.steering_run import SteeringRun


class HFSteeringCallback(TrainerRun):
    """Steers the model of a `transformers.Trainer`, TRL's SFT, DPO and GRPO trainers included, between its begin and its end.

        trainer = DPOTrainer(model, args=..., train_dataset=..., peft_config=...)
        HFSteeringCallback(plan).attach(trainer)
        trainer.train()

    The twin of `SteeringCallback`: same arguments, same rules. The reference pass of DPO and GRPO is never steered.
    `phases=("train",)` leaves alone evaluations, the completions that GRPO samples, and the passes without gradients in which GRPO takes
    the old log-probabilities (with several iterations or steps per generation); name `validate` to steer those passes and evaluations.

    What the plan learns follows the trainer's optimiser as in `SteeringCallback`. Its gradients are clipped with `max_grad_norm`, unless
    its parameters are in an optimiser that the trainer was given: the trainer clips those of its model only. With
    `load_best_model_at_end` they end as they were in the best checkpoint, too.

    Metrics `steer/<intervention>/strength` and `/tokens` join the trainer's own log entries.
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
    ) -> None:
        super().__init__(SteeringRun(plan, schedule=schedule, phases=phases, every_n_steps=every_n_steps, learning_rate=learning_rate))
        self.plan = plan

    @property
    def attachment(self) -> Attachment | None:
        """The plan on the model: `attachment.fired()` tells what it steered, during training and after. None before the first attach."""
        return self._run.attachment

    def begin(self, model: nn.Module, ranks: Ranks) -> None:
        callbacks = self._trainer.callback_handler.callbacks
        steering = [callback for callback in callbacks if isinstance(callback, HFSteeringCallback) and callback is not self]
        stack = any(callback._run.is_attached for callback in steering)
        self._run.attach(model, ranks, stack=stack)
        self._check_rollouts()

    def _check_rollouts(self) -> None:
        """Says, or refuses, that completions are sampled by an engine of its own, which gets the weights and no hooks."""
        engine = rollout_engine(self._trainer)
        if engine is None:
            return
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
        with super().wrapped_methods(trainer), replaced(trainer, "training_step", self._wrap_training_step(trainer.training_step)):
            yield

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


def _rollouts_elsewhere(engine: str, names: list[str]) -> ConfigError:
    return ConfigError(
        f"completions are sampled by {engine}, which gets the weights of the model and never sees the plan",
        expected="rollouts of the trained model itself, where an intervention acts in the phase 'generate'",
        found=f"{engine}, and {', '.join(names)} in that phase",
        remedy="pass use_vllm=False (and no rollout_func), leave 'generate' out of phases=..., or bake the plan into the model beforehand: "
        "steer.bake(plan, model)",
    )


def _steps_by_itself() -> ConfigError:
    return ConfigError(
        "DeepSpeed steps by itself, so that a plan cannot learn beside it",
        expected="an optimiser that the trainer steps",
        found="a DeepSpeed engine",
        remedy="train the plan with DDP or FSDP",
    )
