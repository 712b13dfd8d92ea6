"""One circuit in its uses: an intervention, an ablation in training, a bake and an adapter are the same edit; losses and drift see it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from callback_helpers import Module, loader, make_trainer
from circuits.use_helpers import NEURONS, circuit_of, ids, logits, rows
from torch import Tensor

import steer
from steer.callbacks import DriftCallback, LossCallback, SteeringCallback
from steer.circuits import (
    AblatedTeacherLoss,
    Circuit,
    LogitDifference,
    Pairs,
    attribute,
    circuit_directions,
    circuit_effect,
    circuit_losses,
    zero_ablation,
)
from steer.drift import DriftTracker
from steer.errors import ConfigError, DeployError, WrongModelError
from steer.model.anatomy import Anatomy

TARGET = LogitDifference(10, 20)


def close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).abs().max()) < 1e-4


class Slow(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-4)


# ---- one edit


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("strength", [1.0, 0.5, 1.3])
def test_a_baked_circuit_is_its_intervention(tiny, family: str, strength: float) -> None:
    model = tiny(family)
    circuit = circuit_of(model, *([] if family == "gemma2" else ["m2"]))
    plan = circuit.ablation_plan(model, strength)
    plain = logits(model)
    with plan.attached(model):
        expected = logits(model)
    assert float((expected - plain).abs().max()) > 1e-2
    with steer.bake(plan, model, savable=False):
        close(logits(model), expected)
    assert torch.equal(logits(model), plain)


def test_a_baked_circuit_has_no_columns_of_what_is_ablated_whole(tiny) -> None:
    model = tiny("llama")
    circuit = Circuit.of_nodes(model, ["a1.h2"]).with_ablation(zero_ablation())
    before = model.model.layers[1].self_attn.o_proj.weight.clone()
    steer.bake(circuit.ablation_plan(model), model)
    after = model.model.layers[1].self_attn.o_proj.weight
    assert not after[:, 16:24].any() and torch.equal(after[:, :16], before[:, :16]) and torch.equal(after[:, 24:], before[:, 24:])


def test_an_mlp_with_a_norm_behind_it_is_not_baked(tiny) -> None:
    model = tiny("gemma2")
    with pytest.raises(DeployError, match="norm"):
        steer.bake(circuit_of(model, "m2").ablation_plan(model), model, savable=False)


def test_a_tied_model_is_baked_and_an_input_that_is_ablated_gets_its_head_a_copy(tiny) -> None:
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    for names in (["m2"], ["input"]):
        plan = circuit_of(model, *names).ablation_plan(model, 0.4)
        with plan.attached(model):
            expected = logits(model)
        with steer.bake(plan, model, savable=False):
            close(logits(model), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_adapter_of_a_circuit_is_its_intervention(tiny, family: str, tmp_path) -> None:
    model = tiny(family)
    plan = circuit_of(model).ablation_plan(model)
    with plan.attached(model):
        expected = logits(model)
    adapted = peft.PeftModel.from_pretrained(model, steer.to_adapter(plan, model, tmp_path / "adapter"))
    close(logits(adapted), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ablation_in_training_is_at_step_0_what_the_bake_is(tiny, family: str) -> None:
    model, baked = tiny(family), tiny(family)
    plan = circuit_of(model).ablation_plan(model)
    steer.bake(plan, baked, savable=False)
    ablated, other, plain = Module(model), Module(baked), Module(tiny(family))
    make_trainer(SteeringCallback(plan, schedule=steer.Linear(4, start=1.0, end=0.0)), max_steps=2).fit(ablated, loader())
    for module in (other, plain):
        make_trainer(max_steps=1).fit(module, loader())
    assert abs(ablated.losses[0] - other.losses[0]) < 1e-4 < 1e-3 < abs(plain.losses[0] - other.losses[0])


# ---- losses


def test_losses_of_a_circuit_are_the_weighted_distance_to_its_constants(tiny) -> None:
    model = tiny("llama")
    circuit = circuit_of(model)
    prompts = rows(4, 6, seed=1)
    pairs = Pairs.of(model, prompts, rows(4, 6, seed=2))
    scores = attribute(model, pairs, TARGET, edges=False, neurons=True, progress=False)
    losses = circuit_losses(model, circuit, scores=scores, weight=2.0)
    anatomy = Anatomy.find(model)
    weights = {site: amount.clone() for site, amount in circuit.amounts(anatomy).items()}
    by_name = {str(site): amount for site, amount in weights.items()}
    by_name["layers.1.attn.z"] *= abs(scores["a1.h2"])
    by_name["layers.0.mlp.neurons"] *= scores.neurons[0].sum(0).abs()
    total = sum(float(amount.sum()) for amount in by_name.values())
    h = {str(site): torch.randn(2, 3, len(amount)) for site, amount in weights.items()}
    expected = 0.0
    for site in weights:
        distance = (h[str(site)] - circuit.ablation.values[site]).square().mean((0, 1))
        expected += 2.0 * float((distance * by_name[str(site)]).sum()) / total
    assert sum(loss.weight * float(loss.per_token(h[str(loss.site)]).mean()) for loss in losses) == pytest.approx(expected, rel=1e-4)


def test_losses_draw_the_circuit_to_its_constants_in_training(tiny) -> None:
    model = tiny("llama")
    circuit = circuit_of(model)
    callback = LossCallback(circuit_losses(model, circuit, weight=30.0), every_n_steps=1)
    seen: list[float] = []
    callback._run.advance = _noting(callback._run.advance, seen)
    make_trainer(callback, max_steps=6).fit(Module(model), loader())
    assert seen[-1] < 0.6 * seen[0]


def _noting(advance, seen):
    def noted(step: int):
        metrics = advance(step)
        seen.append(metrics["steer/circuit/layers.1.attn.z/loss"])
        return metrics

    return noted


def test_a_model_learns_to_do_without_the_circuit_from_its_ablated_teacher(tiny) -> None:
    model = tiny("llama")
    teacher = copy.deepcopy(model)
    circuit = circuit_of(model)
    with circuit.ablation_plan(teacher).attached(teacher):
        wanted = logits(teacher).log_softmax(-1)
    loss = AblatedTeacherLoss(teacher, circuit, weight=1000.0)
    with torch.no_grad():
        kl = (wanted.exp() * (wanted - logits(model).log_softmax(-1))).sum(-1)
    ctx = steer.model.context.ForwardContext(*ids().shape, "train", ids=ids())
    torch.testing.assert_close(loss.of_pass(logits(model), ctx), kl, atol=1e-5, rtol=1e-3)
    make_trainer(LossCallback([loss]), max_steps=8).fit(Slow(model), loader())
    kl_after = (wanted.exp() * (wanted - logits(model).log_softmax(-1))).sum(-1)
    assert float(kl_after.mean()) < 0.8 * float(kl.mean())
    assert torch.equal(logits(teacher).log_softmax(-1), logits(tiny("llama")).log_softmax(-1))


def test_a_teacher_that_is_trained_itself_is_refused(tiny) -> None:
    model = tiny("llama")
    loss = AblatedTeacherLoss(model, circuit_of(model))
    with pytest.raises(ConfigError, match="shares weights with the model that is trained"):
        make_trainer(LossCallback([loss]), max_steps=1).fit(Slow(model), loader())


# ---- drift


def test_directions_of_a_circuit_are_what_it_adds_to_a_target(tiny) -> None:
    model = tiny("llama")
    circuit = circuit_of(model)
    prompts = rows(5, 7, seed=3)
    directions = circuit_directions(model, circuit, prompts, TARGET)
    assert {str(site) for site in directions} == {"layers.1.attn.z", "layers.0.mlp.neurons"}
    z = directions["layers.1.attn.z"].vector
    assert not z[:16].any() and not z[24:].any() and bool(z[16:24].all())
    assert directions["layers.0.mlp.neurons"].vector.nonzero().flatten().tolist() == NEURONS
    step = 1e-2 * z / z.norm()
    with steer.Plan(steer.Intervention(steer.Add(step), "layers.1.attn.z", scope="last")).attached(model):
        moved = _target(model, prompts)
    amount = float(circuit.nodes[circuit.graph.writer_place("a1.h2")])
    assert float((moved - _target(model, prompts)).mean()) == pytest.approx(1e-2 * float(z.norm()) / amount, rel=0.05)


@torch.no_grad()
def _target(model, prompts) -> Tensor:
    found = [model(input_ids=torch.tensor([row.ids])).logits[0, -1] for row in prompts]
    return torch.stack([each[10] - each[20] for each in found])


def test_a_tracker_sees_a_circuit_fade_in_training(tiny) -> None:
    model = tiny("llama")
    circuit = circuit_of(model, neurons=False)
    prompts = rows(6, 7, seed=3)
    directions = circuit_directions(model, circuit, prompts, TARGET)
    tracker = DriftTracker({"circuit": directions}, probe=prompts, controls=2, stream=False, span="last")
    callback = LossCallback(circuit_losses(model, circuit, weight=30.0))
    before = circuit_effect(model, circuit, prompts, TARGET)
    trainer = make_trainer(callback, DriftCallback(tracker, every_n_steps=3), max_steps=6)
    trainer.fit(Module(model), loader())
    changes = [record for record in tracker.latest if record.direction == "circuit"]
    assert changes and all(record.step == 6 for record in changes)
    assert float(trainer.callback_metrics["drift/circuit/layers.1.attn.z/effect_sd"]) != 0
    after = circuit_effect(model, circuit, prompts, TARGET)
    assert float(after.abs().mean()) < float(before.abs().mean())


def test_the_effect_of_a_circuit_is_the_target_with_it_less_without(tiny) -> None:
    model = tiny("llama")
    circuit = circuit_of(model)
    prompts = rows(4, 7, seed=3)
    plain = _target(model, prompts)
    with circuit.ablation_plan(model).attached(model):
        ablated = _target(model, prompts)
    torch.testing.assert_close(circuit_effect(model, circuit, prompts, TARGET).float(), plain - ablated, atol=1e-5, rtol=1e-4)


# ---- refusals


def test_uses_of_another_model_or_of_no_ablation_are_refused(tiny) -> None:
    model, other = tiny("llama"), tiny("qwen2")
    circuit = circuit_of(model)
    with pytest.raises(WrongModelError):
        circuit_losses(other, circuit)
    with pytest.raises(WrongModelError):
        circuit_directions(other, circuit, rows(2, 4), TARGET)
    with pytest.raises(ConfigError, match="constants of its ablation"):
        circuit_losses(model, Circuit.of_nodes(model, ["a1.h2"]))
    with pytest.raises(ConfigError, match="does not depend"):
        circuit_directions(model, circuit, rows(2, 4), lambda of_prompt, prompt: of_prompt[0].sum())
