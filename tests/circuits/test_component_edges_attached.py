"""Edges ablated in generation and training: a cache, beams and padding change nothing, and only readers that lost an edge are touched."""

import dataclasses

import pytest
import torch
from circuits.component_helpers import TARGET, ablation_of, cut, exact_model, pairs, rows, run_of
from hand import hook_count, ids, padded
from torch import Tensor, nn

from steer.circuits import Circuit, attribute, mean_ablation, resample_ablation
from steer.circuits.component_run import ComponentRun, TakenOut
from steer.circuits.texts import Texts
from steer.errors import AttachError, ConfigError, ContextError, WrongModelError
from steer.model.anatomy import Anatomy

EDGES = ("input->a0.h1<q>", "a0.h1->m1", "a0.h2->a1.h3<q>", "m0->a2.h0<v>", "a1.h0->logits", "m1->m2")
GROUPED = ("input->a0.h1<q>", "a0.h1->m1", "a0.h2->a1.h3<q>", "m0->a2.g0<v>", "m0->a2.g0<k>", "a1.h0->logits", "m1->m2")


def circuit_of(model: nn.Module, kind: str = "mean") -> Circuit:
    run = run_of(model)
    names = GROUPED if "a0.g0<k>" in run.graph._reader_places else EDGES
    edges = cut(run, *names)
    facts = {"model": Anatomy.find(model).fingerprint()}
    return Circuit(run.graph, edges.any(1).double(), edges=edges, ablation=ablation_of(model, kind), facts=facts)


def logits_of(model: nn.Module, batch: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return model(batch, **options).logits


@pytest.mark.parametrize(("family", "kind"), [("llama", "mean"), ("llama", "zero"), ("gemma2", "mean"), ("falcon", "mean")])
def test_generation_with_a_cache_is_generation_without_and_a_full_recompute(family: str, kind: str):
    model = exact_model(family)
    circuit = circuit_of(model, kind)
    prompt = ids(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    with circuit.edges_ablated(model):
        cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        uncached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
        recomputed = logits_of(model, cached.sequences[:, :-1])[:, 4:]
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits, 1), torch.stack(uncached.logits, 1), rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.stack(cached.logits, 1), recomputed.float(), rtol=0, atol=2e-5)
    assert (torch.stack(cached.logits, 1)[:, 0] - torch.stack(plain.logits, 1)[:, 0]).abs().max() > 1e-3
    assert hook_count(model) == 0


def test_it_is_the_exact_run_and_scales(tiny):
    model = tiny("llama").double()
    circuit = circuit_of(model)
    (row,) = rows(6)
    run = ComponentRun(model, Texts([row]), TARGET, circuit.ablation)
    expected = run.values([TakenOut.circuit(circuit)])[0, 0]
    found = {}
    for strength in (0.0, 0.5, 1.0):
        with circuit.edges_ablated(model, strength):
            found[strength] = TARGET(logits_of(model, torch.tensor([row.ids]))[0], 0).item()
    assert found[1.0] == pytest.approx(expected.item(), abs=2e-6)
    assert found[0.0] == pytest.approx(TARGET(logits_of(model, torch.tensor([row.ids]))[0], 0).item(), abs=2e-6)
    assert len({round(value, 4) for value in found.values()}) == 3


def test_beams_and_left_padding_change_nothing(tiny):
    model = tiny("llama").double()
    circuit = circuit_of(model)
    batch = padded("left")
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 95}
    with circuit.edges_ablated(model):
        together = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)[:, -5:]
        alone = []
        for row, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            alone.append(model.generate(row[mask][None], attention_mask=torch.ones_like(row[mask][None]), **options)[0, -5:])
        uncached = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **options)[:, -5:]
    plain = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)[:, -5:]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(together, uncached)
    assert not torch.equal(together, plain)


def test_only_readers_that_lost_an_edge_are_touched(tiny):
    model = tiny("llama")
    circuit = circuit_of(model)
    handle = circuit.edges_ablated(model)
    assert handle.readers == ["a0.h1<q>", "a1.h3<q>", "m1", "a2.g0<k>", "a2.g0<v>", "m2", "logits"]
    prompt, seen = ids(1, 6), {}

    def keep(name):
        return lambda module, args, output: seen.setdefault(name, []).append(output.clone())

    modules = {
        f"{part}{layer}": getattr(block.self_attn, f"{part}_proj") for layer, block in enumerate(model.model.layers) for part in "qkv"
    }
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    logits_of(model, prompt)
    with handle:
        logits_of(model, prompt)
    for each in handles:
        each.remove()
    before, after = seen["q0"]
    same = (before == after).all(1)[0].unflatten(0, (4, 8)).all(1)
    assert same.tolist() == [True, False, True, True]  # of the heads, to the bit
    assert all(torch.equal(*seen[name]) for name in ("k0", "v0"))


