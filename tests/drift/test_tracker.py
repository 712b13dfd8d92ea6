"""The tracker in probe mode, its store, its state, and what it must leave alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from drift.drift_helpers import SITE, WIDTH, Loop, direction, prompts
from safetensors.torch import load_file, save_file
from torch import nn

from steer.directions.direction import Directions
from steer.drift import DriftStore, DriftTracker
from steer.drift.site_directions import random_units
from steer.errors import AttachError, ConfigError, NonFiniteError, SiteError, WidthError, WrongModelError
from steer.intervene import Add, Intervention, Plan
from steer.model.hooks import prepare_compile
from steer.model.site import Site
from steer.model.watcher import watcher_of

Tiny = Callable[[str], Any]


def shift(model: nn.Module, vector: torch.Tensor, layer: int = 1) -> None:
    """Adds a constant to the output of a block for good, as training of a bias would."""
    projection = model.model.layers[layer].mlp.down_proj
    bias = vector if projection.bias is None else projection.bias + vector
    projection.bias = nn.Parameter(bias.clone())


def by_name(tracker: DriftTracker, name: str, site: str = SITE, mode: str = "probe") -> Any:
    return next(record for record in tracker.latest if (record.direction, record.site, record.mode) == (name, site, mode))


def test_the_numbers_are_those_of_the_hidden_states(tiny: Tiny) -> None:
    """Against `output_hidden_states`, one unpadded prompt at a time."""
    model, rows, v = tiny("llama"), prompts(), direction()

    @torch.no_grad()
    def projections() -> torch.Tensor:
        states = [model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[2][0, -1] for row in rows]
        return (torch.stack(states) @ v.unit).double()

    tracker = DriftTracker({"rude": v}, probe=rows, stream=False)
    before = projections()
    with tracker.attached(model):
        tracker.measure(0)
        first = by_name(tracker, "rude")
        for _ in Loop(model).train(3):
            pass
        model.eval()
        after = projections()
        tracker.measure(3)
    later = by_name(tracker, "rude")
    assert (first.mean, first.sd) == pytest.approx((before.mean().item(), before.std().item()), rel=1e-5)
    assert (first.change, first.effect_sd, first.p, first.z_controls, first.z_isotropic) == (0.0, 0.0, 1.0, 0.0, 0.0)
    change = (after - before).mean().item()
    assert abs(change) > 1e-3
    assert (later.mean, later.sd) == pytest.approx((after.mean().item(), after.std().item()), rel=1e-5) and later.n == len(rows)
    assert later.change == pytest.approx(change, rel=1e-4)
    assert later.effect_sd == pytest.approx(change / before.std().item(), rel=1e-4)
    assert later.effect_gap == pytest.approx(change / 2.0, rel=1e-4)


def test_a_shift_along_the_direction_is_specific_and_one_across_it_is_not(tiny: Tiny) -> None:
    v = direction()
    across = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))
    across -= (across @ v.unit) * v.unit
    records = {}
    for name, moved in (("along", 3 * v.unit), ("across", 3 * across / across.norm())):
        model = tiny("llama")
        tracker = DriftTracker({"rude": v}, probe=prompts(), stream=False)
        with tracker.attached(model):
            tracker.measure(0)
            shift(model, moved)
            tracker.measure(1)
        records[name] = by_name(tracker, "rude")
    along, across_it = records["along"], records["across"]
    assert along.change == pytest.approx(3.0, rel=1e-4) and along.effect_gap == pytest.approx(1.5, rel=1e-4)
    assert along.p == 2 / 2**10 and along.q == along.p
    assert along.z_isotropic == pytest.approx(3.89, abs=0.01)  # rarer than any of 9,999 pairs
    assert along.z_controls > 3 and along.z_covariance > 3
    assert abs(across_it.z_isotropic) < 0.1 and abs(across_it.z_controls) < 0.1


def test_controls_are_always_beside_and_never_change(tiny: Tiny) -> None:
    tracker = DriftTracker({"rude": direction(), "calm": direction(seed=1)}, probe=prompts(), stream=False)
    with tracker.attached(tiny("llama")):
        records = tracker.measure(0)
    controls = [record for record in records if record.kind == "control"]
    assert [record.direction for record in controls] == [f"random-{i:02d}" for i in range(16)]
    assert all((record.p, record.q, record.z_controls, record.effect_gap) == (None, None, None, None) for record in controls)
    site = Site.parse(SITE)
    torch.testing.assert_close(random_units(16, WIDTH, site, 0).norm(dim=1), torch.ones(16).double())
    assert torch.equal(tracker.sites[site].units[2:], random_units(16, WIDTH, site, 0))
    assert not torch.equal(random_units(16, WIDTH, site, 0), random_units(16, WIDTH, site, 1))
    assert not torch.equal(random_units(16, WIDTH, site, 0), random_units(16, WIDTH, Site.parse("layers.0.output"), 0))


def test_q_corrects_over_all_named_directions_and_sites(tiny: Tiny) -> None:
    watched = {"a": Directions([direction(f"layers.{i}.output", seed=i) for i in range(3)], "a", {}), "b": [direction(seed=7)]}
    tracker = DriftTracker(watched, probe=prompts(), stream=False)
    loop = Loop(tiny("llama"))
    with tracker.attached(loop.model):
        tracker.measure(0)
        list(loop.train(1))
        named = [record for record in tracker.measure(1) if record.kind == "named"]
    assert len(named) == 4 and {(record.direction, record.site) for record in named} == {
        ("a", "layers.0.output"), ("a", "layers.1.output"), ("a", "layers.2.output"), ("b", "layers.1.output")
    }  # fmt: skip
    assert max(record.q for record in named) == max(record.p for record in named)
    assert all(record.q >= record.p for record in named) and any(record.q > record.p for record in named)


def test_log_values_have_stable_keys(tiny: Tiny) -> None:
    tracker = DriftTracker({"rude": direction()}, probe=prompts(), stream=False)
    assert tracker.log_values() == {}
    with tracker.attached(tiny("llama")):
        tracker.measure(0)
    assert set(tracker.log_values()) == {f"drift/rude/{SITE}/{name}" for name in ("effect_sd", "change", "z_controls", "p")}


def test_a_measurement_leaves_the_model_as_it_was(tiny: Tiny) -> None:
    model = tiny("llama")
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tracker = DriftTracker({"rude": direction()}, probe=prompts())
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    with tracker.attached(model):
        tracker.measure(0)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert torch.is_grad_enabled()
    assert watcher_of(model) is None
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_training_is_the_same_with_and_without_the_tracker(tiny: Tiny) -> None:
    ends = []
    for tracked in (False, True):
        loop = Loop(tiny("llama"))
        tracker = DriftTracker({"rude": direction()}, probe=prompts())
        if tracked:
            tracker.attach(loop.model)
            tracker.measure(0)
        for step in loop.train(4):
            if tracked:
                tracker.measure(step)
        ends.append(loop.state()["model"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_training_plan_is_off_in_the_probe_and_one_for_validation_is_measured(tiny: Tiny) -> None:
    v, changes = direction(), {}
    for phases in (("train",), ("train", "validate")):
        model = tiny("llama")
        tracker = DriftTracker({"rude": v}, probe=prompts(), stream=False)
        plan = Plan(Intervention(Add(v.vector), SITE, scope="all", strength=1.0, phases=phases))
        with tracker.attached(model):
            tracker.measure(0)
            with plan.attached(model):
                tracker.measure(1)
                changes[phases] = by_name(tracker, "rude").change
                model(torch.tensor([[8, 9]]), labels=torch.tensor([[8, 9]]))
    assert changes[("train",)] == 0.0
    assert changes[("train", "validate")] == pytest.approx(2.0, rel=1e-4)


def test_prompts_with_answers_can_be_read_over_the_response(tiny: Tiny) -> None:
    rows = [type(row)(row.ids, 1) for row in prompts()]
    tracker = DriftTracker({"rude": direction()}, probe=rows, stream=False, span="response")
    model = tiny("llama")
    with tracker.attached(model):
        tracker.measure(0)
    with torch.no_grad():
        states = [model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[2][0, 1:].mean(0) for row in rows]
    torch.testing.assert_close(tracker.probe.baseline[SITE], torch.stack(states), rtol=1e-4, atol=1e-5)


# ---- store and state


def make(tmp_path: Path) -> DriftTracker:
    watched = {"rude": direction(), "calm": direction("layers.2.output", 1)}
    return DriftTracker(watched, probe=prompts(), controls=3, store=tmp_path / "d.sqlite")


def test_an_exact_resume_equals_the_uninterrupted_run(tiny: Tiny, tmp_path: Path) -> None:
    """Checks every 2 of 8 steps; a checkpoint at step 5, inside a window; death at step 7, after a check that it missed."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def go(loop: Loop, tracker: DriftTracker, steps: int) -> None:
        for step in loop.train(steps):
            if step % 2 == 0:
                tracker.measure(step)

    uninterrupted, tracker = Loop(tiny("llama")), make(tmp_path / "a")
    with tracker.attached(uninterrupted.model):
        tracker.measure(0)
        go(uninterrupted, tracker, 8)

    loop, tracker = Loop(tiny("llama")), make(tmp_path / "b")
    with tracker.attached(loop.model):
        tracker.measure(0)
        go(loop, tracker, 5)
        checkpoint = loop.state()
        save_file(tracker.state_dict(), tmp_path / "state.safetensors")
        go(loop, tracker, 2)

    loop, tracker = Loop(tiny("llama")), make(tmp_path / "b")
    with tracker.attached(loop.model):
        loop.restore(checkpoint)
        tracker.load_state_dict(load_file(tmp_path / "state.safetensors"))
        assert tracker.last_step == 4
        go(loop, tracker, 3)
        assert tracker.last_step == 8

    with DriftStore(tmp_path / "a" / "d.sqlite") as a, DriftStore(tmp_path / "b" / "d.sqlite") as b:
        assert [row["from_step"] for row in b.attempts()] == [-1, 4]
        assert a.series("rude", SITE)["step"] == [0, 2, 4, 6, 8]
        assert a.series("rude", SITE, "stream")["step"] == [2, 4, 6, 8]
        assert list(map(astuple, a.records())) == list(map(astuple, b.records()))
    assert all(torch.equal(tensor, loop.state()["model"][name]) for name, tensor in uninterrupted.state()["model"].items())


