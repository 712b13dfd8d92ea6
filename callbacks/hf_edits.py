"""HFEditCallback: edits of facts that are applied, measured and kept while a Hugging Face Trainer, or one of TRL's, trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from steer.callbacks.hf import TrainerRun
from steer.edits.edit import Edit
from steer.errors import ConfigError
from steer.training.edit_run import EditRun
from steer.training.metric_crossing import MetricCrossing
from steer.training.ranks import Ranks


class HFEditCallback(TrainerRun):
    """Puts edits of facts into the model of a `transformers.Trainer`, TRL's included, measures how well they hold, and keeps them in it.

    The twin of `EditCallback`: same arguments, same rules. `on_metric` reads what the trainer logs (`loss`, `eval_loss`). The metrics join
    the trainer's next log entry. With `load_best_model_at_end` the edits end as they were in the best checkpoint, too.

    Args:
        edits, tokenizer, at_step, on_metric, every_n_steps, protect, into, keep, damping: as of `EditCallback`.

    Example:
        >>> HFEditCallback(edit, tokenizer, at_step=1, protect="freeze").attach(trainer)  # a transformers.Trainer, or one of TRL's
        >>> trainer.train()
    """

    kind = "edit_state"
    _run: EditRun

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
        super().__init__(
            EditRun(
                edits,
                tokenizer,
                at_step=at_step,
                on_metric=on_metric,
                every_n_steps=every_n_steps,
                protect=protect,
                into=into,
                keep=keep,
                damping=damping,
            )
        )

    @property
    def edits(self) -> list[Edit]:
        """The edits as they are now."""
        return list(self._run.edits)

    @contextmanager
    def wrapped_methods(self, trainer: Trainer) -> Iterator[None]:
        """The places of the edits are there before the trainer makes its optimiser, puts DDP around the model, and loads a checkpoint."""
        with super().wrapped_methods(trainer):
            if trainer.model is not None:  # otherwise `model_init` makes it
                self._run.renew()
                self._run.attach(trainer.model, Ranks())
            yield

    def begin(self, model: nn.Module, ranks: Ranks) -> None:
        self._run.attach(model, ranks)

    def start(self, step: int) -> None:
        if self._trainer.is_deepspeed_enabled:
            raise _copies_weights()
        metrics = self._run.start(step, [self._trainer.optimizer], state_place=self.state_place())
        self.report(metrics or {})

    # ---- events

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(self._run.advance(state.global_step) or {})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs, **kwargs)
        self.report(self._run.seen(logs or {}) or {})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.report(self._run.seen(metrics or {}) or {})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        saved = None if best is None else self.load(Path(best))
        if saved is not None:
            self._run.reload(saved)
            return
        self._run.end()
        if best is not None:
            warnings.warn(
                f"the best checkpoint lacks {self.file(Path(best)).name}: it is not known which edits are in its weights", stacklevel=2
            )


def _copies_weights() -> ConfigError:
    return ConfigError(
        "DeepSpeed keeps copies of the weights of its own, which would overwrite edits",
        expected="an optimiser that steps on the weights of the model",
        found="a DeepSpeed engine",
        remedy="train with DDP, or on one device",
    )
