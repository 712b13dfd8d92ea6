"""MaskRun: what a gradient mask does at each event of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steer.checks import of_type
from steer.circuits.circuit import Circuit
from steer.circuits.gradient_mask import GradientMask
from steer.training.batches import BatchResponseMask
from steer.training.ranks import Ranks


class MaskRun:
    """A gradient mask in a training run: attached before optimisers and DDP are made, started before the first step.

        run = MaskRun(circuit, only=True)
        run.attach(model, Ranks())
        run.start([optimizer])
        ...
        run.detach()

    Args:
        circuit, only: as of `GradientMask`.

    Attributes:
        mask: None before the attach.
    """

    def __init__(self, circuit: Circuit, *, only: bool) -> None:
        of_type(circuit, Circuit, "the circuit of a callback", "pass a Circuit")
        of_type(only, bool, "`only` of a callback", "pass True or False")
        self.circuit, self.only = circuit, only
        self.mask: GradientMask | None = None
        self.ranks = Ranks()
        self.response_mask = BatchResponseMask()  # nothing here reads it

    @property
    def name(self) -> str:
        """What tells this mask from another one in the same run."""
        return f"{'only' if self.only else 'all_but'}:{','.join(self.circuit.node_names)}:{self.circuit.n_neurons}"

    def __repr__(self) -> str:
        return f"MaskRun({self.mask or self.circuit})"

    @property
    def is_attached(self) -> bool:
        return self.mask is not None

    def attach(self, model: nn.Module, ranks: Ranks) -> None:
        """Makes the mask and masks gradients; raises as `GradientMask`."""
        self.detach()
        mask = GradientMask(model, self.circuit, only=self.only)
        mask.attach()
        self.mask, self.ranks = mask, ranks

    def detach(self) -> None:
        """May be called at any time."""
        if self.mask is not None:
            self.mask.detach()
            self.mask = None

    def renew(self) -> None:
        """Begins another training run of this object."""
        self.detach()

    def start(self, optimizers: Sequence[Optimizer]) -> None:
        """Starts, with weights as they are now."""
        if self.mask is not None:
            self.mask.start(optimizers)

    def state_dict(self) -> dict[str, Tensor]:
        """What stays is in the weights of the model."""
        return {"only": torch.tensor(self.only)}

    def load_state_dict(self, state: Mapping[str, Tensor], *, is_first_rank: bool) -> None:
        """There is nothing to go on from."""
