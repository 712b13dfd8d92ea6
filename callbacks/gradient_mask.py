"""GradientMaskCallback: a circuit learns alone, or all but it, while a LightningModule is trained."""

from __future__ import annotations

import pytorch_lightning as pl
from torch import nn

from steer.callbacks.lightning import LightningRun
from steer.circuits.circuit import Circuit
from steer.training.mask_run import MaskRun
from steer.training.ranks import Ranks


class GradientMaskCallback(LightningRun):
    """Lets only a circuit learn during `Trainer.fit`, or all but it; everything else stays as it is to the bit (`GradientMask`).

    Parameters of which nothing learns have no `requires_grad` from `setup` to `teardown`, before `configure_optimizers` and DDP see them.
    Gradients that are clipped are those of the circuit. It works with accumulation, autocast and any optimiser, several of them too.

    Args:
        circuit: of the model. only: it learns; False for all but it.
        submodule: dotted path of the model inside the LightningModule.

    Raises:
        ConfigError: in `setup`, for weights that are quantised, offloaded or tied; when training starts, for those that were sharded.

    Example:
        >>> trainer = pl.Trainer(max_steps=2, callbacks=[GradientMaskCallback(circuit)])
        >>> trainer.fit(module, batches)
    """

    _run: MaskRun

    def __init__(self, circuit: Circuit, *, only: bool = True, submodule: str = "") -> None:
        super().__init__(MaskRun(circuit, only=only), submodule)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(mask=self._run.name)

    def begin(self, trainer: pl.Trainer, model: nn.Module, ranks: Ranks) -> None:
        self._run.attach(model, ranks)

    def _attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self._run.is_attached:  # the parameters stay the same objects where Lightning moves them
            super()._attach(trainer, module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._run.start(trainer.optimizers)
