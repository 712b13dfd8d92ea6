"""The cost of a step's hooks, with a clock that is told how long things take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callback_helpers import make_plan
from families import FAMILIES
from torch import Tensor, nn

from steer.experiment import overhead
from steer.experiment.overhead import step_overhead
from steer.intervene import Attachment

BATCH = {"input_ids": torch.full((2, 6), 9), "labels": torch.full((2, 6), 9)}


class Clock:
    """Advances when a step runs: by one second, and by more when hooks are attached."""

    def __init__(self, extra: float) -> None:
        self.now, self.extra, self.hooked, self.order = 0.0, extra, False, ""

    def perf_counter(self) -> float:
        return self.now

    @contextmanager
    def attached(self) -> Iterator[None]:
        self.hooked = True
        try:
            yield
        finally:
            self.hooked = False

    def step(self) -> None:
        self.now += 1 + self.extra * self.hooked
        self.order += "h" if self.hooked else "b"


class Model(nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.weight, self.clock = nn.Parameter(torch.ones(1)), clock

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> Any:
        self.clock.step()
        return SimpleNamespace(loss=(self.weight * input_ids).mean())


@pytest.mark.parametrize("extra", [0.0, 0.03, 1.0])
def test_the_ratio_of_neighbouring_steps(monkeypatch: pytest.MonkeyPatch, extra: float) -> None:
    clock = Clock(extra)
    monkeypatch.setattr(overhead, "time", clock)
    assert step_overhead(Model(clock), BATCH, clock.attached, rounds=4) == pytest.approx((extra, extra, extra))
    assert clock.order == "b" + "bhhbbhhb", "a warm-up, then pairs, each in the opposite order of the one before"


@pytest.mark.parametrize(("start", "highest"), [(7, 0.1), (6, 4.5)], ids=["between rounds", "within a round"])
def test_a_slow_spell_is_not_charged_to_the_hooks_but_shown(monkeypatch: pytest.MonkeyPatch, start: int, highest: float) -> None:
    clock = Clock(0.1)
    step = clock.step

    def slower() -> None:
        before = clock.now
        step()
        clock.now = before + (clock.now - before) * (5 if len(clock.order) > start else 1)

    monkeypatch.setattr(clock, "step", slower)
    monkeypatch.setattr(overhead, "time", clock)
    cost = step_overhead(Model(clock), BATCH, clock.attached, rounds=5)
    assert cost == pytest.approx((0.1, 0.1, highest))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = FAMILIES["llama"]().train(training)
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    plan = make_plan()
    attachments: list[Attachment] = []

    @contextmanager
    def attached() -> Iterator[None]:
        with plan.attached(model) as attachment:
            attachments.append(attachment)
            yield

    cost = step_overhead(model, BATCH, attached, rounds=2)
    assert -1 < cost.low <= cost.median <= cost.high and attachments[-1].passes == 1, "the last step was a steered one"
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
