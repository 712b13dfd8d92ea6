"""Feature losses under Lightning and Hugging Face trainers: the gradient is that of the sum of both losses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_helpers import SITE, Module, OwnLoss, examples, loader, make_plan, make_trainer, n_hooks, same_weights
from families import FAMILIES
from features.feature_plans import CHOSEN, autoencoder
from processes import run_on_ranks
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer, TrainingArguments

import steer
from steer.callbacks import HFLossCallback, HFSteeringCallback, LossCallback, SteeringCallback
from steer.errors import ConfigError, ContextError, HookDidNotRunError
from steer.features import FeatureLoss
from steer.model.anatomy import Anatomy

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning", "ignore::UserWarning:torch", "ignore::DeprecationWarning"
)
LOGGED = f"steer/feature_loss/{SITE}/loss"


def feature_loss(**options: Any) -> FeatureLoss:
    return FeatureLoss(autoencoder("relu"), CHOSEN, **{"high": -1.0, "weight": 0.3, "scope": "response", **options})


class Plain(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def by_hand(model: nn.Module, batches: list[dict[str, Tensor]], accumulate: int = 1, clip: float | None = None) -> list[float]:
    """SGD on the sum of both losses, the features' one written out. Returns the features' loss of each batch."""
    loss, seen, kept = feature_loss(), [], []
    handle = Anatomy.find(model).point(SITE).module.register_forward_hook(lambda _, __, output: kept.append(output))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number, batch in enumerate(batches, 1):
        own = model(**batch, use_cache=False).loss
        h = kept.pop()[0] if isinstance(kept[-1], tuple) else kept.pop()
        features = loss.per_token(h)[batch["labels"] != -100].mean()
        seen.append(float(features.detach()))
        ((own + 0.3 * features) / accumulate).backward()
        if number % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    handle.remove()
    return seen


def close(a: nn.Module, b: nn.Module, atol: float = 1e-6) -> bool:
    return all(torch.allclose(x, y, atol=atol) for x, y in zip(a.parameters(), b.parameters(), strict=True))


class Noting(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if LOGGED in trainer.callback_metrics:
            self.values.append(float(trainer.callback_metrics[LOGGED]))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}], ids=str)
def test_it_trains_on_the_sum_of_both_losses(options: dict[str, Any]) -> None:
    module, noting, expected = Plain(), Noting(), FAMILIES["llama"]()
    make_trainer(LossCallback([feature_loss()]), noting, **options).fit(module, loader())
    seen = by_hand(expected, list(loader()), options.get("accumulate_grad_batches", 1), options.get("gradient_clip_val"))
    assert close(module.model, expected) and not close(module.model, trained_alone(**options))
    if not options:
        assert noting.values == pytest.approx(seen, rel=1e-4)
    assert n_hooks(module.model) == 0


def trained_alone(**options: Any) -> nn.Module:
    module = Plain()
    make_trainer(**options).fit(module, loader())
    return module.model


def test_the_module_s_own_loss_stays_as_it_is() -> None:
    module, alone = Plain(), Plain()
    make_trainer(LossCallback([feature_loss()]), max_steps=1).fit(module, loader())
    make_trainer(max_steps=1).fit(alone, loader())
    assert module.losses == alone.losses and not same_weights(module.model, alone.model)


def test_a_loss_of_the_modules_own_gets_its_response_from_the_batch() -> None:
    class Own(OwnLoss, Plain):
        pass

    module, expected = Own(), FAMILIES["llama"]()
    make_trainer(LossCallback([feature_loss()])).fit(module, loader())
    by_hand(expected, list(loader()))
    assert close(module.model, expected)


def test_strategy_is_put_back_also_after_a_failure() -> None:
    class Fails(Plain):
        def training_step(self, batch: Any, index: int) -> Tensor:
            if index == 1:
                raise MemoryError("killed")
            return super().training_step(batch, index)

    for module in (Plain(), Fails()):
        trainer = make_trainer(LossCallback([feature_loss()]), max_steps=3)
        try:
            trainer.fit(module, loader())
        except MemoryError:
            pass
        assert "backward" not in vars(trainer.strategy) and n_hooks(module.model) == 0


def test_a_second_fit_is_as_the_first() -> None:
    callback = LossCallback([feature_loss()])
    modules = [Plain(), Plain()]
    for module in modules:
        make_trainer(callback, max_steps=3).fit(module, loader())
    assert same_weights(modules[0], modules[1])


class Manual(Plain):
    def __init__(self, *, bypass: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bypass = bypass

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        if self.bypass:
            loss.backward()
        else:
            self.manual_backward(loss)
        optimizer.step()


def test_manual_optimisation_goes_through_manual_backward_or_is_refused() -> None:
    module, expected = Manual(), FAMILIES["llama"]()
    make_trainer(LossCallback([feature_loss()])).fit(module, loader())
    by_hand(expected, list(loader()))
    assert close(module.model, expected)
    with pytest.raises(ConfigError, match="differentiated without feature_loss"):
        make_trainer(LossCallback([feature_loss()])).fit(Manual(bypass=True), loader())


def test_a_step_that_is_left_out_adds_nothing_later() -> None:
    class Skips(Plain):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor | None:
            loss = super().training_step(batch, index)
            return None if index == 1 else loss

    module, expected = Skips(), FAMILIES["llama"]()
    make_trainer(LossCallback([feature_loss()]), max_epochs=1).fit(module, loader(6))
    by_hand(expected, [batch for number, batch in enumerate(loader(6)) if number != 1])
    assert close(module.model, expected)


def test_what_cannot_be_trained_is_refused() -> None:
    class Upper(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.model.requires_grad_(False)
            self.model.lm_head.requires_grad_(True)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.lm_head.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match="nothing that is trained has an influence"):
        make_trainer(LossCallback([feature_loss()])).fit(Upper(), loader())

    class Elsewhere(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.other = FAMILIES["llama"]()

        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            return self.other(**batch, use_cache=False).loss

    with pytest.raises(HookDidNotRunError, match="did not come to the site"):
        make_trainer(LossCallback([feature_loss()], submodule="model")).fit(Elsewhere(), loader())
    with pytest.raises(ConfigError, match="cannot be told apart"):
        LossCallback([feature_loss(), feature_loss()])
    with pytest.raises(ConfigError, match="no losses to add"):
        LossCallback([])


def test_beside_a_plan_it_reads_the_steered_activation() -> None:
    trained = []
    for first in (True, False):
        module = Plain()
        callbacks = [LossCallback([feature_loss()]), SteeringCallback(make_plan(strength=2.0))]
        make_trainer(*(callbacks if first else callbacks[::-1])).fit(module, loader())
        trained.append(module.model)
    assert same_weights(*trained)
    expected = FAMILIES["llama"]()
    with make_plan(strength=2.0).attached(expected):
        by_hand(expected, list(loader()))
    assert close(trained[0], expected)


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, half, again = Plain(), Plain(), Plain()
    make_trainer(LossCallback([feature_loss()]), max_epochs=3).fit(whole, loader(4))
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(LossCallback([feature_loss()]), checkpoint, max_epochs=1).fit(half, loader(4))
    make_trainer(LossCallback([feature_loss()]), max_epochs=3).fit(again, loader(4), ckpt_path=str(tmp_path / "last.ckpt"))
    assert same_weights(whole, again) and not same_weights(half, again)


# ---- some rows of a batch


def marked(rows: int = 16) -> list[dict[str, Tensor]]:
    """Every second row is one in which the loss counts."""
    return [{**row, "silent": torch.tensor(number % 2)} for number, row in enumerate(examples(rows))]


def by_hand_on_marked(model: nn.Module, batches: list[Any]) -> None:
    loss, kept = feature_loss(), []
    handle = Anatomy.find(model).point(SITE).module.register_forward_hook(lambda _, __, output: kept.append(output))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches:
        batch = dict(batch)
        rows = batch.pop("silent").bool()[:, None]
        own = model(**batch, use_cache=False).loss
        h = kept[-1][0] if isinstance(kept[-1], tuple) else kept[-1]
        (own + 0.3 * loss.per_token(h)[(batch["labels"] != -100) & rows].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()


def test_a_loss_may_count_in_some_rows_only(tmp_path: Path) -> None:
    class Reading(Plain):
        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            return super().loss({name: value for name, value in batch.items() if name != "silent"})

    module, expected = Reading(), FAMILIES["llama"]()
    batches = DataLoader(marked(), batch_size=4)  # type: ignore[arg-type]
    make_trainer(LossCallback([feature_loss(rows="silent")])).fit(module, batches)
    by_hand_on_marked(expected, list(batches))
    assert close(module.model, expected)

    trainer, by_hand_model = hf(tmp_path, Marking, remove_unused_columns=False, per_device_train_batch_size=4), FAMILIES["llama"]()
    trainer.train_dataset = marked()  # type: ignore[assignment]
    HFLossCallback([feature_loss(rows="silent")]).attach(trainer)
    trainer.train()
    by_hand_on_marked(by_hand_model, trainer.batches)  # type: ignore[attr-defined]
    assert close(trainer.model, by_hand_model)


class Marking(Trainer):
    """Notes its batches, marks included; the model would refuse those."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        names = ("input_ids", "labels", "silent")
        vars(self).setdefault("batches", []).append({key: inputs[key].clone() for key in names})
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert "silent" not in inputs
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_batch_without_the_rows_is_refused() -> None:
    with pytest.raises(ContextError, match="does not know the rows"):
        make_trainer(LossCallback([feature_loss(rows="silent")])).fit(Plain(), loader())


