"""SteeringRun and DriftRun in a custom loop, as a trainer of any framework uses them."""

from __future__ import annotations

import ast
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_helpers import (
    PROMPT,
    ROWS,
    SITE,
    TOKENS,
    TRAIT,
    Module,
    learner,
    loader,
    make_plan,
    make_tracker,
    make_trainer,
    n_hooks,
    only,
    same_weights,
)
from families import FAMILIES
from interrupts import interrupted, lines_of
from torch import Tensor, nn

import steer.training
from steer.callbacks import SteeringCallback
from steer.errors import AttachError, ConfigError
from steer.intervene import Linear, Plan
from steer.training.drift_run import DriftRun
from steer.training.ranks import Ranks
from steer.training.steering_run import SteeringRun

NAME = f"add@{SITE}"
LOGGED = f"steer/add/{SITE}"  # prefix of its metrics
RESPONSE = ROWS * (TOKENS - PROMPT)  # response tokens of one epoch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning")


class Loop:
    """A plain PyTorch loop around a steered model: a batch, a step."""

    def __init__(self, run: SteeringRun) -> None:
        self.run, self.model, self.losses = run, FAMILIES["llama"](), []
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.metrics: dict[int, dict[str, float]] = {}

    def train(self, start: int, batches: list[dict[str, Tensor]], state: dict[str, Tensor] | None = None) -> None:
        run = self.run
        run.attach(self.model, Ranks())
        if state is not None:
            run.load_state_dict(state, is_first_rank=True)
        run.start(start, self.model, [self.optimizer])
        for step, batch in enumerate(batches, start + 1):
            run.batch_start(batch)
            self.optimizer.zero_grad()
            loss = self.model(**batch, use_cache=False).loss
            loss.backward()
            run.learning.average_gradients()
            run.learning.check_gradients()
            run.learning.step()
            self.optimizer.step()
            run.batch_end()
            if (metrics := run.advance(step)) is not None:
                self.metrics[step] = metrics
            self.losses.append(loss.item())
        run.detach()


def steering(plan: Plan, **options: Any) -> SteeringRun:
    return SteeringRun(plan, **{"phases": ("train",), "schedule": Linear(8), "every_n_steps": 3, **options})


# ---- a plan


def test_a_custom_loop_trains_as_a_trainer_does() -> None:
    loop, module = Loop(steering(make_plan())), Module()
    loop.train(0, list(loader()))
    callback = SteeringCallback(make_plan(), schedule=Linear(8))
    make_trainer(callback).fit(module, loader())
    assert loop.losses == module.losses and same_weights(loop.model, module.model)
    ours, theirs = loop.run.state_dict(), callback.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_metrics_are_given_when_they_are_due_with_the_strength_of_the_step_before() -> None:
    loop = Loop(steering(make_plan()))
    loop.train(0, list(loader()))
    tokens = 2 * (TOKENS - PROMPT)
    assert loop.metrics == {
        3: {f"{LOGGED}/strength": 2 / 8, f"{LOGGED}/tokens": 2.0 * tokens},  # step 0 has strength 0
        6: {f"{LOGGED}/strength": 5 / 8, f"{LOGGED}/tokens": 5.0 * tokens},
    }
    assert n_hooks(loop.model) == 0


def test_an_accumulating_step_advances_nothing() -> None:
    run = steering(make_plan(), every_n_steps=1)
    run.attach(FAMILIES["llama"](), Ranks())
    run.start(4, nn.Linear(1, 1), [])
    assert run.advance(4) is None and run.advance(5) == run.metrics() | {f"{LOGGED}/strength": 0.5}
    run.detach()
    run.detach()  # at any time


