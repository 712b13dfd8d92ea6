"""Gains of features learned by SFT, DPO and GRPO, and feature losses beside them: of the policy's tokens alone, in every trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_helpers import SITE, Module, loader, make_trainer, n_hooks
from families import FAMILIES
from features.feature_plans import CHOSEN, autoencoder
from tiny_tokenizer import tiny_tokenizer
from torch import nn

import steer
from steer.callbacks import HFLossCallback, HFSteeringCallback, LossCallback, SteeringCallback
from steer.features import FeatureLoss, GainPenalty
from steer.intervene import Plan

pytestmark = pytest.mark.filterwarnings("ignore")
PENALTY = f"steer/gain_penalty/{SITE}/loss"


def learned(kind: str) -> Plan:
    """Three features that a tiny model has on at most tokens."""
    dictionary = autoencoder("relu", spread=2.0)
    operator = steer.FeatureGains(dictionary, CHOSEN) if kind == "constant" else steer.FeatureAdapter(dictionary, CHOSEN, kind)
    return Plan(steer.Intervention(operator.train(), SITE))


def change(plan: Plan) -> float:
    """How far the gains are from the identity."""
    return sum(float((tensor - float(name == "gain")).abs().sum()) for name, tensor in plan.interventions[0].operator.parameters.items())


class Frozen(Module):
    def __init__(self) -> None:
        super().__init__()
        self.model.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return None


@pytest.mark.parametrize("kind", ["constant", "gain", "offset"])
def test_lightning_sft_learns_gains_and_a_penalty_holds_them(kind: str, tmp_path: Path) -> None:
    changes = []
    for l2 in (1e-9, 3.0):
        plan, module = learned(kind), Frozen()
        penalty = LossCallback([GainPenalty(plan, l2=l2)])
        trainer = make_trainer(penalty, SteeringCallback(plan, learning_rate=0.01), max_epochs=2)
        trainer.fit(module, loader())
        changes.append(change(plan))
        assert sum(module.losses[8:]) < sum(module.losses[:8]) and PENALTY in trainer.callback_metrics
        assert change(Plan.load(plan.save(tmp_path / f"plan-{l2}"))) == changes[-1]
    assert 0 < changes[1] < 0.9 * changes[0]


trl = pytest.importorskip("trl", reason="trl is an extra: pip install 'torchsteer[dev]'")
from datasets import Dataset  # noqa: E402

SFT_ROWS = [{"prompt": "the cat", "completion": "sat on the mat"}, {"prompt": "the big dog ran", "completion": "in the house"}] * 8
DPO_ROWS = [{"prompt": "the cat", "chosen": "sat on the mat", "rejected": "ran"}] * 16
DPO_TOKENS = 2 * (5 + 2)  # a batch of two pairs, each completion with its end of sequence


def options(out: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "seed": 1,
        **more,
    }


def trainer_of(kind: str, out: Path, *, frozen: bool, **more: Any) -> Any:
    model = FAMILIES["llama"]().requires_grad_(not frozen)
    common = {"model": model, "processing_class": tiny_tokenizer()}
    if kind == "sft":
        return trl.SFTTrainer(**common, args=trl.SFTConfig(**options(out, **more)), train_dataset=Dataset.from_list(SFT_ROWS))
    if kind == "dpo":
        args = trl.DPOConfig(**options(out, **more))
        return trl.DPOTrainer(**common, ref_model=FAMILIES["llama"](), args=args, train_dataset=Dataset.from_list(DPO_ROWS))
    return trl.GRPOTrainer(
        **common,
        reward_funcs=lambda completions, **_: [float(text.count("a")) - 0.1 * len(text) for text in completions],
        args=trl.GRPOConfig(**options(out, num_generations=2, max_completion_length=4, **more)),
        train_dataset=Dataset.from_list([{"prompt": "the cat"}, {"prompt": "what is the moon"}] * 8),
    )


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("kind", ["constant", "gain"])
@pytest.mark.parametrize("loss", ["sft", "dpo", "grpo"])
def test_trl_learns_gains_of_a_frozen_model(loss: str, kind: str, tmp_path: Path) -> None:
    plan, trainer = learned(kind), trainer_of(loss, tmp_path, frozen=True)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    phases = ("train", "generate") if loss == "grpo" else ("train",)
    HFLossCallback([GainPenalty(plan, l1=1e-4)]).attach(trainer)
    steering = HFSteeringCallback(plan, learning_rate=0.02, phases=phases).attach(trainer)
    trainer.train()
    assert change(plan) > 0.01 and min(steering.attachment.fired().values()) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    losses, penalties = logged(trainer, "loss"), logged(trainer, PENALTY)
    if loss == "dpo":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0] - 0.01
    if loss == "sft":
        assert losses[-1] < losses[0]
    assert penalties[0] == 0 and penalties[-1] > 0 and len(penalties) == 6
    table = plan.interventions[0].operator.table()[0] if kind == "constant" else None
    assert table is None or table.feature in CHOSEN
    assert n_hooks(trainer.model) == 0


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loss", ["sft", "dpo", "grpo"])
def test_trl_trains_on_a_feature_loss_of_the_policys_completions(loss: str, accumulate: int, tmp_path: Path) -> None:
    masks: list[int] = []
    trainer = trainer_of(loss, tmp_path, frozen=False, gradient_accumulation_steps=accumulate, max_steps=3)
    compute = trainer.compute_loss

    def noting(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs["labels"] != -100 if "labels" in inputs else inputs["completion_mask"]
        masks.append(int(mask.sum()))
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = noting
    target = FeatureLoss(autoencoder("relu"), CHOSEN, target=-3.0, scope="response", weight=2.0)
    callback = HFLossCallback([target], every_n_steps=1).attach(trainer)
    totals: list[float] = []
    advance = callback._run.advance

    def advanced(step: int) -> Any:
        totals.append(float(callback._run._readers[0].sums[1]))
        return advance(step)

    callback._run.advance = advanced  # type: ignore[method-assign]
    trainer.train()
    assert len(masks) == 3 * accumulate and sum(totals) == sum(masks) > 0  # not those of the reference, and not what is sampled
    values = logged(trainer, f"steer/feature_loss/{SITE}/loss")
    assert len(values) == 3 and values[-1] < 0.95 * values[0]
    if loss == "dpo":
        assert masks[0] == DPO_TOKENS
