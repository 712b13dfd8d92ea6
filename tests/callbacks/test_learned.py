"""Plans that learn under a pytorch_lightning Trainer, where their parameters lie outside the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_helpers import SITE, Module, OwnLoss, learner, loader, make_plan, make_trainer, only, same_weights, vector
from families import WIDTH
from torch import Tensor, nn

from steer.callbacks import SteeringCallback
from steer.errors import ConfigError
from steer.intervene import Ablate, Add, Intervention, Linear, LoReFT, Plan, ProbeGate

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning", "ignore::UserWarning:torch", "ignore::DeprecationWarning"
)
NAME = f"add@{SITE}"


class Frozen(Module):
    """Only what is outside the model can learn."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__(model)
        self.model.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return None


class Stepped(Module):
    """SGD with momentum and a warm-up, like most runs: the rate changes at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_frozen_model_and_a_plan_that_learns() -> None:
    plan, module = learner(), Frozen()
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    make_trainer(SteeringCallback(plan, learning_rate=0.05), max_epochs=2).fit(module, loader())
    assert sum(module.losses[8:]) < sum(module.losses[:8]) - 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.model.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def reference_run(module: Module, plan: Plan, batches: list[Any], rate: float, factors: list[float], **sgd: Any) -> Tensor:
    """Trains the same by hand, with the model's optimiser and a second one for the vector."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    mine = torch.optim.SGD(plan.parameters(), lr=rate, momentum=0.9)
    with plan.attached(module.model):
        for batch, factor in zip(batches, factors, strict=True):
            optimizer.zero_grad()
            mine.zero_grad()
            module.loss(batch).backward()
            optimizer.param_groups[0]["lr"], mine.param_groups[0]["lr"] = 0.05 * factor, rate * factor
            if sgd:
                nn.utils.clip_grad_norm_(module.parameters(), sgd["clip"])
                nn.utils.clip_grad_norm_(plan.parameters(), sgd["clip"])
            optimizer.step()
            mine.step()
    return only(plan)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_it_learns_as_a_second_optimiser_beside_the_modules_own_would(clip: float | None) -> None:
    plan, module = learner(), Stepped()
    make_trainer(SteeringCallback(plan, learning_rate=0.2), gradient_clip_val=clip).fit(module, loader())
    factors = [min(1.0, (step + 1) / 4) for step in range(8)]
    by_hand, by_hand_plan = Stepped(), learner()
    expected = reference_run(by_hand, by_hand_plan, list(loader()), 0.2, factors, **({} if clip is None else {"clip": clip}))
    assert torch.allclose(only(plan), expected, atol=1e-6) and expected.norm() > 0.001
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module.parameters(), by_hand.parameters(), strict=True))


