"""An interrupt anywhere in an attach or a detach: nothing stays on the model, and the next attach works."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hand import hook_count, ids, vector
from interrupts import interrupted, lines_of

import steer
from steer.directions import Direction
from steer.drift import DriftTracker
from steer.errors import AttachError, NonFiniteError
from steer.intervene import Ablate, Add, Intervention, Plan
from steer.model.site import Site
from steer.model.tokens import Row
from steer.model.watcher import watcher_of


def plan() -> Plan:
    return Plan([Intervention(Add(vector(seed=n)), site) for n, site in enumerate(("layers.0.output", "layers.1.mlp.output"))])


def check_untouched(model: torch.nn.Module, plain: torch.Tensor) -> None:
    assert hook_count(model) == 0 and watcher_of(model) is None
    with plan().attached(model), torch.no_grad():
        model(ids())
    assert hook_count(model) == 0
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, plain)


def test_an_interrupted_attach_leaves_nothing(tiny):
    model = tiny("llama").eval()
    with torch.no_grad():
        plain = model(ids()).logits
    steered = plan()
    lines = lines_of(lambda: steered.attach(model).detach())
    assert lines > 500
    for line in range(0, lines, 7):

        def action() -> None:
            with steered.attached(model), torch.no_grad():
                model(ids())

        if not interrupted(action, line):
            break
        check_untouched(model, plain)


def test_an_interrupted_detach_is_finished(tiny):
    model = tiny("llama").eval()
    with torch.no_grad():
        plain = model(ids()).logits
    steered = plan()
    attachment = steered.attach(model)
    lines = lines_of(attachment.detach)
    for line in range(lines):
        attachment = steered.attach(model)
        assert interrupted(attachment.detach, line)
        if attachment.is_attached:
            attachment.detach()
        check_untouched(model, plain)


class Nothing:
    """An accumulator that keeps nothing."""

    def update(self, h: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> None: ...


ROWS = [Row((11, 12, 13), 1), Row((21, 22, 23), 1)]


def reading(model: torch.nn.Module) -> None:
    steer.capture(model, ROWS, {Site.parse("layers.1.output"): Nothing()})


def tracking(model: torch.nn.Module) -> None:
    tracker = DriftTracker({"a": Direction("layers.1.output", vector(), "given", "all", {})}, probe=ROWS)
    with tracker.attached(model):
        tracker.measure(0)


def announcing(model: torch.nn.Module) -> None:
    with steer.response_tokens(model, torch.ones(1, 2)):
        pass


def baking(model: torch.nn.Module) -> None:
    with steer.bake(Plan(Intervention(Add(vector()), "layers.1.mlp.output")), model, savable=False):
        pass


@pytest.mark.parametrize(("use", "stride"), [(reading, 23), (tracking, 67), (announcing, 1), (baking, 97)])
def test_an_interrupted_use_leaves_nothing(use, stride, tiny):
    model = tiny("llama").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        plain = model(ids()).logits
    use(model)
    for line in range(0, lines_of(lambda: use(model)), stride):
        assert interrupted(lambda: use(model), line)
        check_untouched(model, plain)
        assert not any(module.training for module in model.modules())
        now = model.state_dict()
        assert now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_an_interrupted_undo_is_finished(tiny):
    model = tiny("llama").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for line in range(200):
        baked = steer.bake(Plan(Intervention(Ablate(vector()), "layers.*.mlp.output")), model)
        was_interrupted = interrupted(baked.undo, line)
        baked.undo()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        if not was_interrupted:
            break
    assert line > 5


def test_a_model_that_nobody_detached_from_is_freed(tiny):
    model = tiny("llama")
    plan().attach(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_an_attachment_is_not_copied(tiny):
    attachment = plan().attach(tiny("llama"))
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(AttachError, match="as_plan"):
            duplicate(attachment)
    attachment.detach()


def test_a_schedule_that_fails_changes_nothing(tiny):
    def breaks_at_two(step: int) -> float:
        return 1.0 + step if step < 2 else float("nan")

    interventions = [
        Intervention(Add(vector()), "layers.0.output", schedule=lambda step: 1.0 + step),
        Intervention(Add(vector()), "layers.1.output", schedule=breaks_at_two),
    ]
    attachment = Plan(interventions).attach(tiny("llama"))
    attachment.step(1)
    with pytest.raises(NonFiniteError):
        attachment.step(2)
    assert attachment.current_step == 1
    assert [active.strength.item() for active in attachment.interventions] == [2.0, 2.0]
    attachment.detach()
