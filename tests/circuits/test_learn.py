"""Mask learning: gates are what they say, the model is left as it was, and the terms pull where they should."""

from __future__ import annotations

import pytest
import torch
from callback_helpers import Module, loader, make_trainer
from torch import Tensor, nn

from steer.callbacks import SteeringCallback
from steer.circuits import Circuit, LogitDifference, mask_training, mean_ablation, resample_ablation, zero_ablation
from steer.circuits.learn import learn_circuit
from steer.circuits.mask_training import TermPasses
from steer.circuits.operators.gate_components import HIGH, LOW, TEMPERATURE, GateComponents, gates_of
from steer.circuits.terms import Faithful, KeepKL, KeepTarget, Shift
from steer.errors import ConfigError
from steer.intervene import Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.restoring import restoring
from steer.model.tokens import Row

HEADS = [f"a{layer}.h{head}" for layer in range(3) for head in range(4)]
TARGET = LogitDifference(10, 20)


def rows(count: int, length: int, seed: int = 0) -> list[Row]:
    random = torch.Generator().manual_seed(seed)
    return [Row(tuple(torch.randint(3, 96, (length,), generator=random).tolist()), 0) for _ in range(count)]


def pairs(count: int = 6) -> tuple[list[Row], list[Row]]:
    prompts = rows(count, 6, seed=1)
    return prompts, [Row((*row.ids[:2], 5, *row.ids[3:], 7), 0) for row in prompts]  # other lengths


def logits(model: nn.Module, row: Row) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([row.ids])).logits[0]


# ---- the operator


def test_gates_are_shared_by_the_channels_of_a_component() -> None:
    gates, component, constant = torch.tensor([0.3, -1.0]), torch.tensor([0, 1, 1, 0, 2]), torch.arange(5.0)
    h = torch.randn(1, 2, 5)
    operator = GateComponents(gates, component, constant)
    edited = operator.apply(h, torch.ones(1, 1, 1), None, operator.tensors)
    amount = torch.tensor([0.0, *[float(gates[0].sigmoid())] * 2, 0.0, float(gates[1].sigmoid())])
    torch.testing.assert_close(edited, h + amount * (constant - h))
    alone = GateComponents(gates, component, constant, alone=True)
    rest = torch.where(component == 0, 0.0, 1 - amount)
    torch.testing.assert_close(alone.apply(h, torch.ones(1, 1, 1), None, alone.tensors), h + rest * (constant - h))


@pytest.mark.parametrize("form", ["sigmoid", "hard_concrete", "linear"])
def test_gates_give_the_amounts_they_were_made_of(form: str) -> None:
    amounts = torch.tensor([0.1, 0.5, 0.9])
    operator = GateComponents(gates_of(amounts, form), torch.tensor([1, 2, 3]), torch.zeros(3), form).train()
    with torch.no_grad():
        torch.testing.assert_close(operator.amounts()[0], amounts)
        torch.testing.assert_close(operator.settled().tensors["amount"][0], amounts)


def test_hard_concrete_gates_draw_noise_in_training_alone_and_their_size_is_how_often_they_are_not_zero() -> None:
    gates = torch.tensor([-2.0, 0.0, 1.5])
    operator = GateComponents(gates, torch.tensor([1, 2, 3]), torch.zeros(3), "hard_concrete").train()
    with torch.no_grad():
        assert torch.equal(operator.amounts(), operator.amounts())
        torch.testing.assert_close(operator.amounts()[0], (gates.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1))
    torch.manual_seed(0)
    drawn = torch.stack([operator.amounts()[0].detach() for _ in range(4000)])
    assert drawn.std(0).min() > 0.1
    assert 0.5 < TEMPERATURE < 0.7
    torch.testing.assert_close((drawn > 0).float().mean(0), operator.sizes()[0].detach(), atol=0.03, rtol=0)


def test_linear_gates_keep_their_gradient_where_they_are_cut_off() -> None:
    operator = GateComponents(torch.tensor([-0.5, 1.5]), torch.tensor([1, 2]), torch.zeros(2), "linear").train()
    operator.amounts().sum().backward()
    assert torch.equal(operator.tensors["gates"].grad, torch.ones(1, 2))
    operator.cut_off()
    assert operator.tensors["gates"].tolist() == [[0.0, 1.0]]


