"""HFDriftCallback: a tracker that measures while a Hugging Face Trainer, or one of TRL's, trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from steer.callbacks.hf import TrainerRun
from steer.drift.tracker import DriftTracker
from steer.training.drift_run import DriftRun
from steer.training.ranks import Ranks


class HFDriftCallback(TrainerRun):
    """Measures the drift of named directions and features while a `transformers.Trainer` trains, TRL's SFT, DPO and GRPO trainers included.

    The twin of `DriftCallback`: same arguments, same rules. A measurement asks the trainer for a log entry, which it then joins, so it is
    in `state.log_history` and in every logger. The latest one also joins the metrics of each evaluation under `eval_drift/...`, for
    `metric_for_best_model` and `EarlyStoppingCallback`; a warning says so where it is older than the evaluation. `effect_sd` has a sign:
    the smallest is the furthest against the direction. Attach it after an `HFSteeringCallback` when the training tokens shall be read as
    steered.

    Example:
        >>> HFDriftCallback(tracker, every_n_steps=1).attach(trainer)  # a transformers.Trainer, or one of TRL's
        >>> trainer.train()
        >>> [entry for entry in trainer.state.log_history if any(key.startswith("drift/") for key in entry)]
    """

    kind = "drift_state"
    _run: DriftRun

    def __init__(self, tracker: DriftTracker, *, every_n_steps: int = 10) -> None:
        super().__init__(DriftRun(tracker, every_n_steps))
        self.tracker = tracker

    def begin(self, model: nn.Module, ranks: Ranks) -> None:
        self._run.attach(model, ranks)

    def start(self, step: int) -> None:
        self._run.start(step, state_place=self.state_place())  # logged nowhere: no log entry is about step 0

    # ---- events

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # At the last step here, not at the end of training: by then the best checkpoint may have been loaded.
        if self._run.is_due(state.global_step, is_last=state.global_step >= state.max_steps or control.should_training_stop):
            self.report(self._run.measure(state.global_step))
            control.should_log = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self._run.is_attached:  # an evaluation of a training run
            self._run.warn_if_stale(state.global_step, [args.metric_for_best_model])
        drift = {f"eval_{name}": value for name, value in self._run.values.items()}
        if metrics is not None:
            metrics.update(drift)  # the object that metric_for_best_model is looked up in
        state.log_history[-1].update(drift)