@pytest.mark.parametrize("learns", [False, True])
def test_a_run_goes_on_from_its_state(learns: bool) -> None:
    def run() -> SteeringRun:
        return steering(learner() if learns else make_plan(), learning_rate=0.1 if learns else None)

    batches = list(loader())
    uninterrupted = Loop(run())
    uninterrupted.train(0, batches)
    first, second = Loop(run()), Loop(run())
    first.train(0, batches[:5])
    second.model, second.optimizer = first.model, first.optimizer
    second.train(5, batches[5:], first.run.state_dict())
    assert first.losses + second.losses == uninterrupted.losses
    ours, theirs = second.run.state_dict(), uninterrupted.run.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert int(ours[f"{NAME}/tokens"]) == RESPONSE - 2 * (TOKENS - PROMPT)
    if learns:
        assert torch.equal(only(second.run.plan), only(uninterrupted.run.plan))


def test_only_the_first_rank_takes_the_tokens_of_all() -> None:
    loop = Loop(steering(make_plan()))
    loop.train(0, list(loader()))
    for is_first_rank, tokens in ((True, RESPONSE - 2 * (TOKENS - PROMPT)), (False, 0)):
        resumed = steering(make_plan())
        resumed.load_state_dict(loop.run.state_dict(), is_first_rank=is_first_rank)
        assert int(resumed.state_dict()[f"{NAME}/tokens"]) == tokens


def test_a_state_in_the_layout_of_0_1_0() -> None:
    plan = learner(scope="response[:4]")
    state = {
        "step": torch.tensor(3),
        f"{NAME}/base": torch.tensor([0.5]),
        f"{NAME}/enabled": torch.tensor(True),
        f"{NAME}/tokens": torch.tensor(60),
        f"{NAME}/window": torch.tensor([[1, 1], [0, 0]]),  # [1:]
        f"{NAME}/learned/vector": torch.full((1, 32), 2.0),
        "learning/reference": torch.tensor(0.01, dtype=torch.float64),
        "learning/0/step/tensor": torch.tensor(3.0),
        "learning/0/exp_avg/tensor": torch.zeros(1, 32),
        "learning/0/exp_avg_sq/tensor": torch.ones(1, 32),
    }
    run = steering(plan, learning_rate=0.1, schedule=None)
    run.attach(model := FAMILIES["llama"](), Ranks())
    run.load_state_dict(state, is_first_rank=True)
    run.start(3, model, [torch.optim.Adam(model.parameters(), lr=1e-2)])
    again = run.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) and again[key].dtype is state[key].dtype for key in state)
    assert torch.equal(only(plan), torch.full((1, 32), 2.0))
    run.detach()


def test_a_state_that_comes_before_the_model_waits_for_it() -> None:
    first = steering(learner(scope="response[:4]"), learning_rate=0.1)
    first.attach(FAMILIES["llama"](), Ranks())
    first.attachment.set_strength(0.25)
    first.attachment.set_window(1, None)
    first.attachment.step(4)
    first.detach()
    state = first.state_dict() | {f"{NAME}/learned/vector": torch.ones(1, 32), f"{NAME}/tokens": torch.tensor(60)}
    second = steering(learner(scope="response[:4]"), learning_rate=0.1)
    second.load_state_dict(state, is_first_rank=True)
    for attached in (False, True):
        if attached:
            second.attach(FAMILIES["llama"](), Ranks())
        again = second.state_dict()
        assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    assert float(second.attachment[NAME].strength) == 0.25 * 4 / 8 and torch.equal(only(second.plan), torch.ones(1, 32))
    second.detach()


def test_a_run_takes_its_state_and_its_counts_to_another_model() -> None:
    run, batch = steering(make_plan(), schedule=None), next(iter(loader()))
    for times in (1, 2):
        run.attach(model := FAMILIES["llama"](), Ranks())
        if times == 1:
            run.attachment.set_strength(0.5)
        model(**batch, use_cache=False).loss.backward()
        assert run.attachment.fired() == {NAME: 2 * (TOKENS - PROMPT)}
        state = run.state_dict()
        assert int(state[f"{NAME}/tokens"]) == times * 2 * (TOKENS - PROMPT) and float(state[f"{NAME}/base"]) == 0.5
    run.detach()