def test_channels_without_a_gate_of_their_own_are_refused() -> None:
    for component in (torch.zeros(3), torch.tensor([1, 2, 3])):
        with pytest.raises(ConfigError, match="do not fit together"):
            GateComponents(torch.zeros(2), component, torch.zeros(3))


def test_gates_learn_as_part_of_a_plan_by_the_callback(tiny) -> None:
    model = tiny("llama")
    operator = GateComponents(torch.zeros(4), 1 + torch.arange(32) // 8, torch.zeros(32), "hard_concrete").train()
    plan = Plan(Intervention(operator, "layers.1.attn.z", name="gates"))
    callback = SteeringCallback(plan, learning_rate=0.1)
    make_trainer(callback, max_steps=2).fit(Module(model), loader())
    assert not torch.equal(plan.parameters()[0].detach(), torch.zeros(1, 4))


# ---- passes of terms


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompts_of_all_terms_run_together_as_each_would_alone(tiny, family: str) -> None:
    model = tiny(family)
    prompts, partners = pairs(3)
    neutral = rows(2, 30, seed=5)
    terms = [Shift(model, prompts, partners, TARGET), KeepKL(neutral, tokens=slice(4, None, 3))]
    passes = TermPasses(model, Anatomy.find(model), terms)
    wanted = [(row, term.tokens) for term in terms for item in term.items for row in item]
    found = passes.logits(wanted, gradients=False)
    for row, tokens in wanted:
        torch.testing.assert_close(found[passes.key(row, tokens)], logits(model, row)[tokens], atol=2e-5, rtol=1e-4)
    assert len(found) == 8


# ---- learning


def test_learned_amounts_lower_the_shift_and_leave_the_model_as_it_was(tiny) -> None:
    model = tiny("llama").train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    ablation = mean_ablation(model, rows(6, 20, seed=2))
    prompts, partners = pairs()
    candidates = Circuit.of_nodes(model, [*HEADS, "m1"])
    terms = [Shift(model, prompts, partners, TARGET), KeepKL(rows(4, 24, seed=3), weight=0.5), KeepTarget(model, prompts[:3], TARGET)]

    circuit = learn_circuit(model, terms, candidates, ablation=ablation, steps=25)

    first, *rest = circuit.facts["terms"]
    assert first["last"] < 0.5 * first["first"] and [term["name"] for term in rest] == ["KeepKL", "KeepTarget"]
    assert set(circuit.node_names) <= {*HEADS, "m1"} and 0.02 <= float(circuit.nodes[circuit.nodes > 0].min())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    shift = [logits(model, row)[-1, 10] - logits(model, row)[-1, 20] for row in (*prompts, *partners)]
    with circuit.ablation_plan(model).attached(model):
        edited = [logits(model, row)[-1, 10] - logits(model, row)[-1, 20] for row in (*prompts, *partners)]

    def size(values: list[Tensor]) -> float:
        return float((torch.stack(values[:6]) - torch.stack(values[6:])).square().mean())

    assert size(edited) < 0.5 * size(shift)


def test_the_same_seed_gives_the_same_circuit_and_nothing_is_printed(tiny, capsys) -> None:
    model = tiny("llama")
    prompts, partners = pairs()
    candidates = Circuit.of_nodes(model, HEADS).with_ablation(zero_ablation())
    state = torch.random.get_rng_state()
    capsys.readouterr()
    one, same, other = (
        learn_circuit(model, [Shift(model, prompts, partners, TARGET, per_step=2)], candidates, gates="hard_concrete", steps=4, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.nodes, same.nodes) and not torch.equal(one.nodes, other.nodes)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")


def test_products_in_bf16_give_nearly_the_same_gates_and_nothing_stays_cast(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    prompts, partners = pairs()
    candidates = Circuit.of_nodes(model, [*HEADS, "m1"]).with_ablation(mean_ablation(model, rows(6, 20, seed=2)))
    seen: list[torch.dtype] = []

    def learned(precision: str) -> Circuit:
        terms = [Shift(model, prompts, partners, TARGET), KeepKL(rows(4, 24, seed=3), weight=0.5)]
        return learn_circuit(model, terms, candidates, steps=12, precision=precision)

    whole = learned("32-true")
    with restoring(model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *given: seen.append(given[2].dtype)).remove):
        rounded = learned("bf16-mixed")
    assert set(seen) == {torch.bfloat16} and rounded.facts["settings"]["precision"] == "bf16-mixed"
    assert rounded.nodes.dtype == torch.float64 and not torch.equal(rounded.nodes, whole.nodes)
    torch.testing.assert_close(rounded.nodes, whole.nodes, atol=0.05, rtol=0.1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    monkeypatch.setattr(mask_training, "_SHORT", 0)  # attention as the model has it
    torch.testing.assert_close(learned("bf16-mixed").nodes, rounded.nodes, atol=0.02, rtol=0.05)
    with pytest.raises(ConfigError, match="precision"):
        learned("16-mixed")


def test_neurons_and_heads_are_gated_each_by_itself(tiny) -> None:
    model = tiny("llama")
    circuit = Circuit.of_nodes(model, ["a1.h2", "m2"]).with_ablation(zero_ablation())
    neurons = torch.zeros(64, dtype=torch.float64)
    neurons[[3, 40]] = 1
    candidates = Circuit(circuit.graph, circuit.nodes, neurons={0: neurons}, ablation=circuit.ablation, facts=circuit.facts)
    prompts, partners = pairs()
    learned = learn_circuit(model, [Shift(model, prompts, partners, TARGET)], candidates, gates="sigmoid", steps=3, sparsity=0.0)
    assert set(learned.node_names) <= {"a1.h2", "m2"} and set(learned.neurons) <= {0}
    assert learned.neurons[0].nonzero().flatten().tolist() == [3, 40]


def test_faithful_keeps_what_the_circuit_alone_needs(tiny) -> None:
    model = tiny("llama")
    prompts = rows(5, 7, seed=8)
    candidates = Circuit.of_nodes(model, HEADS).with_ablation(mean_ablation(model, rows(5, 15, seed=9)))
    circuit = learn_circuit(model, [Faithful(model, prompts)], candidates, start=0.5, steps=20, sparsity=0.0, lr=0.1)
    faithful = circuit.facts["terms"][0]
    assert faithful["last"] < 0.5 * faithful["first"] and float(circuit.nodes.sum()) > 0.6 * len(HEADS)
    assert circuit.facts["sign"] == "amounts are what stays"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_error_in_a_term_leaves_no_hook_and_no_frozen_or_cast_parameter(tiny, precision: str) -> None:
    model = tiny("llama")
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}
    prompts, partners = pairs()
    calls = []

    def target(of_prompt: Tensor, prompt: int) -> Tensor:
        calls.append(prompt)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return of_prompt[-1, 3]

    candidates = Circuit.of_nodes(model, HEADS).with_ablation(zero_ablation())
    with pytest.raises(BaseException):  # noqa: B017  Lightning makes an exit of an interrupt
        learn_circuit(model, [Shift(model, prompts, partners, target)], candidates, steps=20, precision=precision)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1]) and parameter.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    Plan(Intervention(GateComponents(torch.zeros(1), torch.ones(32), torch.zeros(32)), "layers.0.output")).attach(model).detach()