def test_gradients_flow_through_it_and_checkpointing_changes_none(tiny):
    model = tiny("llama").double()
    circuit = circuit_of(model)
    batch = ids(2, 6)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        with circuit.edges_ablated(model):
            model(batch, labels=batch, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    weight = model.model.layers[1].self_attn.q_proj.weight
    direction = torch.zeros_like(weight)
    direction[24:32] = plain["model.layers.1.self_attn.q_proj.weight"][24:32]  # of head 3, which lost an edge
    direction /= direction.norm()

    def loss_at(change: float) -> float:
        with torch.no_grad(), circuit.edges_ablated(model):
            weight.add_(change * direction)
            loss = model(batch, labels=batch, use_cache=False).loss.item()
            weight.sub_(change * direction)
        return loss

    slope = (loss_at(0.1) - loss_at(-0.1)) / 0.2
    along = (plain["model.layers.1.self_attn.q_proj.weight"] * direction).sum().item()
    assert along == pytest.approx(slope, rel=0.02)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("lengths", [(6, 4), (14, 15, 12)])  # fewer and more tokens than the width
def test_adapters_count_in_what_is_cut(tiny, lengths):
    from peft import LoraConfig, get_peft_model

    model = tiny("llama")
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, lora_dropout=0.5)
    adapted = get_peft_model(model, config).eval()
    run = run_of(adapted, lengths=lengths)
    names = [f"a0.h2->{reader.name}" for reader in run.graph.readers if run.graph.possible[3, run.graph.reader_place(reader.name)]]
    by_edges = run.values([TakenOut(TakenOut.nothing(run.graph).nodes, {}, cut(run, *names))])
    amounts = torch.zeros(len(run.graph.writers))
    amounts[3] = 1
    torch.testing.assert_close(by_edges, run.values([TakenOut(amounts)]), rtol=0, atol=1e-4)


def test_hooks_come_off_on_every_way_out(tiny):
    model = tiny("llama")
    circuit = circuit_of(model)
    with pytest.raises(KeyboardInterrupt), circuit.edges_ablated(model):
        raise KeyboardInterrupt
    assert hook_count(model) == 0
    handle = circuit.edges_ablated(model).attach()
    with pytest.raises(AttachError):
        handle.attach()
    first = logits_of(model, ids(1, 5))
    handle.detach()
    handle.detach()
    assert hook_count(model) == 0
    with handle:  # and on again
        assert torch.equal(logits_of(model, ids(1, 5)), first)
    assert hook_count(model) == 0


def test_what_cannot_be_ablated_in_generation_is_refused(tiny):
    model = tiny("llama")
    circuit = circuit_of(model)
    with pytest.raises(ConfigError, match="resample"):
        circuit.with_ablation(resample_ablation()).edges_ablated(model)
    with pytest.raises(ConfigError, match="per position"):
        circuit.with_ablation(mean_ablation(model, rows(5, 5), per_position=True)).edges_ablated(model)
    with pytest.raises(ConfigError, match="no edges"):
        Circuit.of_nodes(model, ["a0.h1"]).edges_ablated(model)
    with pytest.raises(ConfigError, match="takes the place"):
        Circuit(circuit.graph, circuit.nodes, edges=circuit.edges).edges_ablated(model)
    with pytest.raises(WrongModelError):
        circuit.edges_ablated(tiny("qwen3"))


def test_edges_of_two_circuits_at_once_are_refused_since_behind_a_norm_they_do_not_add_up(tiny):
    model = tiny("llama")
    circuit = circuit_of(model)
    other = dataclasses.replace(circuit, edges=cut(run_of(model), "m0->m1", "m0->a2.g0<v>"))
    plain = logits_of(model, ids(1, 6))
    with circuit.edges_ablated(model):
        with pytest.raises(AttachError, match=r"ablated edges into[\s\S]*as one circuit"):
            other.edges_ablated(model).attach()
        with pytest.raises(AttachError, match="ablated already"):
            run_of(model).values([TakenOut.circuit(other)])
        with pytest.raises(AttachError, match="ablated already"):
            attribute(model, pairs(model), TARGET, progress=False)
        assert attribute(model, pairs(model), TARGET, edges=False, progress=False).node_scores.any()
        assert not torch.equal(logits_of(model, ids(1, 6)), plain)
    with other.edges_ablated(model):
        assert not torch.equal(logits_of(model, ids(1, 6)), plain)
    assert hook_count(model) == 0 and torch.equal(logits_of(model, ids(1, 6)), plain)


@pytest.mark.parametrize("edges", [("a1.h0->logits",), ("input->a0.h1<q>",), ("m0->a2.g0<v>",)])
def test_checkpoints_that_record_nothing_in_the_forward_pass_are_refused(tiny, edges):
    model = tiny("llama").train()
    circuit = dataclasses.replace(circuit_of(model), edges=cut(run_of(model), *edges))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    batch = ids(2, 6)
    with circuit.edges_ablated(model), pytest.raises(ContextError, match=r"use_reentrant': False"):
        model(batch, labels=batch, use_cache=False).loss.backward()


def test_what_was_made_or_ran_in_inference_mode_is_trained_through(tiny):
    model = tiny("llama").double()  # constants are converted, and kept
    circuit = circuit_of(model)
    batch = ids(2, 6)
    with torch.inference_mode():
        handle = circuit.edges_ablated(model).attach()
        model(batch)
    model(batch, labels=batch).loss.backward()
    handle.detach()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with circuit.edges_ablated(model):
        model(batch, labels=batch).loss.backward()
    assert all(torch.equal(a, parameter.grad) for a, parameter in zip(found, model.parameters(), strict=True))
