"""Plans that learn in a custom loop, and the optimiser that they get beside a trainer's."""

from __future__ import annotations

import pytest
import torch
from callback_helpers import SITE, learner, loader, vector
from families import FAMILIES, WIDTH
from torch import nn

from steer.errors import ConfigError
from steer.intervene import Intervention, LoReFT, Plan, ProbeGate
from steer.training.learning import Learning
from steer.training.optimizer import PlanOptimizer
from steer.training.ranks import Ranks


def test_a_vector_learns_in_a_plain_loop_and_is_what_the_gradient_says() -> None:
    model, plan, batch = FAMILIES["llama"]().requires_grad_(False), learner(), next(iter(loader(16, 16)))
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.5)
    losses = []
    with plan.attached(model):
        for _ in range(8):
            loss = model(**batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02 and losses == sorted(losses, reverse=True)
    # the gradient of a vector is that of the activation, summed over the tokens it is added to
    v = torch.zeros(WIDTH, requires_grad=True)
    mask = (batch["labels"] != -100).unsqueeze(-1)
    handle = model.model.layers[1].register_forward_hook(lambda _, __, out: out + mask * v)
    model(**batch, use_cache=False).loss.backward()
    handle.remove()
    fresh = learner()
    with fresh.attached(model):
        model(**batch, use_cache=False).loss.backward()
    assert torch.allclose(fresh.parameters()[0].grad[0], v.grad, atol=1e-7) and v.grad.abs().max() > 1e-4


def test_loreft_and_a_soft_gate_learn_together() -> None:
    model, batch = FAMILIES["llama"]().requires_grad_(False), next(iter(loader(16, 16)))
    gate = ProbeGate(vector(), 0.0, sharpness=1.0).train()
    plan = Plan(Intervention(LoReFT.initial(WIDTH, 2).train(), SITE, "response", gate=gate))
    assert len(plan.parameters()) == 5
    before = [parameter.detach().clone() for parameter in plan.parameters()]
    optimizer, losses = torch.optim.Adam(plan.parameters(), lr=0.05), []
    with plan.attached(model):
        for _ in range(6):
            loss = model(**batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert not any(torch.equal(a, b) for a, b in zip(before, plan.parameters(), strict=True))


def test_fp16_gradients_are_unscaled_and_a_step_with_infinite_gradients_is_left_out() -> None:
    plan, scaler = learner(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    (parameter,) = plan.parameters()
    learning = Learning(plan, 0.5)
    with pytest.warns(UserWarning, match="no forward pass"), plan.attached(FAMILIES["llama"]()) as attachment:
        learning.start(attachment, nn.Linear(1, 1), [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)], Ranks())
        for gradient in (2.0, float("inf")):
            scaler.scale(gradient * parameter.sum()).backward()
            learning.average_gradients()
            learning.step(scaler=scaler, clip=0.0)
            scaler.update()
    assert torch.equal(parameter, torch.full_like(parameter, -1.0)) and scaler.get_scale() == 512.0


def test_the_optimiser_of_a_plan_is_like_the_trainers_but_for_weight_decay() -> None:
    model = [nn.Parameter(torch.zeros(3))]
    trainers = torch.optim.AdamW(model, lr=0.1, betas=(0.5, 0.6), weight_decay=0.3)
    optimizer = PlanOptimizer([nn.Parameter(torch.zeros(2))], 0.05, [trainers]).optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert {name: optimizer.defaults[name] for name in ("lr", "betas", "weight_decay")} == {
        "lr": 0.05,
        "betas": (0.5, 0.6),
        "weight_decay": 0.0,
    }
    assert type(PlanOptimizer([nn.Parameter(torch.zeros(2))], 0.05, []).optimizer) is torch.optim.AdamW


def test_the_rate_follows_the_first_group_of_the_trainer() -> None:
    parameter, trainers = nn.Parameter(torch.zeros(1)), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    plan_optimizer = PlanOptimizer([parameter], 2.0, [trainers])
    for rate in (0.1, 0.05, 0.0):
        trainers.param_groups[0]["lr"] = rate
        parameter.grad = torch.ones(1)
        plan_optimizer.step()
        assert plan_optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(20.0 * rate)
    assert float(parameter.detach()) == pytest.approx(-3.0)


@pytest.mark.parametrize(("clip", "by_value", "step"), [(0.0, False, 4.0), (1.0, False, 1.0), (0.5, True, 0.5)])
def test_gradients_are_clipped_by_norm_or_by_value(clip: float, by_value: bool, step: float) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((1,), 4.0)
    PlanOptimizer([parameter], 1.0, [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)]).step(clip=clip, by_value=by_value)
    assert float(parameter.detach()) == pytest.approx(-step, rel=1e-4)


def test_the_state_of_an_optimiser_goes_on_in_a_new_one() -> None:
    def optimizer(parameter: nn.Parameter) -> PlanOptimizer:
        return PlanOptimizer([parameter], 0.1, [torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.1)])

    def steps(parameter: nn.Parameter, plan_optimizer: PlanOptimizer, gradients: list[float]) -> None:
        for gradient in gradients:
            parameter.grad = torch.full((3,), gradient)
            plan_optimizer.step()

    first = nn.Parameter(torch.zeros(3))
    steps(first, before := optimizer(first), [1.0, -2.0])
    second = nn.Parameter(first.detach().clone())
    after = optimizer(second)
    after.load_state_dict(before.state_dict())
    for parameter, plan_optimizer in ((first, before), (second, after)):
        steps(parameter, plan_optimizer, [3.0, 0.5])
    assert torch.equal(first, second)
    with pytest.raises(ConfigError, match="'exp_avg' of parameter 1 does not fit"):
        optimizer(nn.Parameter(torch.zeros(4))).load_state_dict(before.state_dict())
