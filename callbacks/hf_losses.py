"""HFLossCallback: losses of activations that are added to the loss of a Hugging Face Trainer, or of one of TRL's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from steer.callbacks.hf import TrainerRun
from steer.features.token_loss import TokenLoss
from steer.model.restoring import replaced
from steer.training.loss_run import LossRun
from steer.training.ranks import Ranks


class HFLossCallback(TrainerRun):
    """Adds feature losses to the loss of a `transformers.Trainer`, TRL's SFT, DPO and GRPO trainers included.

    The twin of `LossCallback`: same arguments, same rules. They are added where the trainer hands its loss to `accelerator.backward`;
    `loss` in its log entries stays its own, and `steer/<loss>/loss` joins them.

    Args:
        losses, every_n_steps: as of `LossCallback`.

    Example:
        >>> loss = steer.FeatureLoss(dictionary, [3, 40], high=0.0, scope="response", weight=0.1)
        >>> HFLossCallback([loss]).attach(trainer)  # a transformers.Trainer, or one of TRL's
        >>> trainer.train()
    """

    kind = "loss_state"
    _run: LossRun

    def __init__(self, losses: Sequence[TokenLoss], *, every_n_steps: int = 1) -> None:
        super().__init__(LossRun(losses, every_n_steps=every_n_steps))

    def begin(self, model: nn.Module, ranks: Ranks) -> None:
        self._run.attach(model, ranks)

    def start(self, step: int) -> None:
        self._run.start(step)

    @contextmanager
    def wrapped_methods(self, trainer: Trainer) -> Iterator[None]:
        with super().wrapped_methods(trainer), replaced(trainer.accelerator, "backward", self._wrap_backward(trainer)):
            yield

    def _wrap_compute_loss(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """Keeps from the model what says in which rows a loss counts."""
        names = {loss.rows for loss in self._run.losses} - {None}

        @wraps(compute_loss)
        def compute_loss_without_rows(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._run.batch_start(inputs)
            if isinstance(inputs, Mapping) and not names.isdisjoint(inputs):
                inputs = {name: value for name, value in inputs.items() if name not in names}
            return compute_loss(model, inputs, *args, **kwargs)

        return super()._wrap_compute_loss(compute_loss_without_rows)

    def _wrap_backward(self, trainer: Trainer) -> Callable[..., Any]:
        """By then the trainer has divided its loss by the number of micro-batches, or by that of their tokens."""
        backward = trainer.accelerator.backward

        @wraps(backward)
        def backward_with_losses(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            return backward(self._run.added(loss, 1 / trainer.current_gradient_accumulation_steps), *args, **kwargs)

        return backward_with_losses

    # ---- events

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.batch_start(None)  # compute_loss tells of the batch

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.batch_end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.batch_end()
        if metrics := self._run.advance(state.global_step):
            self.report(metrics)
