"""Proof by running: a model with folded edits must give what the plan gives, whatever the structure of its family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import AttachError, DeployError
from steer.intervene.deploy.constant import AT_RUN_TIME
from steer.intervene.intervention import Intervention
from steer.intervene.plan import Plan
from steer.model import hooks
from steer.model.anatomy import Anatomy

# |difference| / |states| of the final hidden states under a plan and under what it was folded into, by the type of the activations.
# SmolLM2-135M with all 30 blocks edited has 1.3e-6, 0.05 and 0.005, where the rounding of the plain model itself makes 0.03 and 0.005.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
ROWS, TOKENS = 2, 8


class Check:
    """What a plan does to a model, on random tokens, to compare with.

    Args:
        anatomy: of the model, to which nothing is attached.
        interventions: of a plan; its counts are left alone.
        fingerprint: of that plan.

    Raises:
        AttachError: something is attached to the model.
        SiteError, WidthError, WrongModelError: the plan does not fit it.
    """

    def __init__(self, anatomy: Anatomy, interventions: list[Intervention], fingerprint: dict[str, Any] | None) -> None:
        watcher = hooks.watcher_of(anatomy.model)
        if watcher is not None:
            raise AttachError(
                "something is attached to this model",
                expected="a model without a plan or a monitor",
                found=", ".join(str(tap.point.site) for tap in watcher.taps),
                remedy="detach it first: a plan that is attached and folded would act twice",
            )
        self.anatomy = anatomy
        with Plan(interventions, fingerprint=fingerprint).attached(anatomy.model):
            self.wanted = self._run()

    def compare(self, carrier: str) -> float:
        """Runs the model as it is now.

        Returns:
            The relative difference of the final hidden states, |difference| / |states| over all tokens.

        Raises:
            DeployError: it is not what the plan gives.
        """
        found = self._run()
        wanted = self.wanted.double()
        error = float((found.double() - wanted).norm() / wanted.norm())
        if not error <= (allowed := TOLERANCE[self.wanted.dtype]):
            raise DeployError(
                f"{carrier} does not do what the plan does in this {self.anatomy.config.model_type}",
                expected=f"final hidden states that differ by at most {allowed:g} of their size",
                found=f"{error:.3g}: this family scales or gates what its embedding or its blocks add",
                remedy=AT_RUN_TIME,
            )
        return error

    @torch.no_grad()
    def _run(self) -> Tensor:
        device = next(self.anatomy.embedding.parameters()).device
        ids = torch.randint(self.anatomy.config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
        with evaluating(self.anatomy.model):
            given = self.anatomy.decoder(input_ids=ids.to(device), use_cache=False)
        return given[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off for a block, and every module back to the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
