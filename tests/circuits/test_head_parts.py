"""Parts of heads in a circuit: what their ablation takes and leaves, how they are chosen, controls, files, uses that refuse them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from circuits.component_helpers import TARGET, pairs, rows
from families import FAMILIES, HEAD_DIM
from hand import ids
from torch import Tensor, nn

import steer
from steer.circuits import (
    Circuit,
    ComponentEvaluation,
    GradientMask,
    circuit_directions,
    circuit_losses,
    damage,
    learn_circuit,
    mean_ablation,
    top_parts,
)
from steer.circuits.targets import LogProbability
from steer.circuits.terms import Shift
from steer.errors import ConfigError, WrongModelError
from steer.experiment.treatment import Bench
from steer.experiment.treatments.circuit import CircuitTreatment

HEADS = ["a0.h1", "a2.h0", "a2.h3"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return FAMILIES["llama"]()


@pytest.fixture(scope="module")
def circuit(model: nn.Module) -> Circuit:
    """Rank 2 of three heads."""
    return top_parts(model, pairs(model), TARGET, HEADS, 2).with_ablation(mean_ablation(model, rows(5, 8, seed=90)))


def orthonormal(rank: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(HEAD_DIM, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q.T


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=ids(2, 7, 3)).logits


def ablated(model: nn.Module, circuit: Circuit, strength: float = 1.0) -> Tensor:
    with circuit.ablation_plan(model, strength).attached(model):
        return logits(model)


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.3])
def test_all_directions_of_a_head_are_the_head(strength: float, model: nn.Module, circuit: Circuit) -> None:
    whole = replace(circuit, parts={})
    full = replace(circuit, parts={name: orthonormal(HEAD_DIM, seed) for seed, name in enumerate(HEADS)})
    expected = ablated(model, whole, strength)
    assert torch.allclose(ablated(model, full, strength), expected, atol=2e-5) and (expected - logits(model)).abs().max() > 0.01
    mixed = replace(circuit, parts={"a2.h3": full.parts["a2.h3"]})  # beside whole heads, of the same block too
    assert torch.allclose(ablated(model, mixed, strength), expected, atol=2e-5)


def test_only_the_part_about_the_constant_goes(model: nn.Module, circuit: Circuit) -> None:
    """By hand: z of two heads of the last block, in front of its output projection."""
    amounts = replace(circuit, nodes=circuit.nodes * 0.75)
    constant = circuit.ablation.values[steer.Site("attn.z", 2)]

    def by_hand(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        z = args[0].clone()
        for name, head in (("a2.h0", 0), ("a2.h3", 3)):
            own, rows_ = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM), circuit.parts[name].float()
            z[..., own] -= 0.75 * (z[..., own] - constant[own]) @ rows_.T @ rows_
        return (z,)

    last = replace(amounts, nodes=amounts.nodes.clone(), parts={name: circuit.parts[name] for name in HEADS[1:]})
    last.nodes[last.graph.writer_place("a0.h1")] = 0
    hook = model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(by_hand)
    expected = logits(model)
    hook.remove()
    assert torch.allclose(ablated(model, last), expected, atol=1e-5) and (expected - logits(model)).abs().max() > 1e-3


def test_the_directions_are_those_of_the_largest_gradient(model: nn.Module, circuit: Circuit) -> None:
    """Against the gradient at z by autograd, of one head, over the tokens of both prompts."""
    both, gradients = pairs(model), []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        z = args[0].detach().requires_grad_()
        gradients.append(z)
        return (z,)

    hook = model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(keep)
    for number, row in enumerate(both.rows):
        TARGET(model(input_ids=torch.tensor([row.ids])).logits[0], number % len(both)).backward()
    hook.remove()
    model.zero_grad()
    g = torch.cat([z.grad[0, :, 3 * HEAD_DIM :] for z in gradients]).double()  # [tokens, head_dim]
    vectors = torch.linalg.svd(g).Vh[:2]
    found = circuit.parts["a2.h3"]
    assert torch.allclose((found @ vectors.T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-3)
    carried = float((g @ found.T).square().sum() / g.square().sum())
    assert circuit.facts["carried"]["a2.h3"] == pytest.approx(carried, rel=1e-4) and circuit.node_names == HEADS


def test_the_control_has_random_directions_of_the_same_rank_in_other_heads(circuit: Circuit) -> None:
    beside = replace(circuit, nodes=circuit.nodes.clone())
    beside.nodes[beside.graph.writer_place("a1.h2")] = 0.5  # a whole head
    for seed in range(5):
        drawn = beside.random(seed)
        assert (
            not set(drawn.node_names) & set(beside.node_names) and len(drawn.node_names) == 4 and set(drawn.parts) < set(drawn.node_names)
        )
        assert [part.shape for part in drawn.parts.values()] == [(2, HEAD_DIM)] * 3
        assert sorted(drawn.nodes[drawn.nodes != 0].tolist()) == [0.5, 1, 1, 1]
    assert any(set(beside.random(0).parts) != set(beside.random(seed).parts) for seed in (1, 2))
    assert torch.equal(next(iter(beside.random(3).parts.values())), next(iter(beside.random(3).parts.values())))


@pytest.mark.filterwarnings("ignore:damage on", "ignore:the constants of the ablation")
def test_damage_of_parts_stands_beside_random_ones(model: nn.Module, circuit: Circuit) -> None:
    found = damage(model, circuit, {"a": rows(12, 9, seed=300)}, draws=2)
    by_hand = damage(model, circuit.ablation_plan(model), {"a": rows(12, 9, seed=300)})
    assert found.by_source["a"].value == pytest.approx(by_hand.by_source["a"].value, abs=1e-6) and found.by_source["a"].value != 0
    with pytest.raises(ConfigError, match="are among"):
        damage(model, circuit, {"a": pairs(model).rows}, draws=1)


def test_files_and_bakes_do_the_same(circuit: Circuit, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    found = Circuit.load(circuit.save(tmp_path / "circuit"))
    assert found.parts.keys() == circuit.parts.keys() and all(torch.equal(found.parts[name], circuit.parts[name]) for name in HEADS)
    assert repr(found) == "Circuit(3 nodes, 3 heads in part, mean ablation)"
    expected, plain = ablated(model, circuit), logits(model)
    assert torch.equal(ablated(model, found), expected) and (expected - plain).abs().max() > 1e-3
    with steer.bake(found.ablation_plan(model), model, savable=False):
        assert torch.allclose(logits(model), expected, atol=1e-4)
    assert torch.equal(logits(model), plain)
    mixed = replace(found, parts={"a2.h3": found.parts["a2.h3"]}).ablation_plan(model)  # two edits in front of one map
    with mixed.attached(model):
        expected = logits(model)
    with steer.bake(mixed, model, savable=False):
        assert torch.allclose(logits(model), expected, atol=1e-4)


def test_an_arm_of_an_experiment_takes_parts_from_a_file(circuit: Circuit, tmp_path: Path) -> None:
    """`treatment: {kind: circuit, by: file, settings: {path: ...}}`: in use, in the weights, and with random parts as the control."""
    model = FAMILIES["llama"]()
    bench = Bench(model, None, [])
    treatment = CircuitTreatment("file", dose=1.3, settings={"path": str(circuit.save(tmp_path / "circuit"))}).prepare(bench)
    expected, plain = ablated(model, circuit, 1.3), logits(model)
    for within in (treatment.acting, treatment.baked):
        with within(model) as changed:
            assert torch.allclose(logits(changed), expected, atol=2e-5)
    control = treatment.control(bench, 0)
    with control.acting(model):
        assert torch.allclose(logits(model), ablated(FAMILIES["llama"](), circuit.random(0), 1.3), atol=2e-5)
    assert control.size(bench) == treatment.size(bench) and torch.equal(logits(model), plain)


USES: dict[str, Callable[[nn.Module, Circuit], object]] = {
    "weights": GradientMask,
    "loss": lambda model, circuit: circuit_losses(model, circuit),
    "channel": lambda model, circuit: circuit_directions(model, circuit, rows(4), LogProbability(5)),
    "exact evaluation": lambda model, circuit: ComponentEvaluation(model, pairs(model), TARGET, circuit.ablation).faithfulness(
        circuit, draws=1
    ),
    "mask learning": lambda model, circuit: learn_circuit(
        model, [Shift(model, rows(4), rows(5), TARGET)], circuit, ablation=circuit.ablation
    ),
    "MIB": lambda model, circuit: circuit.export_mib("circuit.json"),
}


@pytest.mark.parametrize("use", USES)
def test_what_takes_whole_heads_refuses_parts(use: str, model: nn.Module, circuit: Circuit) -> None:
    with pytest.raises(ConfigError, match=f"{use}[\\s\\S]*takes whole heads[\\s\\S]*parts of a0.h1"):
        USES[use](model, circuit)


def test_parts_that_cannot_be(model: nn.Module, circuit: Circuit) -> None:
    two = orthonormal(2)
    for message, parts in {
        "no writer 'a9.h0'": {"a9.h0": two},
        "one of a head in the circuit[\\s\\S]*a0.h2": {"a0.h2": two},
        "one of a head in the circuit[\\s\\S]*m0": {"m0": two},
        "orthonormal[\\s\\S]*off by 3": {"a0.h1": two * 2},
        "orthonormal[\\s\\S]*\\[8\\]": {"a0.h1": two[0]},
        "orthonormal[\\s\\S]*off by nan": {"a0.h1": two * torch.nan},
    }.items():
        with pytest.raises(ConfigError, match=message):
            replace(circuit, parts=parts)
    with pytest.raises(ConfigError, match="edges or parts"):
        replace(circuit, edges=circuit.graph.possible)
    with pytest.raises(WrongModelError, match="8 channels"):
        replace(circuit, parts={"a0.h1": torch.eye(16, dtype=torch.float64)[:1]}).ablation_plan(model)
    for message, names, rank in (("parts of heads", ["a0.h1", "m1"], 1), ("1 to 8", HEADS, 9), ("empty", [], 1), ("rank", HEADS, 0)):
        with pytest.raises(ConfigError, match=message):
            top_parts(model, pairs(model), TARGET, names, rank)
