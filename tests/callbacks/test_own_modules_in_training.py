"""Models written by hand under Lightning: steered, learned and tracked."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from callback_helpers import make_trainer
from drift.drift_helpers import direction
from hand import hook_count
from own_models import LAYERS, OWN, call_of, logits_of, own_model
from torch import Tensor
from torch.utils.data import DataLoader

import steer
from steer.callbacks import DriftCallback, SteeringCallback
from steer.drift import DriftTracker
from steer.intervene import Add, Intervention, Plan
from steer.model.tokens import Row

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning:pytorch_lightning")
SITE = "layers.1.output"


class OwnModule(pl.LightningModule):
    """Any of the three, with a loss on what they give."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.net = name, own_model(name)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with steer.response_tokens(self, torch.ones(batch[0].shape[:2], dtype=torch.bool)):
            return logits_of(self.net(*batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Described(OwnModule):
    steer_description = {"layers": "net.transformer.h", "attn": "mix", "mlp": "think"}


def batches(name: str) -> DataLoader:
    args, _ = call_of(name)
    return DataLoader(list(zip(*(tensor.repeat(4, *[1] * (tensor.dim() - 1)) for tensor in args), strict=True)), batch_size=2)


def width() -> int:
    return direction(SITE).vector.shape[-1]


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_vector_is_learned_and_drift_is_tracked(name):
    module = OwnModule(name)
    plan = Plan(Intervention(Add(torch.zeros(width())).train(), SITE, "last"))
    probe = None if name == "policy" else [Row(tuple(range(3, 3 + length)), 1) for length in (4, 5, 6, 7)]
    tracker = DriftTracker({"trait": direction(SITE)}, probe=probe, controls=4, span="all")
    steering = SteeringCallback(plan, learning_rate=0.1)
    trainer = make_trainer(steering, DriftCallback(tracker, every_n_steps=2), max_epochs=1)
    trainer.fit(module, batches(name))
    assert trainer.global_step == 4
    assert steering.attachment.fired() == {f"add@{SITE}": 8}  # the last token of every row
    assert float(plan.parameters()[0].detach().norm()) > 0
    assert tracker.last_step == 4 and tracker.latest
    assert hook_count(module) == 0


def test_the_description_of_a_lightning_module_holds_in_training():
    module = Described("gpt")
    plan = Plan([Intervention(Add(torch.ones(width())), f"layers.{layer}.attn.output") for layer in range(LAYERS)])
    steering = SteeringCallback(plan)
    make_trainer(steering, max_epochs=1).fit(module, batches("gpt"))
    assert set(steering.attachment.fired().values()) == {8 * 7}
    assert steering.attachment.paths["add@layers.0.attn.output"] == "net.transformer.h.0.mix"