def test_one_plan_in_two_runs_at_once() -> None:
    plan, batch = make_plan(), next(iter(loader()))
    train, validate = steering(plan), steering(plan, phases=("validate",), schedule=None)
    models = [FAMILIES["llama"](), FAMILIES["llama"]()]
    for run, model in zip((train, validate), models, strict=True):
        run.attach(model, Ranks())
        run.start(0, model, [])
    train.advance(4)
    for model in models:
        model(**batch, use_cache=False).loss.backward()
    assert train.attachment.fired() == {NAME: 2 * (TOKENS - PROMPT)} and validate.attachment.fired() == {NAME: 0}
    assert float(train.attachment[NAME].strength) == 0.5 and float(validate.attachment[NAME].strength) == 1.0
    for run in (train, validate):
        run.detach()


def test_a_run_that_is_over_keeps_no_model() -> None:
    loop = Loop(steering(make_plan()))
    loop.train(0, list(loader())[:2])
    parts = [weakref.ref(part) for part in (loop.model.model.layers[1], *loop.model.parameters())]
    del loop.model, loop.optimizer
    gc.collect()
    assert not [part for part in parts if part() is not None]
    assert loop.run.attachment.fired() == {NAME: 2 * (TOKENS - PROMPT)}  # step 0 has strength 0


@pytest.mark.parametrize("kind", ["plan", "tracker"])
def test_an_interrupted_attach_of_a_run_is_taken_back_by_detach(kind: str) -> None:
    model = FAMILIES["llama"]()
    run = steering(make_plan()) if kind == "plan" else DriftRun(make_tracker(), every_n_steps=2)

    def attach_and_detach() -> None:
        try:
            run.attach(model, Ranks())
        finally:
            run.detach()

    attach_and_detach()  # the first one looks at the model
    for line in range(lines_of(attach_and_detach) - 1, 0, -29):
        assert interrupted(attach_and_detach, line)
        run.detach()
        assert n_hooks(model) == 0


def test_a_run_without_a_model_says_so() -> None:
    run = steering(make_plan())
    for call in (lambda: run.start(0, nn.Linear(1, 1), []), lambda: run.batch_start(None), lambda: run.advance(1), run.metrics):
        with pytest.raises(AttachError, match="no model yet"):
            call()


def test_what_was_learned_comes_back_alone() -> None:
    first, second = steering(learner(), learning_rate=0.1), steering(learner(), learning_rate=0.1)
    state = first.state_dict() | {f"{NAME}/learned/vector": torch.ones(1, 32), f"{NAME}/base": torch.tensor([7.0])}
    second.load_learned(state)
    assert torch.equal(only(second.plan), torch.ones(1, 32)) and float(second.state_dict()[f"{NAME}/base"]) == 1.0


# ---- a tracker


def test_a_tracker_measures_before_the_first_step_at_every_interval_and_at_the_end(tmp_path: Path) -> None:
    tracker, model = make_tracker(tmp_path / "d.sqlite"), FAMILIES["llama"]()
    run, optimizer = DriftRun(tracker, 3), torch.optim.Adam(model.parameters(), lr=1e-2)
    run.attach(model, Ranks())
    assert run.start(0) and run.values.keys() >= {f"{TRAIT}/effect_sd"} and not run.start(0)
    measured = []
    for step, batch in enumerate(loader(), 1):
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if run.is_due(step, is_last=step == 8):
            measured.append((step, run.measure(step)))
    run.detach()
    assert [step for step, _ in measured] == [3, 6, 8] and tracker.last_step == 8
    assert not run.is_due(8) and not run.is_due(8, is_last=True)
    assert n_hooks(model) == 0

    resumed = DriftRun(make_tracker(tmp_path / "d.sqlite"), 3)
    resumed.load_state_dict(run.state_dict(), is_first_rank=True)
    assert resumed.values == pytest.approx(run.values) and resumed.tracker.last_step == 8
    with pytest.raises(ConfigError, match="measured another run"):
        resumed.start(7)


# ---- the room


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("file", sorted(Path(steer.training.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_the_engine_knows_no_framework(file: Path) -> None:
    assert not {name.split(".")[0] for name in imported(file)} & {"pytorch_lightning", "transformers", "trl", "accelerate"}
    assert not [name for name in imported(file) if name.startswith("steer.callbacks")]
