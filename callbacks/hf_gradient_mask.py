"""HFGradientMaskCallback: a circuit learns alone, or all but it, under a Hugging Face Trainer or one of TRL's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import Trainer

from steer.callbacks.hf import TrainerRun
from steer.circuits.circuit import Circuit
from steer.training.mask_run import MaskRun
from steer.training.ranks import Ranks


class HFGradientMaskCallback(TrainerRun):
    """Lets only a circuit learn in `trainer.train()`, or all but it; see `GradientMaskCallback`.

    Args:
        circuit, only: as of `GradientMaskCallback`.

    Example:
        >>> HFGradientMaskCallback(circuit).attach(trainer)  # a transformers.Trainer, or one of TRL's
        >>> trainer.train()
    """

    kind = "gradient mask"
    _run: MaskRun

    def __init__(self, circuit: Circuit, *, only: bool = True) -> None:
        super().__init__(MaskRun(circuit, only=only))

    @contextmanager
    def wrapped_methods(self, trainer: Trainer) -> Iterator[None]:
        """The mask is on before the trainer makes its optimiser and puts DDP around the model."""
        with super().wrapped_methods(trainer):
            if trainer.model is not None:  # otherwise `model_init` makes it
                self._run.attach(trainer.model, Ranks())
            yield

    def begin(self, model: nn.Module, ranks: Ranks) -> None:
        self._run.attach(model, ranks)

    def start(self, step: int) -> None:
        self._run.start([self._trainer.optimizer])