def test_full_training_that_moves_the_embeddings_still_resumes_into_its_store(tiny: Tiny, tmp_path: Path) -> None:
    loop, tracker = Loop(tiny("llama"), lr=0.5), make(tmp_path)
    with tracker.attached(loop.model):
        tracker.measure(0)
        list(loop.train(2))
        state = tracker.state_dict()
    with make(tmp_path).attached(loop.model) as fresh, pytest.raises(WrongModelError):
        fresh.measure(3)  # not a resume: another model's records
    with make(tmp_path).attached(loop.model) as resumed:
        resumed.load_state_dict(state)
        resumed.measure(3)
    with DriftStore(tmp_path / "d.sqlite") as store:
        assert store.series("rude", SITE)["step"] == [0, 3]


def test_only_the_main_rank_writes(tiny: Tiny, tmp_path: Path) -> None:
    tracker = make(tmp_path)
    with tracker.attached(tiny("llama"), main=False):
        assert tracker.measure(0) == tracker.latest != []
    assert not (tmp_path / "d.sqlite").exists()


def test_the_store_is_free_after_the_detach(tiny: Tiny, tmp_path: Path) -> None:
    model, tracker = tiny("llama"), make(tmp_path)
    for step in (0, 1):
        with tracker.attached(model):
            tracker.measure(step)
    with DriftStore(tmp_path / "d.sqlite") as store:
        assert store.series("calm", "layers.2.output")["step"] == [0, 1]
        assert [(tracked.direction, tracked.kind) for tracked in store.tracked()][:2] == [("rude", "named"), ("random-00", "control")]
        json.dumps(store.fingerprint)