# ---- ranks


def on_a_rank(out: Path) -> None:
    """Lightning under DDP; the first rank keeps the weights and what was logged."""
    torch.set_num_threads(1)
    mine = DistributedSampler(examples(), num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)  # type: ignore[arg-type]
    batches = DataLoader(examples(), batch_size=2, sampler=mine)  # type: ignore[arg-type]
    module = Plain()
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = make_trainer(LossCallback([feature_loss()]), use_distributed_sampler=False, devices=2, strategy=strategy)
    trainer.fit(module, batches)
    kept = {"model": module.model.state_dict(), "logged": float(trainer.callback_metrics[LOGGED])}
    if torch.distributed.get_rank() == 0:
        torch.save(kept, out / "ranks.pt")
    torch.distributed.barrier()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_train_as_one_process_with_both_batches(tmp_path: Path) -> None:
    run_on_ranks(on_a_rank, tmp_path)
    kept = torch.load(tmp_path / "ranks.pt", weights_only=True)
    expected, trained = FAMILIES["llama"](), FAMILIES["llama"]()
    seen = by_hand(expected, list(loader(batch_size=4)))
    trained.load_state_dict(kept["model"])
    assert close(trained, expected) and kept["logged"] == pytest.approx(seen[-1], rel=1e-4)


# ---- Hugging Face


