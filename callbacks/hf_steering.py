"""HFSteeringCallback: a plan of interventions that acts while a Hugging Face Trainer, or one of TRL's, trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from steer.callbacks.hf import TrainerRun
from steer.callbacks.ranks import Ranks
from steer.callbacks.runs import SteeringRun, every
from steer.intervene import Plan


class HFSteeringCallback(TrainerRun):
    """Steers the model of a `transformers.Trainer`, TRL's SFT, DPO and GRPO trainers included, between its begin and its end.

        trainer = DPOTrainer(model, args=..., train_dataset=..., peft_config=...)
        HFSteeringCallback(plan).attach(trainer)
        trainer.train()

    The twin of `SteeringCallback`: same arguments, same rules. The reference pass of DPO and GRPO is never steered. With
    `phases=("train",)` neither are evaluations, the completions that GRPO samples, nor the passes without gradients in which GRPO takes
    the old log-probabilities (with several iterations or steps per generation; name `validate` to steer those, and evaluations, too).

    Metrics `steer/<intervention>/strength` and `/tokens` join the trainer's own log entries.
    """

    kind = "steering_state"
    _run: SteeringRun

    def __init__(self, plan: Plan, *, schedule: Any = None, phases: Sequence[str] = ("train",), every_n_steps: int = 10) -> None:
        super().__init__(SteeringRun(plan, schedule, phases))
        self.plan, self.every_n_steps = plan, every(every_n_steps)

    def begin(self, model: nn.Module, ranks: Ranks) -> None:
        others = [one for one in self._trainer.callback_handler.callbacks if isinstance(one, HFSteeringCallback) and one is not self]
        self._run.begin(model, ranks, stack=any(one._run.attached for one in others))

    def start(self, step: int) -> None:
        self._run.start(step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.batch(None)  # compute_loss tells of the batch

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.ran()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.ran()
        if state.global_step % self.every_n_steps == 0:
            self.report(self._run.metrics())
        self.plan.step(state.global_step)

    def state_dict(self) -> dict[str, Tensor]:
        return self._run.state_dict()