def test_keep_target_costs_nothing_above_its_share(tiny) -> None:
    term = KeepTarget(tiny("llama"), rows(1, 4), TARGET, share=0.5)
    costs = [float(term.cost(torch.tensor(value), torch.tensor(-4.0))) for value in (-5.0, -2.0, -1.0, 1.0)]
    assert costs == [0.0, 0.0, 1.0, 9.0]


def test_bad_requests_are_refused(tiny) -> None:
    model = tiny("llama")
    prompts, partners = pairs()
    term = Shift(model, prompts, partners, TARGET)
    candidates = Circuit.of_nodes(model, HEADS)
    with pytest.raises(ConfigError, match="what takes the place"):
        learn_circuit(model, [term], candidates)
    with pytest.raises(ConfigError, match="resample"):
        learn_circuit(model, [term], candidates.with_ablation(resample_ablation()))
    with pytest.raises(ConfigError, match="has no terms"):
        learn_circuit(model, [], candidates.with_ablation(zero_ablation()))
    with pytest.raises(ConfigError, match="pair up"):
        Shift(model, prompts, partners[:2], TARGET)
    with pytest.raises(ConfigError, match="has no token that counts"):
        KeepKL(rows(1, 8), tokens=slice(32, None))
    with pytest.raises(ConfigError, match="nothing to learn"):
        none = Circuit(candidates.graph, torch.zeros_like(candidates.nodes), ablation=zero_ablation())
        learn_circuit(model, [term], none)