def test_a_state_of_another_tracker_is_refused(tiny: Tiny) -> None:
    trackers = [
        DriftTracker({"rude": direction()}, probe=prompts()),
        DriftTracker({"rude": direction(seed=1)}, probe=prompts()),
        DriftTracker({"rude": direction()}, probe=prompts(seed=1)),
        DriftTracker({"rude": direction()}, probe=prompts(), seed=1),
        DriftTracker({"rude": direction()}, probe=prompts(), span="all"),
        DriftTracker({"rude": direction()}, probe=prompts(), stream=False),
    ]
    state = trackers[0].state_dict()
    trackers[0].load_state_dict(state)
    for another in trackers[1:]:
        with pytest.raises(ConfigError, match="another tracker"):
            another.load_state_dict(state)


# ---- compiled, wrapped, wrong


def test_measuring_does_not_make_compiled_training_compile_again(tiny: Tiny) -> None:
    model = tiny("llama").train()
    torch._dynamo.reset()
    compilations = torch._dynamo.utils.counters["stats"]
    prepare_compile()
    compiled = torch.compile(model, backend="eager")
    tracker = DriftTracker({"rude": direction()}, probe=prompts())
    loop = Loop(compiled)
    with tracker.attached(compiled):
        tracker.measure(0)
        list(loop.train(2))
        before = compilations["unique_graphs"]
        tracker.measure(2)
        window = by_name(tracker, "rude", mode="stream")
        list(loop.train(2))
        tracker.measure(4)
    assert before > 0 and compilations["unique_graphs"] == before
    reference = Loop(tiny("llama"))
    uncompiled = DriftTracker({"rude": direction()}, probe=prompts())
    with uncompiled.attached(reference.model):
        list(reference.train(2))
        uncompiled.measure(2)
    assert window.n == by_name(uncompiled, "rude", mode="stream").n
    assert window.mean == pytest.approx(by_name(uncompiled, "rude", mode="stream").mean, rel=1e-5)


