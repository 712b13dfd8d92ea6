"""Gradient masks: what is not to learn stays as it is to the bit, whatever the optimiser does; the rest learns as without a mask."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from callback_helpers import Module, loader, make_trainer, n_hooks
from circuits.use_helpers import circuit_of, ids, logits, steps
from torch import Tensor, nn

from steer.callbacks import GradientMaskCallback, HFGradientMaskCallback
from steer.circuits import Circuit, GradientMask, lora_config
from steer.circuits.circuit_parameters import circuit_masks
from steer.errors import AnatomyError, ConfigError, WrongModelError
from steer.model.anatomy import Anatomy

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adam with L2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which entries changed, of the parameters of which some did."""
    found = {name: parameter.detach() != before[name] for name, parameter in model.named_parameters()}
    return {name: which for name, which in found.items() if bool(which.any())}


def expected(model: nn.Module, circuit: Circuit) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: mask.expand(parameter.shape) for parameter, mask in circuit_masks(model, circuit).items()}


# ---- which entries


def test_heads_have_rows_and_columns_and_their_group_has_keys_and_values(tiny) -> None:
    model = tiny("llama")
    found = expected(model, circuit_of(model))
    attention = {name.rpartition("attn.")[2]: mask for name, mask in found.items() if "attn" in name}
    q, k, o = torch.zeros(32, 32), torch.zeros(16, 32), torch.zeros(32, 32)
    q[16:24], k[8:16], o[:, 16:24] = 1, 1, 1  # head 2 of 4, in group 1 of 2
    for name, mask in {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": k, "o_proj.weight": o}.items():
        assert torch.equal(attention.pop(name), mask.bool())
    assert not attention
    up, down = torch.zeros(64, 32), torch.zeros(32, 64)
    up[[3, 10]], down[:, [3, 10]] = 1, 1
    mlp = {name.rpartition("mlp.")[2]: mask for name, mask in found.items() if "mlp" in name}
    for name, mask in {"gate_proj.weight": up, "up_proj.weight": up, "down_proj.weight": down}.items():
        assert torch.equal(mlp.pop(name), mask.bool())
    assert not mlp


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "gpt_neox", "falcon"])
@pytest.mark.parametrize("part", ["heads", "neurons"])
def test_moving_the_entries_of_a_circuit_moves_no_other_heads_and_neurons(tiny, family: str, part: str) -> None:
    model = tiny(family)
    anatomy = Anatomy.find(model)
    of_both = circuit_of(model)
    neurons = {} if part == "heads" else of_both.neurons
    circuit = Circuit(of_both.graph, of_both.nodes * (part == "heads"), neurons=neurons, facts=of_both.facts)
    point = anatomy.point("layers.1.attn.z" if part == "heads" else "layers.0.mlp.neurons")
    read: list[Tensor] = []
    point.module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    logits(model)
    for parameter, mask in circuit_masks(model, circuit).items():
        if parameter is not point.module.weight:  # that of what comes behind
            parameter.data.add_(0.1 * mask.to(parameter))
    logits(model)
    moved = (read[0] != read[1]).flatten(0, 1).any(0)
    if part == "neurons":
        assert moved.nonzero().flatten().tolist() == [3, 10]
    else:
        per_group = anatomy.n_heads // anatomy.n_kv_heads
        heads = moved.view(anatomy.n_heads, -1).any(1).nonzero().flatten().tolist()
        assert heads == [head for head in range(anatomy.n_heads) if head // per_group == 2 // per_group]


# ---- to the bit


@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_does_not_learn_stays_to_the_bit(tiny, name: str, only: bool) -> None:
    model = tiny("llama")
    circuit = circuit_of(model, "m2")
    inside = expected(model, circuit)
    before = copies(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    with GradientMask(model, circuit, only=only).active(optimizer) as mask:
        steps(model, optimizer)
        assert mask.learning < mask.total
    moved = changed(model, before)
    for parameter, which in moved.items():
        allowed = inside.get(parameter, torch.zeros_like(which))
        assert not bool((which & (~allowed if only else allowed)).any()), parameter
    learned = set(inside) if only else set(before) - {name for name, entries in inside.items() if bool(entries.all())}
    assert set(moved) == learned
    for parameter, state in optimizer.state.items():
        name_of = next(key for key, each in model.named_parameters() if each is parameter)
        stays = inside.get(name_of, torch.zeros_like(before[name_of], dtype=torch.bool)) ^ only
        for entry in state.values():
            if isinstance(entry, Tensor) and entry.shape == stays.shape:
                assert not bool(entry[stays].any())
    assert all(parameter.requires_grad for parameter in model.parameters()) and n_hooks(model) == 0


def test_what_learns_learns_as_if_the_rest_had_no_gradient(tiny) -> None:
    """A model whose other parameters are frozen by hand, with the circuit as whole parameters, trains alike."""
    model, by_hand = tiny("llama"), tiny("llama")
    circuit = Circuit.of_nodes(model, ["m1"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with GradientMask(model, circuit).active(optimizer):
        steps(model, optimizer)
    for name, parameter in by_hand.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name)
    alone = torch.optim.AdamW([p for p in by_hand.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    steps(by_hand, alone)
    for (name, a), b in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_masked_gradients_are_left_out_of_the_norm_that_is_clipped(tiny) -> None:
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientMask(model, circuit_of(model)).active(optimizer) as mask:
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        for masked in mask.partial:
            assert not bool(masked.parameter.grad[masked.stays].any()) and bool(masked.parameter.grad.any())
        assert all(parameter.grad is None for parameter in mask.frozen)


def test_parameter_groups_two_optimisers_and_autocast(tiny) -> None:
    model = tiny("gpt2")
    circuit = circuit_of(model)
    inside, before = expected(model, circuit), copies(model)
    attention = [parameter for name, parameter in model.named_parameters() if "attn" in name]
    rest = [parameter for name, parameter in model.named_parameters() if "attn" not in name]
    groups = [{"params": attention[:3], "weight_decay": 0.2}, {"params": attention[3:], "lr": 1e-3}]
    optimizers = torch.optim.AdamW(groups, lr=1e-2), torch.optim.SGD(rest, lr=0.1, momentum=0.5, weight_decay=0.1)
    with GradientMask(model, circuit).active(*optimizers):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    moved = changed(model, before)
    assert set(moved) == set(inside)
    assert all(torch.equal(which & inside[name], which) for name, which in moved.items())


def test_an_error_in_training_takes_the_mask_off(tiny) -> None:
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt), GradientMask(model, circuit_of(model)).active(optimizer):
        raise KeyboardInterrupt
    before = copies(model)
    steps(model, optimizer, 1)
    assert set(changed(model, before)) == set(before)


# ---- trainers


class Decayed(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("only", [True, False])
def test_the_callback_masks_a_fit(tiny, only: bool) -> None:
    model = tiny("llama")
    circuit = circuit_of(model)
    inside, before = expected(model, circuit), copies(model)
    callback = GradientMaskCallback(circuit, only=only)
    make_trainer(callback, max_steps=3, gradient_clip_val=0.5, accumulate_grad_batches=2).fit(Decayed(model), loader())
    moved = changed(model, before)
    outside = [which & ~inside.get(name, torch.zeros_like(which)) for name, which in moved.items()]
    within = [which & inside.get(name, torch.zeros_like(which)) for name, which in moved.items()]
    assert any(map(torch.any, within)) is only and any(map(torch.any, outside)) is not only
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_twin_masks_a_hugging_face_trainer(tiny, tmp_path) -> None:
    import transformers
    from callback_helpers import examples

    model = tiny("llama")
    circuit = circuit_of(model)
    inside, before = expected(model, circuit), copies(model)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, weight_decay=0.1, learning_rate=1e-2, report_to=[], use_cpu=True, save_steps=3, disable_tqdm=True,
        gradient_accumulation_steps=2, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=examples())
    HFGradientMaskCallback(circuit).attach(trainer)
    trainer.train()
    moved = changed(model, before)
    assert set(moved) == set(inside)
    assert all(torch.equal(which & inside[name], which) for name, which in moved.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- LoRA


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_restricted_adapter_changes_the_circuit_alone(tiny, family: str) -> None:
    plain = tiny(family)
    circuit = circuit_of(plain)
    inside, before = expected(plain, circuit), copies(plain)
    adapted = peft.get_peft_model(plain, lora_config(plain, circuit, r=3))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    with GradientMask(adapted, circuit).active(optimizer):
        steps(adapted, optimizer)
    merged = adapted.merge_and_unload()
    moved = changed(merged, before)
    assert set(moved) == {name for name, entries in inside.items() if entries.dim() == 2}
    assert all(torch.equal(which & inside[name], which) for name, which in moved.items())


def test_an_adapter_that_has_learned_outside_is_refused(tiny) -> None:
    model = tiny("llama")
    circuit = circuit_of(model)
    adapted = peft.get_peft_model(model, lora_config(model, circuit, r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ConfigError, match="learned outside"), GradientMask(adapted, circuit).active(optimizer):
        pass
    with pytest.raises(ConfigError, match="more than the circuit"):
        lora_config(tiny("llama"), circuit, bias="all")


# ---- refusals


def test_weights_that_cannot_be_masked_are_refused(tiny) -> None:
    tied, model = tiny("gpt2"), tiny("llama")
    with pytest.raises(ConfigError, match="tied"):
        GradientMask(tied, Circuit.of_nodes(tied, ["input"]))
    with pytest.raises(WrongModelError):
        GradientMask(tied, circuit_of(model))
    opt = tiny("opt")
    with pytest.raises(AnatomyError, match="which neuron"):
        GradientMask(opt, circuit_of(opt))
    assert {name.rpartition(".layers.")[2] for name in expected(opt, Circuit.of_nodes(opt, ["m1"]))} == {
        "1.fc1.weight", "1.fc1.bias", "1.fc2.weight", "1.fc2.bias",
    }  # fmt: skip
    circuit = circuit_of(model)
    model.model.layers[1].self_attn.o_proj.to("meta")
    with pytest.raises(ConfigError, match="dense weight"):
        circuit_masks(model, circuit)


def test_a_mask_without_its_optimiser_or_with_nothing_to_learn_is_refused(tiny) -> None:
    model = tiny("llama")
    circuit = circuit_of(model)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match="in none of these optimisers"), GradientMask(model, circuit).active(other):
        pass
    whole = Circuit.of_nodes(model, ["m1"])  # nothing of it is learned in part, so that no parameter misses its optimiser
    with pytest.raises(ConfigError, match="train nothing of what"), GradientMask(model, whole).active(other):
        pass
    half = torch.optim.AdamW(model.model.layers[1].parameters(), lr=0.1)  # the circuit has neurons of block 0 too
    with pytest.raises(ConfigError, match=r"layers\.0\.[\s\S]*all that train the model"), GradientMask(model, circuit).active(half):
        pass
    with GradientMask(model, circuit).active(half, torch.optim.AdamW(model.model.layers[0].parameters(), lr=0.1)) as mask:
        assert mask.learning
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing would learn"):
        GradientMask(model, circuit)