def hf(out: Path, cls: type[Trainer] = Trainer, **options: Any) -> Trainer:
    arguments = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "weight_decay": 0.0,
    }
    return cls(
        model=FAMILIES["llama"](),
        args=TrainingArguments(**{**arguments, **options}),
        train_dataset=examples(),  # type: ignore[arg-type]
        eval_dataset=examples(4),  # type: ignore[arg-type]
    )


class Noted(Trainer):
    """Notes its batches."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        vars(self).setdefault("batches", []).append({key: inputs[key].clone() for key in ("input_ids", "labels")})
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hf_trains_on_the_sum_of_both_losses(tmp_path: Path, accumulate: int) -> None:
    trainer = hf(tmp_path, Noted, gradient_accumulation_steps=accumulate, eval_strategy="steps", eval_steps=2)
    HFLossCallback([feature_loss()]).attach(trainer)
    trainer.train()
    expected = FAMILIES["llama"]()
    seen = by_hand(expected, trainer.batches, accumulate)  # type: ignore[attr-defined]
    assert close(trainer.model, expected)
    logged = [entry[LOGGED] for entry in trainer.state.log_history if LOGGED in entry]
    per_step = [sum(seen[start : start + accumulate]) / accumulate for start in range(0, len(seen), accumulate)]
    assert logged == pytest.approx(per_step, rel=1e-4)
    assert "backward" not in vars(trainer.accelerator) and n_hooks(trainer.model) == 0


def test_hf_own_loss_stays_and_a_loss_elsewhere_is_refused(tmp_path: Path) -> None:
    plain, with_loss = hf(tmp_path / "a", max_steps=1), hf(tmp_path / "b", max_steps=1)
    HFLossCallback([feature_loss()]).attach(with_loss)
    losses = []
    for trainer in (plain, with_loss):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and not same_weights(plain.model, with_loss.model)

    class Bypass(Trainer):
        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            loss.backward()
            return loss.detach()

    bypass = hf(tmp_path / "c", Bypass)
    HFLossCallback([feature_loss()]).attach(bypass)
    with pytest.raises(ConfigError, match="differentiated without feature_loss"):
        bypass.train()
    assert "backward" not in vars(bypass.accelerator) and n_hooks(bypass.model) == 0


def test_hf_saves_and_resumes(tmp_path: Path) -> None:
    whole = hf(tmp_path / "whole", max_steps=6)
    HFLossCallback([feature_loss()]).attach(whole)
    whole.train()
    part = hf(tmp_path / "part", max_steps=6, save_strategy="steps", save_steps=3)
    HFLossCallback([feature_loss()]).attach(part)
    HFSteeringCallback(steer.Plan(steer.Intervention(steer.Add(torch.zeros(32)), SITE))).attach(part)
    part.train()
    again = hf(tmp_path / "part", max_steps=6)
    HFLossCallback([feature_loss()]).attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    assert close(whole.model, again.model) and close(whole.model, part.model)