def test_accumulated_gradients_make_one_step() -> None:
    plan, module = learner(), Stepped()
    make_trainer(SteeringCallback(plan, learning_rate=0.2), accumulate_grad_batches=2, max_steps=1).fit(module, loader())
    beside = learner()
    model = Module()
    with beside.attached(model.model):
        for batch in list(loader())[:2]:
            (model.loss(batch) / 2).backward()
    assert torch.allclose(only(plan), -0.2 * 0.25 * beside.parameters()[0].grad, atol=1e-7)


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "ReduceLROnPlateau", "StepLR"])
def test_the_rate_follows_any_scheduler(scheduler: str) -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = {
                "OneCycleLR": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
                "ReduceLROnPlateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9),
                "StepLR": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
            }[scheduler]()
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "monitor": "loss"}}

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss = super().training_step(batch, index)
            self.log("loss", loss)
            return loss

    callback, seen = SteeringCallback(learner(), learning_rate=2.0), []

    class Rates(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
            seen.append(optimizer.param_groups[0]["lr"])

    mine = []

    class Mine(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            mine.append(callback._run.learning.plan_optimizer.optimizer.param_groups[0]["lr"])

    make_trainer(callback, Rates(), Mine()).fit(Scheduled(), loader())
    assert mine == pytest.approx([20.0 * rate for rate in seen]) and len(set(seen)) > 2


def test_a_module_may_put_the_parameters_into_its_own_optimiser() -> None:
    plan = learner()

    class Own(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([{"params": self.parameters()}, {"params": plan.parameters(), "lr": 0.05}], lr=1e-2)

    module = Own()
    make_trainer(SteeringCallback(plan)).fit(module, loader())
    beside_plan, beside = learner(), Module()
    make_trainer(SteeringCallback(beside_plan, learning_rate=0.05)).fit(beside, loader())
    assert torch.equal(only(plan), only(beside_plan)) and same_weights(module, beside) and only(plan).norm() > 0.01


def test_parameters_that_are_the_modules_own_are_left_to_it() -> None:
    """What DDP needs when nothing else of the module learns."""
    plan = learner()

    class Holding(Frozen):
        def __init__(self) -> None:
            super().__init__()
            self.learned = nn.ParameterList(plan.parameters())

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad], lr=0.05, weight_decay=0.0)

    make_trainer(SteeringCallback(plan)).fit(Holding(), loader())
    beside = learner()
    make_trainer(SteeringCallback(beside, learning_rate=0.05)).fit(Frozen(), loader())
    assert torch.equal(only(plan), only(beside)) and only(plan).norm() > 0.01


class Lean(Frozen):
    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.loss(batch)


def test_compiled_training_learns_the_same_and_compiles_once() -> None:
    learned, graphs = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    for compiled in (False, True):
        plan, module = learner(), Lean()
        if compiled:
            torch._dynamo.reset()
            module.model.compile(backend=backend, fullgraph=True)
        make_trainer(SteeringCallback(plan, learning_rate=0.05), max_steps=3).fit(module, loader())
        learned.append(only(plan))
    torch._dynamo.reset()
    assert torch.allclose(*learned, atol=1e-6) and learned[0].norm() > 0.01 and len(graphs) == 1


def test_two_plans_and_strengths_that_change() -> None:
    plans = [learner(schedule=Linear(8)), learner("layers.0.output", scope="all")]
    module = Module()
    make_trainer(*(SteeringCallback(plan, learning_rate=0.05) for plan in plans)).fit(module, loader())
    assert all(only(plan).norm() > 0.01 for plan in plans)


class Dies(Stepped):
    at = 6

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        if self.global_step == self.at:
            raise MemoryError("killed")
        return super().training_step(batch, index)


@pytest.mark.parametrize("kind", ["sgd", "frozen"])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    class DiesFrozen(Dies, Frozen):
        def configure_optimizers(self) -> None:
            return None

    def run(module: Module, **options: Any) -> tuple[Plan, SteeringCallback]:
        gate = ProbeGate(vector(9), 0.1, sharpness=2.0).train()
        plan = Plan(Intervention(Add(0.1 * vector()).train(), SITE, "response", schedule=Linear(20), gate=gate))
        callback = SteeringCallback(plan, learning_rate=0.1)
        save = pl.callbacks.ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
        make_trainer(callback, save, max_epochs=2, accumulate_grad_batches=2).fit(module, loader(), **options)
        return plan, callback

    uninterrupted, resumed, dying = (Stepped(), Stepped(), Dies()) if kind == "sgd" else (Frozen(), Frozen(), DiesFrozen())
    with pytest.raises(MemoryError):
        run(dying)
    second, again = run(resumed, ckpt_path=tmp_path / "last.ckpt")
    first, callback = run(uninterrupted)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert same_weights(uninterrupted, resumed) and not torch.equal(first.parameters()[0][0], 0.1 * vector())
    ours, theirs = again.state_dict(), callback.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(key.startswith("learning/2/") for key in ours)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 8
    path = first.save(tmp_path / "plan.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(Plan.load(path).parameters(), first.parameters(), strict=True))


def loreft() -> Plan:
    return Plan(Intervention(LoReFT.initial(WIDTH, 2).train(), SITE, "response"))


def test_a_run_resumes_with_a_plan_that_was_loaded(tmp_path: Path) -> None:
    """The state of the optimiser is kept by place: with the moments of other tensors Adam would raise, crash or go to NaN."""
    uninterrupted = loreft()
    half, resumed = copy.deepcopy(uninterrupted), Plan.load(uninterrupted.save(tmp_path / "made"))
    make_trainer(SteeringCallback(uninterrupted, learning_rate=0.05), max_epochs=2).fit(Module(), loader())
    trainer = make_trainer(SteeringCallback(half, learning_rate=0.05))
    trainer.fit(Module(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    make_trainer(SteeringCallback(resumed, learning_rate=0.05), max_epochs=2).fit(Module(), loader(), ckpt_path=tmp_path / "x.ckpt")
    ours, theirs = uninterrupted.interventions[0].parameters, resumed.interventions[0].parameters
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("order", "message"), [([2, 0, 1], "'exp_avg' of parameter 1 does not fit"), ([0, 1, 2, 0], "parameter 4 does not fit")]
)
def test_an_optimiser_state_in_another_order_is_refused(tmp_path: Path, order: list[int], message: str) -> None:
    """Files of plans that an earlier version had loaded hold such an order."""
    trainer = make_trainer(SteeringCallback(loreft(), learning_rate=0.05), max_steps=2)
    trainer.fit(Module(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    ((key, state),) = saved["callbacks"].items()
    places = {name: tensor for name, tensor in state.items() if name.startswith("learning/") and name.count("/") == 3}
    rest = {name: tensor for name, tensor in state.items() if name not in places}
    for new, old in enumerate(order):
        mark = f"learning/{old}/"
        rest |= {f"learning/{new}/{name.removeprefix(mark)}": tensor for name, tensor in places.items() if name.startswith(mark)}
    saved["callbacks"][key] = rest
    torch.save(saved, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match=message):
        make_trainer(SteeringCallback(loreft(), learning_rate=0.05), max_steps=4).fit(Module(), loader(), ckpt_path=tmp_path / "x.ckpt")


def test_the_state_of_a_factored_optimiser_fits(tmp_path: Path) -> None:
    """Adafactor keeps one number for a row, and one for a column."""

    class Factored(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adafactor(self.parameters(), lr=1e-2)

    learned, file = [], loreft().save(tmp_path / "made")
    for parts in ([2], [1, 2]):
        plan, resume = Plan.load(file), None
        for epochs in parts:
            trainer = make_trainer(SteeringCallback(plan, learning_rate=0.05), max_epochs=epochs)
            trainer.fit(Factored(), loader(), ckpt_path=resume)
            trainer.save_checkpoint(resume := tmp_path / "x.ckpt")
        learned.append(plan.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*learned, strict=True))


def test_windows_survive_a_resume(tmp_path: Path) -> None:
    class Moving(Module):
        def on_train_start(self) -> None:
            steering.attachment.set_window(1, None)

    steering, again = (SteeringCallback(make_plan(scope="response[:2]")) for _ in range(2))
    trainer = make_trainer(steering, max_steps=1)
    trainer.fit(Moving(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    make_trainer(again, max_steps=2).fit(Module(), loader(), ckpt_path=tmp_path / "x.ckpt")
    assert str(again.attachment.as_plan().interventions[0].scope) == "response[1:]"


# ---- nothing is left untrained without a word


def test_parameters_that_nothing_would_train_are_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing would train"):
        make_trainer(SteeringCallback(learner())).fit(Module(), loader())
    frozen = learner()
    frozen.parameters()[0].requires_grad_(False)
    make_trainer(SteeringCallback(frozen), max_steps=1).fit(Module(), loader())
    assert not only(frozen).any()


def test_a_rate_for_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="has nothing to train"):
        make_trainer(SteeringCallback(make_plan(), learning_rate=0.1)).fit(Module(), loader())
    for rate in (0.0, -1.0, float("nan"), float("inf"), "0.1"):
        with pytest.raises(ConfigError, match="learning_rate"):
            SteeringCallback(learner(), learning_rate=rate)


def test_a_plan_that_learns_must_act_in_training() -> None:
    plan = Plan([learner().interventions[0], Intervention(Add(torch.ones(WIDTH)).train(), "layers.0.output", phases=("validate",))])
    with pytest.raises(ConfigError, match="does not act in training"):
        make_trainer(SteeringCallback(plan, learning_rate=0.1, phases=("train", "validate"))).fit(Module(), loader())


def test_a_loss_that_the_vector_has_no_part_in_is_noticed() -> None:
    class Detached(OwnLoss):
        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            return super().loss(batch).detach() + sum(parameter.sum() for parameter in self.parameters())

    with pytest.raises(ConfigError, match="got no gradient"):
        make_trainer(SteeringCallback(learner(), learning_rate=0.1)).fit(Detached(), loader())


def test_an_optimiser_without_a_twin_is_named() -> None:
    class Odd(torch.optim.SGD):
        def __init__(self, parameters: Any, *, secret: int) -> None:
            super().__init__(parameters, lr=0.1)

    class WithOdd(Module):
        def configure_optimizers(self) -> Any:
            return Odd(self.parameters(), secret=1)

    with pytest.raises(ConfigError, match="no second Odd"):
        make_trainer(SteeringCallback(learner(), learning_rate=0.1)).fit(WithOdd(), loader())


def test_a_state_of_a_plan_that_learned_something_else() -> None:
    callback = SteeringCallback(learner())
    with pytest.raises(ConfigError, match="does not fit"):
        callback.load_state_dict(SteeringCallback(make_plan()).state_dict())
    with pytest.raises(ConfigError, match="nothing to learn"):
        Ablate(vector()).train()
