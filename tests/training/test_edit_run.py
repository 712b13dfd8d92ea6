"""EditRun in a custom loop: when edits are applied, what is measured, what protects them, and a state to go on from."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_helpers import examples, loader, same_weights
from edit_training import CONTEXTS, FACTS, PATH, TOKENIZER, solved_edit, tiny_model, weight
from edits.edit_helpers import running_text
from peft import LoraConfig, get_peft_model
from processes import run_on_ranks
from torch import Tensor, nn

from steer.edits import EDITORS, Covariance, Fact, edit_facts
from steer.edits.edit import Edit, WeightDelta
from steer.edits.edited_weights import EditedWeights
from steer.errors import AttachError, ConfigError, DamagedFileError, WrongModelError
from steer.training.edit_hosts import ADAPTER
from steer.training.edit_protection import dual_directions, orthonormal
from steer.training.edit_readings import key_drift, keys_now, target_probability
from steer.training.edit_resolve import solve_again
from steer.training.edit_run import EditFadesWarning, EditRun
from steer.training.metric_crossing import MetricCrossing
from steer.training.ranks import Ranks

SIZES = {"num_hidden_layers": 2}
EDIT = solved_edit(tiny_model(**SIZES))
PROBABILITY, DRIFT = "edit/home/probability", "edit/home/key_drift"

pytestmark = pytest.mark.filterwarnings("ignore::steer.training.edit_run.EditFadesWarning")


class Loop:
    """A plain PyTorch loop: AdamW with decay on a tiny Llama, hot enough to wash edits out."""

    def __init__(self, model: nn.Module | None = None, *, rate: float = 3e-3, edit: Edit = EDIT, **options: Any) -> None:
        self.model = tiny_model(**SIZES) if model is None else model
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=rate, weight_decay=0.1)
        self.run = EditRun(edit, TOKENIZER, **{"every_n_steps": 2, **options})
        self.metrics: dict[int, dict[str, float]] = {}

    def train(self, steps: int, first: int = 0, state: dict[str, Tensor] | None = None) -> Loop:
        batches = [*loader(), *loader(), *loader(), *loader(), *loader(), *loader(), *loader()][first : first + steps]
        self.run.attach(self.model, Ranks())
        if state is not None:
            self.run.load_state_dict(state, is_first_rank=True)
        self.metrics[first] = self.run.start(first, [self.optimizer]) or {}
        for step, batch in enumerate(batches, first + 1):
            self.model(**batch, use_cache=False).loss.backward()
            self.run.before_step()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if metrics := self.run.advance(step, {"step": step}):
                self.metrics[step] = metrics
        return self


def lora(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options})
    return get_peft_model(tiny_model(**SIZES), config)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(torch.stack([row["input_ids"] for row in examples(2)])).logits


def leak(model: nn.Module, before: Tensor) -> float:
    """|dW Q| / |dW| of what training did to the edited matrix. before: with the edit in it."""
    change = weight(model).detach().double() - before.double()
    return float((change @ orthonormal(EDIT.deltas[0].keys)).norm() / change.norm())


def edited_weight() -> Tensor:
    model = tiny_model(**SIZES)
    EditedWeights.of(model).apply(EDIT)
    return weight(model).detach().clone()


# ---- when


def test_edits_are_applied_at_a_step_and_measured_from_then_on() -> None:
    loop = Loop(at_step=3).train(7)
    assert sorted(loop.metrics) == [0, 3, 4, 6] and loop.metrics[0] == {}
    assert all(set(metrics) == {PROBABILITY, DRIFT} for step, metrics in loop.metrics.items() if step)
    plain = Loop(at_step=99).train(3)
    assert not plain.run.is_applied and EditedWeights.of(loop.model).applied == (EDIT,) and not EditedWeights.of(plain.model).applied


def test_what_is_measured_is_what_one_measures_by_hand() -> None:
    model = tiny_model(**SIZES)
    before = target_probability(model, TOKENIZER, [EDIT])[0]
    loop = Loop(model)
    loop.train(0)
    by_hand = 0.0
    for fact in FACTS:
        ids = torch.tensor([TOKENIZER(fact.prompt).input_ids])
        with torch.no_grad():
            by_hand += float(model(ids).logits[0, -1].softmax(-1)[TOKENIZER(fact.target).input_ids[0]]) / 2
    assert loop.metrics[0][PROBABILITY] == pytest.approx(by_hand, abs=1e-6) and by_hand > 5 * before
    assert loop.metrics[0][DRIFT] < 1e-5
    loop = Loop().train(4)
    keys = keys_now(loop.model, TOKENIZER, EDIT)[1]
    assert loop.metrics[4][DRIFT] == pytest.approx(
        float(((keys - EDIT.deltas[0].keys).norm(dim=1) / EDIT.deltas[0].keys.norm(dim=1)).mean())
    )
    assert loop.metrics[4][DRIFT] > 0.01 and math.isclose(key_drift(EDIT, {1: keys}), loop.metrics[4][DRIFT], rel_tol=1e-6)


@pytest.mark.parametrize("crossing", [MetricCrossing("step", above=2.5), MetricCrossing("step", below=0.0)])
def test_edits_wait_for_a_metric(crossing: MetricCrossing) -> None:
    loop = Loop(on_metric=crossing).train(4)
    assert loop.run.is_applied is (crossing.above is not None) and (3 in loop.metrics) is loop.run.is_applied
    assert not crossing.is_in({"other": 3.0})


def moved() -> nn.Module:
    """A model that was trained since the edit was solved."""
    model = tiny_model(**SIZES)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("into", ["base", "adapter"])
@pytest.mark.parametrize("at_step", [0, 2])
def test_an_edit_for_other_weights_is_refused_or_solved_again(at_step: int, into: str) -> None:
    def model() -> nn.Module:
        return moved() if into == "base" else get_peft_model(moved(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    with pytest.raises(WrongModelError, match=r"other weights than training begins with[\s\S]*protect='resolve'"):
        Loop(model(), at_step=at_step, into=into).train(0)
    loop = Loop(model(), at_step=at_step, into=into, protect="resolve", keep=0.0, rate=1e-6).train(at_step)
    delta = loop.run.edits[0].deltas[0]
    assert loop.metrics[at_step]["edit/resolved"] == 1 and loop.metrics[at_step][DRIFT] < 1e-5
    assert not torch.equal(delta.u, EDIT.deltas[0].u) and torch.equal(delta.values, EDIT.deltas[0].values)
    torch.testing.assert_close(loop.run._host.given(PATH, delta.keys), delta.values, atol=1e-3, rtol=1e-3)
    loop.run.detach()


def test_a_run_that_waits_with_an_edit_for_other_weights_goes_on_to_the_same_bits() -> None:
    options = {"at_step": 4, "protect": "resolve", "keep": 0.0}
    whole = Loop(moved(), **options).train(6)
    begun = Loop(moved(), **options).train(2)
    resumed = Loop(begun.model, **options)
    resumed.optimizer = begun.optimizer
    resumed.train(4, first=2, state=begun.run.state_dict())
    assert same_weights(resumed.model, whole.model) and resumed.metrics[4]["edit/resolved"] == 1


def test_weights_that_the_run_has_trained_are_no_others() -> None:
    """A checkpoint from before the callback was added, at a step before that of the edits."""
    loop = Loop(at_step=4)
    loop.run.attach(loop.model, Ranks())
    weight(loop.model).data.add_(0.01)
    assert loop.run.start(2, [loop.optimizer]) is None
    fresh = Loop(moved(), at_step=4)
    fresh.run.attach(fresh.model, Ranks())
    with pytest.raises(WrongModelError):
        fresh.run.start(2, [fresh.optimizer])


def test_an_edit_that_is_on_the_model_already_is_taken_as_it_is() -> None:
    model = tiny_model(**SIZES)
    EditedWeights.of(model).apply(EDIT)
    before = weight(model).detach().clone()
    loop = Loop(model)
    loop.train(0)
    assert torch.equal(weight(model), before) and loop.run.edits == [EDIT]


def test_training_without_steps_on_the_edit_leaves_no_trace_of_the_run() -> None:
    """Measuring changes neither weights nor random numbers."""
    first, second = Loop(at_step=99).train(4), Loop()
    for batch in list(loader())[:4]:
        second.model(**batch, use_cache=False).loss.backward()
        second.optimizer.step()
        second.optimizer.zero_grad()
    assert same_weights(first.model, second.model)


def test_after_training_the_edit_can_be_taken_out_of_what_was_trained() -> None:
    loop = Loop().train(3)
    loop.run.detach()
    trained, delta = weight(loop.model).detach().clone(), EDIT.deltas[0]
    EditedWeights.of(loop.model).revert("home")
    assert torch.equal(weight(loop.model), (trained.double() - delta.u.double() @ delta.v.double().T).float())


def test_an_edit_of_several_layers_with_a_fact_that_needed_nothing_is_read_and_solved_again() -> None:
    model = tiny_model(**SIZES)
    said = int(logits_of(model, "the sun is").argmax())
    facts = [FACTS[0], Fact.of("the {} is", "sun", TOKENIZER.convert_ids_to_tokens(said)), FACTS[1]]
    covariance = Covariance.fit(model, TOKENIZER, running_text(60), [0, 1], folder=None, progress=False)
    edit = edit_facts(model, TOKENIZER, facts, editor="memit", layers=[0, 1], covariance=covariance, contexts=CONTEXTS, name="home")
    assert edit.of == (0, 2) and edit.provenance["no_op"] == [facts[1].name]
    loop = Loop(model, edit=edit).train(6)
    assert loop.metrics[0][DRIFT] < 1e-4 < 0.02 < loop.metrics[6][DRIFT]

    def missed(again: Edit) -> float:
        keys = keys_now(model, TOKENIZER, again)
        errors = [keys[delta.layer] @ model.get_submodule(delta.path).weight.T - delta.values for delta in again.deltas]
        return max(float(error.norm() / delta.values.norm()) for error, delta in zip(errors, again.deltas, strict=True))

    assert missed(edit) > 0.02
    assert missed(*solve_again(TOKENIZER, loop.run._host, loop.run.edits, Ranks())) < 1e-3


def logits_of(model: nn.Module, text: str) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([TOKENIZER(text).input_ids])).logits[0, -1]


# ---- LoRA


def test_an_edit_in_the_base_and_one_in_an_adapter_of_its_own_give_the_same_logits() -> None:
    loops = [Loop(lora(), into=into) for into in ("base", "adapter")]
    plain = logits(loops[0].model)
    for loop in loops:
        learns = {name for name, parameter in loop.model.named_parameters() if parameter.requires_grad}
        loop.train(0)
        assert {name for name, parameter in loop.model.named_parameters() if parameter.requires_grad} == learns
    base, adapter = (logits(loop.model) for loop in loops)
    assert (base - plain).abs().max() > 0.1
    torch.testing.assert_close(adapter, base, atol=1e-4, rtol=1e-4)
    assert loops[0].metrics[0][PROBABILITY] == pytest.approx(loops[1].metrics[0][PROBABILITY], abs=1e-4)
    assert not EditedWeights.of(loops[1].model).applied and loops[1].model.active_adapters == ["default", ADAPTER]
    with loops[1].model.disable_adapter():
        assert torch.equal(logits(loops[1].model), logits(tiny_model(**SIZES)))


def test_an_adapter_of_edits_is_there_before_and_trains_nothing() -> None:
    model = lora()
    before, loop = logits(model), Loop(model, into="adapter", at_step=2)
    random = torch.random.get_rng_state()
    loop.run.attach(model, Ranks())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(logits(model), before) and ADAPTER in model.peft_config
    loop.run.detach()  # no edit came into it
    assert ADAPTER not in model.peft_config and torch.equal(logits(model), before) and model.active_adapters == ["default"]
    loop.train(2)
    factors = [parameter for name, parameter in model.named_parameters() if f".{ADAPTER}." in name]
    assert len(factors) == 2 and not any(parameter.requires_grad for parameter in factors) and all(map(torch.any, factors))
    loop.run.detach()
    assert ADAPTER in model.peft_config


def test_an_adapter_needs_another_one_and_a_name(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"no adapter beside which[\s\S]*into='base'"):
        Loop(into="adapter").train(0)
    model = lora()
    Loop(model, into="adapter").train(0)
    with pytest.raises(ConfigError, match=f"an adapter called '{ADAPTER}'"):
        Loop(model, into="adapter").train(0)
    assert model.active_adapters == ["default", ADAPTER]


# ---- protection


def test_projected_steps_leak_nothing_after_fifty_steps_of_adamw_with_decay() -> None:
    before = edited_weight()
    unprotected, projected = Loop(every_n_steps=99).train(50), Loop(every_n_steps=99, protect="project").train(50)
    assert leak(projected.model, before) < 1e-6 < 1e-2 < leak(unprotected.model, before)
    assert (weight(projected.model) - before).norm() > 0.3 * (weight(unprotected.model) - before).norm()  # and it learns
    values = EDIT.deltas[0].keys @ weight(projected.model).T
    assert (values - EDIT.deltas[0].values).norm() < 1e-5 * EDIT.deltas[0].values.norm()


def test_a_projected_step_goes_on_to_teach_other_tokens_what_they_share_with_the_keys() -> None:
    """All keys have a large mean. A step along it, which every token feels, would be lost if it were taken back in the span of the keys."""
    generator = torch.Generator().manual_seed(0)
    mean, noise, step = (torch.randn(*shape, generator=generator).double() for shape in ((40,), (4, 40), (8, 40)))
    keys, moment = 3 * mean + noise, torch.eye(40).double() + 9 * torch.outer(mean, mean)  # [n, f], [f, f] of ordinary keys
    basis = orthonormal(keys)
    directions = dual_directions(basis, torch.linalg.solve(moment, keys.mT))
    step = torch.outer(step[:, 0], mean) + 0.1 * step
    left = {"oblique": step - step @ basis @ directions.mT, "orthogonal": step - step @ basis @ basis.mT}
    power = {name: float((change @ moment * change).sum() / (step @ moment * step).sum()) for name, change in left.items()}
    assert all(float((change @ keys.mT).norm()) < 1e-9 * float((step @ keys.mT).norm()) for change in left.values())
    least = basis @ torch.linalg.inv(basis.mT @ torch.linalg.solve(moment, basis))  # C^-1 Q (Q^T C^-1 Q)^-1
    torch.testing.assert_close(directions, torch.linalg.solve(moment, least))
    assert power["oblique"] > 0.8 and power["orthogonal"] < 0.05
    # directions that do not tell the keys apart are not used
    beside = torch.linalg.qr(torch.cat([basis, noise.mT], 1)).Q[:, 4:]
    assert torch.equal(dual_directions(basis, beside), basis) and torch.equal(dual_directions(basis, keys[:2].mT), basis)


def test_projected_gradients_leak() -> None:
    """The negative control: what projecting the gradient, instead of the step, would do under Adam."""
    before, loop, q = edited_weight(), Loop(every_n_steps=99), orthonormal(EDIT.deltas[0].keys).float()
    weight(loop.model).register_hook(lambda gradient: gradient - (gradient @ q) @ q.T)
    loop.train(50)
    assert leak(loop.model, before) > 1e-2


def test_a_lora_adapter_on_an_edited_map_does_not_see_the_keys() -> None:
    for protect, sees in (("project", False), ("alarm", True)):
        loop = Loop(lora(), rate=1e-2, protect=protect).train(6)
        a = next(p for name, p in loop.model.named_parameters() if "layers.1.mlp.down_proj.lora_A" in name).detach().double()
        seen = float((a @ orthonormal(EDIT.deltas[0].keys)).norm() / a.norm())
        assert seen > 1e-2 if sees else seen < 1e-6


def is_below(name: str) -> bool:
    """A parameter on which the keys of block 0 depend, or of that block."""
    return "embed" in name or "layers.0." in name


def test_frozen_layers_stay_to_the_bit_and_keys_with_them() -> None:
    loop = Loop(model := tiny_model(**SIZES), edit=solved_edit(model, layer=0), protect="freeze", at_step=2).train(2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(4):
        model(**next(iter(loader())), use_cache=False).loss.backward()
        assert all(not parameter.grad.any() for name, parameter in model.named_parameters() if is_below(name))  # in no norm that is clipped
        loop.run.before_step()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if not is_below(name)}
    assert key_drift(loop.run.edits[0], keys_now(model, TOKENIZER, loop.run.edits[0])) == loop.metrics[2][DRIFT]


def test_damped_layers_move_by_a_share_of_each_step() -> None:
    steps = []
    for protect in ("damp", "alarm"):
        model = tiny_model(**SIZES)
        loop = Loop(model, edit=solved_edit(model, layer=0), protect=protect, damping=0.25).train(0)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        model(**next(iter(loader())), use_cache=False).loss.backward()
        loop.run.before_step()
        loop.optimizer.step()
        steps.append({name: parameter.detach() - before[name] for name, parameter in model.named_parameters()})
    for name, step in steps[0].items():
        torch.testing.assert_close(step, (0.25 if is_below(name) else 1.0) * steps[1][name], atol=1e-6, rtol=1e-3)


def test_resolving_gives_the_values_back_for_keys_that_moved() -> None:
    faded, kept = Loop(keep=1.0).train(20), Loop(keep=1.0, protect="resolve").train(20)
    assert kept.metrics[20]["edit/resolved"] >= 1
    edit = kept.run.edits[0]
    assert edit.name == "home" and torch.equal(edit.deltas[0].v, EDIT.deltas[0].v) and not torch.equal(edit.deltas[0].u, EDIT.deltas[0].u)
    keys = keys_now(kept.model, TOKENIZER, edit)[1]
    assert (keys @ weight(kept.model).T - edit.deltas[0].values).norm() < 1e-3 * edit.deltas[0].values.norm()
    assert kept.metrics[20][DRIFT] < 1e-3 < 0.05 < faded.metrics[20][DRIFT]
    assert kept.metrics[20][PROBABILITY] > 1.1 * faded.metrics[20][PROBABILITY]
    assert EditedWeights.of(kept.model).applied == (edit,)


def test_an_edit_that_fades_is_said_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Loop(keep=0.999).train(10)
    said = [str(each.message) for each in caught if each.category is EditFadesWarning]
    assert len(said) == 1 and "edit 'home' fades" in said[0]


# ---- states


RESUMED = [
    *(("full", protect) for protect in ("alarm", "resolve", "project", "freeze", "damp")),
    *((kind, protect) for kind in ("lora", "lora without its base") for protect in ("resolve", "project")),
    ("adapter", "resolve"),
]


@pytest.mark.parametrize(("kind", "protect"), RESUMED)
def test_a_run_that_goes_on_from_its_state_ends_with_the_same_bits(kind: str, protect: str) -> None:
    def loop() -> Loop:
        model = None if kind == "full" else lora()
        return Loop(model, at_step=2, protect=protect, keep=1.0, into="adapter" if kind == "adapter" else "base", rate=1e-2)

    whole, first, second = loop().train(8), loop().train(5), loop()
    state = {name: tensor.clone() for name, tensor in first.run.state_dict().items()}
    weights = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    if kind == "lora without its base":
        weights = {name: tensor for name, tensor in weights.items() if "lora_" in name}
    second.run.attach(second.model, Ranks())
    second.model.load_state_dict(weights, strict=False)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.train(3, first=5, state=state)
    assert same_weights(second.model, whole.model)
    assert [edit.digest for edit in second.run.edits] == [edit.digest for edit in whole.run.edits]
    ours, theirs = second.run.state_dict(), whole.run.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {step: second.metrics[step] for step in (6, 8)} == {step: whole.metrics[step] for step in (6, 8)}


def test_a_state_from_before_the_application() -> None:
    whole, first, second = Loop(at_step=6).train(8), Loop(at_step=6).train(4), Loop(at_step=6)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.train(4, first=4, state=first.run.state_dict())
    assert same_weights(second.model, whole.model) and EditedWeights.of(second.model).applied == (EDIT,)


def test_a_state_of_other_weights_or_edits_is_refused() -> None:
    state = Loop().train(3).run.state_dict()
    with pytest.raises(DamagedFileError, match=r"not those that the state of the edits[\s\S]*down_proj"):
        Loop().train(0, first=3, state=state)  # neither trained nor the base that they were applied to
    for wrong in ({name: tensor for name, tensor in state.items() if not name.endswith("/u")}, {**state, "faded": torch.zeros(3)}, {}):
        with pytest.raises(ConfigError, match="does not fit these edits"):
            Loop().run.load_state_dict(wrong, is_first_rank=True)
    for options in ({}, {"on_metric": MetricCrossing("loss", below=0.0)}):
        with pytest.raises(ConfigError, match="holds no state of these edits"):
            Loop(**options).train(0, first=3)
    Loop(at_step=5).train(0, first=3)  # not applied by then


# ---- ranks


def on_a_rank(folder: Path) -> None:
    """Steps with the mean gradient of both ranks; each rank sees other batches, and other metrics."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    loop = Loop(protect="resolve", keep=1.0, on_metric=MetricCrossing("rank", above=0.5))
    loop.run.attach(loop.model, Ranks())
    loop.metrics[0] = loop.run.start(0, [loop.optimizer]) or {}
    wrapped = nn.parallel.DistributedDataParallel(loop.model)
    for step, batch in enumerate(list(loader())[rank::2], 1):
        wrapped(**batch, use_cache=False).loss.backward()
        loop.run.before_step()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.metrics[step] = loop.run.advance(step, {"rank": float(rank == 0 and step == 2)}) or {}
    torch.save({"weights": loop.model.state_dict(), "state": loop.run.state_dict(), "metrics": loop.metrics}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_apply_and_solve_the_same_edits(tmp_path: Path) -> None:
    run_on_ranks(on_a_rank, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["metrics"] == second["metrics"] and PROBABILITY in first["metrics"][2] and not first["metrics"][1]
    for part in ("weights", "state"):
        assert first[part].keys() == second[part].keys() and all(torch.equal(first[part][key], second[part][key]) for key in first[part])
    assert float(first["state"]["resolved"]) >= 1


# ---- bad input


def test_what_a_run_refuses() -> None:
    no_keys = Edit(FACTS, "x", (WeightDelta(PATH, 1, torch.ones(32, 1), torch.ones(64, 1)),), "bare")
    for options, said in (
        ({"edits": []}, "names of their own"),
        ({"edits": [EDIT, EDIT]}, "two called 'home'"),
        ({"edits": "home"}, "the edits of a callback"),
        ({"tokenizer": None}, "tokenizer"),
        ({"at_step": -1}, "at_step"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"protect": "hope"}, "protect"),
        ({"into": "head"}, "into"),
        ({"keep": 2.0}, "keep"),
        ({"on_metric": "loss"}, "on_metric"),
        ({"on_metric": MetricCrossing("loss", below=1.0), "at_step": 3}, "for a step and for a metric"),
        ({"edits": no_keys, "protect": "resolve"}, "needs the keys and values of edit 'bare'"),
    ):
        with pytest.raises(ConfigError, match=said):
            EditRun(**{"edits": EDIT, "tokenizer": TOKENIZER, **options})
    for wrong in ({}, {"above": 1.0, "below": 0.0}, {"above": math.nan}):
        with pytest.raises(ConfigError):
            MetricCrossing("loss", **wrong)
    with pytest.raises(ConfigError, match="needs the keys of edit 'bare'"):
        EditRun(no_keys, TOKENIZER, protect="project").attach(tiny_model(**SIZES), Ranks())
    with pytest.raises(WrongModelError):
        EditRun(EDIT, TOKENIZER).attach(tiny_model(num_hidden_layers=1), Ranks())
    with pytest.raises(AttachError, match="no model yet"):
        EditRun(EDIT, TOKENIZER).start(0, [])


def test_what_cannot_be_solved_again_is_refused_before_training() -> None:
    delta = replace(EDIT.deltas[0], values=None)
    with pytest.raises(ConfigError, match="needs the keys and values of edit 'home'"):
        EditRun(replace(EDIT, deltas=(delta,)), TOKENIZER, protect="resolve")  # as of a quantised map
    with pytest.raises(ConfigError, match=r"how the keys of edit 'home' were read[\s\S]*plain_half"):
        EditRun(replace(EDIT, settings={}), TOKENIZER, protect="resolve")
    dora = get_peft_model(tiny_model(**SIZES), LoraConfig(r=2, target_modules=["down_proj"], use_dora=True, task_type="CAUSAL_LM"))
    for protect in ("resolve", "project"):
        with pytest.raises(ConfigError, match="DoRA"):
            EditRun(EDIT, TOKENIZER, protect=protect).attach(dora, Ranks())
    EditRun(EDIT, TOKENIZER, protect="freeze").attach(dora, Ranks())


@pytest.mark.parametrize("name", ["r_rome", "rome", "emmet", "memit", "alphaedit", "pmet"])
def test_keys_of_every_editor_are_read_again_as_it_read_them(name: str, tmp_path: Path) -> None:
    model = tiny_model(**SIZES)
    covariance = Covariance.fit(model, TOKENIZER, running_text(20), [1], folder=tmp_path, progress=False)
    fact = Fact.of("where is the {}", "dog", "house")
    settings = replace(EDITORS.get(name)().value_settings, steps=4, clamp=3.0, kl=0.0, weight_decay=0.0, lr=0.5)
    edit = edit_facts(
        model, TOKENIZER, fact, editor=EDITORS.get(name)(value_settings=settings), layers=[1], covariance=covariance, contexts=CONTEXTS
    )
    loop = Loop(model, edit=edit, rate=0.0)
    loop.train(0)
    assert loop.metrics[0][f"edit/{edit.name}/key_drift"] < 1e-6


def test_an_edit_without_keys_is_measured_by_its_targets_alone() -> None:
    no_keys = Edit(FACTS, "x", (WeightDelta(PATH, 1, torch.zeros(32, 1), torch.ones(64, 1)),), "bare")
    loop = Loop()
    loop.run = EditRun(no_keys, TOKENIZER)
    assert set(loop.train(0).metrics[0]) == {"edit/bare/probability"}


def test_keys_that_cannot_be_read_again_are_said() -> None:
    unclear = replace(EDIT, of=None, facts=FACTS[:1])
    with pytest.raises(ConfigError, match=r"keys of edit 'home' cannot be read again[\s\S]*2 keys in layer 1"):
        keys_now(tiny_model(**SIZES), TOKENIZER, unclear)
