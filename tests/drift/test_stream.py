"""Stream mode counts every response token of training once, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drift.drift_helpers import SITE, VOCABULARY, Loop, batch, direction, features, prompts, rank_main, stream
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from processes import run_on_ranks
from torch import Tensor, nn

from steer.drift import DriftTracker
from steer.drift.records import DriftRecord
from steer.errors import ContextError
from steer.intervene import Add, Intervention, Plan
from steer.kernels import force
from steer.model.annotations import response_tokens

Tiny = Callable[[str], Any]


def counted(tracker: DriftTracker) -> int:
    return int(next(iter(tracker.readers.values())).window.n)


def responses(*batches: dict[str, Tensor]) -> int:
    return sum(int((inputs["labels"] != -100).sum()) for inputs in batches)


def states(model: nn.Module, inputs: dict[str, Tensor], layer: int = 2) -> Tensor:
    """[response tokens, width], read without any hook."""
    with torch.no_grad():
        hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True).hidden_states[
            layer
        ]
    return hidden[inputs["labels"] != -100].double()


def named(records: list[DriftRecord]) -> DriftRecord:
    return next(record for record in records if record.kind == "named" and record.mode == "stream")


@pytest.mark.parametrize("path", ["auto", "op"])
def test_the_numbers_are_those_of_the_labelled_tokens(tiny: Tiny, path: str) -> None:
    """Also those of the kernel that reads an activation on a GPU."""
    model, tracker = tiny("llama"), stream()
    first, later = [batch(0), batch(1)], [batch(2)]
    expected = [torch.cat([states(model, inputs) for inputs in window]) @ direction().unit.double() for window in (first, later)]
    records = []
    with force(path), tracker.attached(model):
        assert tracker.measure(0) == []
        for step, window in ((2, first), (3, later)):
            for inputs in window:
                model(**inputs)
            records.append(named(tracker.measure(step)))
    for record, p in zip(records, expected, strict=True):
        assert record.n == len(p)
        assert (record.mean, record.sd) == pytest.approx((p.mean().item(), p.std().item()), rel=1e-4)
    assert records[0].change == records[0].effect_sd == 0.0
    assert records[1].change == pytest.approx((expected[1].mean() - expected[0].mean()).item(), rel=1e-3)
    assert records[1].effect_sd == pytest.approx(records[1].change / expected[0].std().item(), rel=1e-3)
    assert records[1].z_controls is not None and records[1].p is records[1].z_isotropic is None
    assert set(tracker.log_values()) == {f"drift_stream/rude/{SITE}/{name}" for name in ("effect_sd", "change", "z_controls")}


def test_only_the_policys_training_passes_count(tiny: Tiny) -> None:
    """Validation, generation in training mode (as GRPO does) and the probe are left out; micro-batches all count."""
    model, tracker, inputs = tiny("llama").train(), stream(probe=prompts()), batch(0)
    with tracker.attached(model):
        tracker.measure(0)
        with torch.no_grad():
            model(**inputs)
            model.generate(inputs["input_ids"][:1], max_new_tokens=3, do_sample=False)
        assert counted(tracker) == 0
        model(**inputs).loss.backward()
        model(**batch(1)).loss.backward()
        assert counted(tracker) == responses(inputs, batch(1))


def test_the_reference_pass_of_dpo_is_left_out(tiny: Tiny) -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    tracker, inputs = stream(), batch(0)
    with tracker.attached(model):
        model(**inputs)
        with torch.no_grad(), model.disable_adapter():
            model(**inputs)
        assert counted(tracker) == responses(inputs)
        with model.disable_adapter():  # a reference pass that forgot no_grad
            model(**inputs)
        assert counted(tracker) == responses(inputs)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("site", "width"), [(SITE, 32), ("layers.1.attn.output", 32), ("layers.1.mlp.neurons", 64)])
def test_gradient_checkpointing_counts_once(tiny: Tiny, site: str, width: int, reentrant: bool) -> None:
    plain, recomputed = tiny("llama").train(), tiny("llama").train()
    recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    recomputed.enable_input_require_grads()
    records = []
    for model in (plain, recomputed):
        tracker = stream(site, width=width)
        with tracker.attached(model):
            for step in range(2):
                model(**batch(step), use_cache=False).loss.backward()
            records.append(named(tracker.measure(2)))
    assert records[0] == records[1] and records[0].n == responses(batch(0), batch(1))


def test_the_hooks_change_no_gradient(tiny: Tiny) -> None:
    gradients = []
    for tracked in (False, True):
        model, tracker = tiny("llama").train(), stream()
        if tracked:
            tracker.attach(model)
        model(**batch(0)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_response_masks_stand_in_for_labels(tiny: Tiny) -> None:
    model, tracker, inputs = tiny("llama"), stream(), batch(0)
    unlabelled = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
    with tracker.attached(model):
        with response_tokens(model, inputs["labels"] != -100):
            model(**unlabelled)
        assert counted(tracker) == responses(inputs)
        with pytest.raises(ContextError, match="cannot tell the response"):
            model(**unlabelled)


def test_a_plan_attached_before_is_seen(tiny: Tiny) -> None:
    v = direction()
    plan = Plan(Intervention(Add(v.vector), SITE, scope="response", strength=1.0, phases=("train",)))
    model, means = tiny("llama"), []
    for steered in (False, True):
        tracker = stream()
        if steered:
            attachment = plan.attach(model)
        with tracker.attached(model):
            model(**batch(0))
            means.append(named(tracker.measure(1)).mean)
    attachment.detach()
    assert means[1] - means[0] == pytest.approx(2.0, rel=1e-4)


def test_mixed_precision_does_not_blur_the_projection(tiny: Tiny) -> None:
    """Under bf16 autocast the residual stream stays fp32, and so must the projection on the direction."""
    model, tracker, inputs = tiny("llama"), stream(), batch(0)
    hidden: list[Tensor] = []
    handle = model.model.layers[1].register_forward_hook(
        lambda module, args, out: hidden.append(out if isinstance(out, Tensor) else out[0])
    )
    with tracker.attached(model), torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
        record = named(tracker.measure(1))
    handle.remove()
    exact = hidden[0].detach()[inputs["labels"] != -100].double() @ direction().unit.double()
    assert record.mean == pytest.approx(exact.mean().item(), rel=1e-5)
    tracker = stream()
    with tracker.attached(model.to(torch.bfloat16)):
        model(**inputs)
        assert named(tracker.measure(1)).n == responses(inputs)


def test_a_window_survives_a_checkpoint(tiny: Tiny) -> None:
    """Saved in the middle of a window: the records after the resume are those of the run that went on."""
    model, uninterrupted = tiny("llama"), stream()
    with uninterrupted.attached(model):
        for step in range(2):
            model(**batch(step))
        uninterrupted.measure(2)
        model(**batch(2))
        state = uninterrupted.state_dict()
        model(**batch(3))
        expected = uninterrupted.measure(4)
    resumed = stream()
    resumed.load_state_dict(state)  # before the attach, as Lightning may do it
    with resumed.attached(model):
        model(**batch(3))
        assert resumed.measure(4) == expected
    other_rank = stream()
    other_rank.load_state_dict(state, main=False)
    assert counted(other_rank) == 0 and other_rank.last_step == 2


# ---- two processes


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    run_on_ranks(rank_main, tmp_path)
    ranks = [[DriftRecord(**fields) for fields in torch.load(tmp_path / f"{rank}.pt", weights_only=True)] for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    model, tracker = FAMILIES["llama"](), stream(probe=prompts(), features=features())
    with tracker.attached(model):
        tracker.measure(0)
        for step in range(3):
            model(**batch(step))
        alone = tracker.measure(3)
    assert [record.direction for record in alone] == [record.direction for record in ranks[0]]
    for single, double in zip(alone, ranks[0], strict=True):
        assert (single.mode, single.n) == (double.mode, double.n)
        if single.kind in ("named", "control"):
            assert (single.mean, single.sd) == pytest.approx((double.mean, double.sd), rel=1e-6)
        else:
            assert dict(single.metrics) == pytest.approx(dict(double.metrics), rel=1e-5, abs=1e-7, nan_ok=True), single.direction
    assert named(alone).n == responses(*map(batch, range(3)))


def test_reading_costs_little_beside_a_step(tiny: Tiny) -> None:
    """The hook makes no copy of the activation larger than itself and keeps nothing: its state has the same size after many batches."""
    loop, tracker = Loop(tiny("llama")), stream()
    with tracker.attached(loop.model):
        list(loop.train(1))
        before = {name: tensor.shape for name, tensor in tracker.state_dict().items()}
        list(loop.train(10))
        assert {name: tensor.shape for name, tensor in tracker.state_dict().items()} == before
    assert VOCABULARY not in {size for shape in before.values() for size in shape}