def test_a_lightning_module_without_forward_is_probed(tiny: Tiny) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("llama")

        def training_step(self, inputs: Any, index: int) -> Any:
            return self.net(**inputs).loss

    tracker, plain = (DriftTracker({"rude": direction()}, probe=prompts(), stream=False) for _ in range(2))
    with tracker.attached(Module()), plain.attached(tiny("llama")):
        assert tracker.measure(0) == plain.measure(0)


def test_bad_input(tiny: Tiny) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match="no direction"):
        DriftTracker({}, probe=prompts())
    with pytest.raises(ConfigError, match="nothing to measure"):
        DriftTracker({"rude": direction()}, probe=prompts(1))
    with pytest.raises(ConfigError, match="nothing to measure"):
        DriftTracker({"rude": direction()}, stream=False)
    with pytest.raises(ConfigError, match="0 probe prompts"):  # and not stream mode alone, which leaves `probe` out
        DriftTracker({"rude": direction()}, probe=[])
    for vector in (torch.ones(32), [torch.ones(32)], "rude.pt", None):
        with pytest.raises(ConfigError, match=r"the direction 'rude'(.|\n)*steer.Direction\("):
            DriftTracker({"rude": vector}, probe=prompts())
    with pytest.raises(ConfigError, match="control"):
        DriftTracker({"rude": direction()}, probe=prompts(), controls=1)
    with pytest.raises(ConfigError, match="one name"):
        DriftTracker({"rude": [direction(), direction(seed=1)]}, probe=prompts())
    with pytest.raises(WidthError, match="differ in width"):
        DriftTracker({"a": direction(), "b": direction(width=16)}, probe=prompts())
    with pytest.raises(WidthError, match="do not fit the model"):
        DriftTracker({"a": direction(width=16)}, probe=prompts()).attach(model)
    with pytest.raises(SiteError):
        DriftTracker({"a": direction("layers.7.output")}, probe=prompts()).attach(model)
    tracker = DriftTracker({"rude": direction()}, probe=prompts())
    for call in (lambda: tracker.measure(0), tracker.detach):
        with pytest.raises(AttachError, match="not attached"):
            call()
    with tracker.attached(model):
        with pytest.raises(AttachError, match="attached already"):
            tracker.attach(model)
        tracker.measure(4)
        with pytest.raises(ConfigError, match="measured before"):
            tracker.measure(4)
        shift(model, torch.full((WIDTH,), torch.inf), layer=0)
        with pytest.raises(NonFiniteError, match="layers.1.output"):
            tracker.measure(5)
    assert watcher_of(model) is None
