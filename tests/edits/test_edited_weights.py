"""Edits in the weights of a model: any of them can be taken out again, to the bit, however they came."""

from __future__ import annotations

import gc
import weakref
from itertools import permutations

import pytest
import torch
from edits.edit_helpers import DOWN, IDS, equal_weights, random_edit, weights_of
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import interrupted, lines_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from steer.edits.base_modules import base_path
from steer.edits.edit import Edit, WeightDelta
from steer.edits.edited_weights import EditedWeights
from steer.edits.make_edit import make_edit
from steer.errors import ConfigError, EditError, NonFiniteError, WrongModelError

PATH = DOWN["llama"].format(1)
MODEL = FAMILIES["llama"](num_hidden_layers=2)
ORIGINAL = weights_of(MODEL)
EDITS = [
    random_edit(MODEL, name, layers=layers, seed=seed) for seed, (name, layers) in enumerate([("a", (1,)), ("b", (0, 1)), ("c", (1,))])
]
ALONE: dict[frozenset[str], dict[str, Tensor]] = {}


@pytest.fixture
def model() -> nn.Module:
    """The same numbers every time; the edits were made for them."""
    return FAMILIES["llama"](num_hidden_layers=2)


def weight(model: nn.Module, path: str = PATH) -> Tensor:
    return model.get_submodule(path).weight


def with_alone(names: frozenset[str]) -> dict[str, Tensor]:
    """The weights of a new model to which these edits were applied, and nothing else was ever done."""
    if names not in ALONE:
        fresh = FAMILIES["llama"](num_hidden_layers=2)
        for edit in EDITS:
            if edit.name in names:
                EditedWeights.of(fresh).apply(edit)
        ALONE[names] = weights_of(fresh)
    return ALONE[names]


# ---- sequences


@settings(max_examples=40)
@given(st.lists(st.integers(0, 2), max_size=12))
def test_any_sequence_leaves_what_remains_to_the_bit(moves: list[int]) -> None:
    edited, on = EditedWeights.of(MODEL), set()
    try:
        for number in moves:  # each is applied when it is off and reverted when it is on
            edit = EDITS[number]
            edited.revert(edit) if edit.name in on else edited.apply(edit)
            on ^= {edit.name}
            assert equal_weights(MODEL, with_alone(frozenset(on)))
    finally:
        edited.clear()
    assert equal_weights(MODEL, ORIGINAL) and not edited.applied and not edited._state.originals


def test_the_order_of_edits_does_not_matter_and_each_adds_its_delta(model: nn.Module) -> None:
    edited, want = EditedWeights.of(model), None
    exact = weight(model).detach().double() + sum(edit.delta(PATH).u.double() @ edit.delta(PATH).v.double().T for edit in EDITS)
    for order in permutations(EDITS):
        for edit in order:
            edited.apply(edit)
        want = weight(model).clone() if want is None else want
        assert torch.equal(weight(model), want) and edited.applied == order
        edited.clear()
    assert (want.double() - exact).abs().max() <= 2**-24 * exact.abs().max()


def test_subtracting_would_not_give_the_weights_back(model: nn.Module) -> None:
    """The negative control: what `W += dW; W -= dW` leaves behind."""
    before, change = weight(model).detach().clone(), EDITS[0].delta(PATH).change()
    assert not torch.equal(before + change - change, before)


def test_of_two_edits_of_one_fact_the_first_can_be_taken_out_alone(model: nn.Module) -> None:
    edited, (first, second) = EditedWeights.of(model), (EDITS[0], EDITS[2].named("a again"))
    edited.apply(first)
    edited.apply(second)
    edited.revert("a")
    assert edited.applied == (second,)
    alone = FAMILIES["llama"](num_hidden_layers=2)
    EditedWeights.of(alone).apply(second)
    assert equal_weights(model, weights_of(alone))


def test_an_edit_that_does_nothing_changes_nothing(model: nn.Module) -> None:
    edit = random_edit(model, rank=0)
    with edit.applied(model) as edited:
        assert edited.applied == (edit,) and equal_weights(model, ORIGINAL) and edited.rounding == {PATH: 0.0}
    empty = Edit((), "none", (), name="empty")
    with empty.applied(model):
        assert equal_weights(model, ORIGINAL)


# ---- errors and interrupts


def test_a_block_restores_whatever_ends_it(model: nn.Module) -> None:
    for stop in (None, RuntimeError, KeyboardInterrupt, SystemExit):
        try:
            with EDITS[1].applied(model) as edited:
                assert not equal_weights(model, ORIGINAL) and edited.applied == (EDITS[1],)
                if stop is not None:
                    raise stop("no")
        except (RuntimeError, KeyboardInterrupt, SystemExit) as error:
            assert type(error) is stop
        assert equal_weights(model, ORIGINAL) and not EditedWeights.of(model).applied


def test_a_block_leaves_an_edit_that_was_there_before(model: nn.Module) -> None:
    EditedWeights.of(model).apply(EDITS[0])
    before = weights_of(model)
    with pytest.raises(EditError, match="'a' is on this model already"), EDITS[0].applied(model):
        pass
    assert equal_weights(model, before)


def test_what_is_no_edit_and_a_model_without_numbers_are_said():
    model = FAMILIES["llama"](num_hidden_layers=2)
    edited = EditedWeights.of(model)
    for wrong in (None, 3):
        with pytest.raises(ConfigError, match="an edit to be reverted"):
            edited.revert(wrong)
    weight(model).data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="not finite without any edit"):
        edited.apply(EDITS[0], on_other_weights=True)


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_an_interrupt_at_any_line_leaves_the_old_weights_or_the_new_ones(action: str) -> None:
    edited = EditedWeights.of(MODEL)

    def act() -> None:
        edited.apply(EDITS[1]) if action == "apply" else edited.revert(EDITS[1])

    try:
        edited.apply(EDITS[0])
        states = {0: with_alone(frozenset("a")), 1: with_alone(frozenset("ab"))}

        def begin() -> None:
            if "b" in {edit.name for edit in edited.applied}:
                edited.revert("b")
            if action == "revert":
                edited.apply(EDITS[1])

        begin()
        lines = lines_of(act)
        for line in [*range(0, lines, 61), *range(lines - 30, lines)]:
            begin()
            assert interrupted(act, line)
            assert equal_weights(MODEL, states[int(len(edited.applied) == 2)]), line
    finally:
        edited.clear()
    assert equal_weights(MODEL, ORIGINAL)


def test_a_failure_while_weights_are_written_puts_the_first_ones_back(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    import steer.edits.edited_weights as module

    write = module.write

    def failing(modules: dict[str, nn.Module], values: dict[str, Tensor]) -> None:
        first = dict(list(values.items())[:1])
        write(modules, first)
        monkeypatch.setattr(module, "write", write)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(module, "write", failing)
    with pytest.raises(torch.OutOfMemoryError):
        EditedWeights.of(model).apply(EDITS[1])
    assert equal_weights(model, ORIGINAL) and not EditedWeights.of(model).applied


# ---- models


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_maps_of_other_families(family: str) -> None:
    """A Conv1D holds its weight the other way round; fused gates are no concern of a down projection."""
    model = FAMILIES[family]()
    before, path = weights_of(model), DOWN[family].format(1)
    edit, module = random_edit(model, family=family), model.get_submodule(path)
    delta, x = edit.delta(path), torch.randn(3, edit.delta(path).shape[1])
    plain = module(x)
    with edit.applied(model):
        assert torch.allclose(module(x), plain + x @ delta.v @ delta.u.T, atol=1e-5)
        assert torch.allclose(module(delta.keys), delta.values + (0 if module.bias is None else module.bias), atol=1e-4)
    assert equal_weights(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_and_says_what_that_costs(dtype: torch.dtype) -> None:
    model = FAMILIES["llama"](num_hidden_layers=2).to(dtype)
    before, edited = weights_of(model), EditedWeights.of(model)
    edits = [random_edit(model, f"e{seed}", seed=seed, size=0.02) for seed in range(5)]
    exact = weight(model).detach().double()
    for edit in edits:
        edited.apply(edit)
        exact += edit.delta(PATH).u.double() @ edit.delta(PATH).v.double().T
    assert torch.equal(weight(model), exact.to(dtype))  # of five edits, too, there is one rounding
    change = (exact - before[f"{PATH}.weight"].double()).norm()
    assert edited.rounding[PATH] == pytest.approx(float((weight(model).detach().double() - exact).norm() / change))
    assert 1e-3 < edited.rounding[PATH] < 1
    edited.clear()
    assert equal_weights(model, before)
    with EDITS[0].applied(FAMILIES["llama"](num_hidden_layers=2)) as full:
        assert full.rounding[PATH] < 1e-5


def test_beyond_the_range_of_the_dtype(model: nn.Module) -> None:
    half = model.to(torch.float16)
    before = weights_of(half)
    with pytest.raises(NonFiniteError, match="beyond the range of float16"):
        EditedWeights.of(half).apply(random_edit(half, size=500.0))
    assert equal_weights(half, before)


def test_a_lora_layer_is_edited_in_its_base(model: nn.Module) -> None:
    edited = EditedWeights.of(model)
    with torch.no_grad():
        plain = model(IDS).logits
        edited.apply(EDITS[1])
        want = model(IDS).logits
        edited.clear()
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))
        assert EditedWeights.of(adapted) is EditedWeights.of(model)
        with EDITS[1].applied(adapted):
            assert torch.equal(adapted(IDS).logits, want)  # B of a new adapter is 0
            assert not any(name.endswith("lora_B.weight") and bool(t.any()) for name, t in adapted.state_dict().items())
        assert torch.equal(adapted(IDS).logits, plain)
    path = next(path for path, module in adapted.named_modules() if path.endswith("layers.1.mlp.down_proj.base_layer"))
    assert base_path(path) == PATH


def test_wrappers_lead_to_the_same_edits(model: nn.Module) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    assert EditedWeights.of(Holder()) is EditedWeights.of(model) is EditedWeights.of(torch.compile(model))
    other = FAMILIES["llama"](num_hidden_layers=2)
    assert EditedWeights.of(other) is not EditedWeights.of(model)


def test_edits_keep_no_model() -> None:
    model = FAMILIES["llama"](num_hidden_layers=2)
    edited = EditedWeights.of(model)
    edited.apply(EDITS[0])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(EditError, match="model of these edits is gone"):
        edited.clear()


def test_tied_weights_are_refused(model: nn.Module) -> None:
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    with pytest.raises(EditError, match=r"shares its weight[\s\S]*layers.0.mlp.down_proj, .*layers.1.mlp.down_proj"):
        EditedWeights.of(model).apply(EDITS[0])
    again = FAMILIES["llama"](num_hidden_layers=2)
    again.model.layers[0].mlp = again.model.layers[1].mlp  # the module itself, as in ALBERT
    with pytest.raises(EditError, match="shares its weight"):
        EditedWeights.of(again).apply(EDITS[0])


def test_packed_and_offloaded_weights_are_refused_with_a_way_out(model: nn.Module) -> None:
    module, edited = model.get_submodule(PATH), EditedWeights.of(model)
    module.weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(EditError, match=r"cannot be edited in place[\s\S]*uint8[\s\S]*to_adapter"):
        edited.apply(EDITS[0])
    module.weight = nn.Parameter(torch.zeros(32, 64, device="meta"))
    with pytest.raises(EditError, match=r"offloaded[\s\S]*device_map"):
        edited.apply(EDITS[0])


def test_another_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(WrongModelError, match="another shape"):
        EditedWeights.of(FAMILIES["llama"](num_hidden_layers=2, intermediate_size=48)).apply(EDITS[0])
    with pytest.raises(WrongModelError, match="no matrix 'model.layers.1.mlp.down_proj'"):
        EditedWeights.of(FAMILIES["gpt2"]()).apply(EDITS[0])
    with torch.no_grad():
        weight(model)[0, 0] += 1
    edited = EditedWeights.of(model)
    with pytest.raises(WrongModelError, match="solved for other weights"):
        edited.apply(EDITS[0])
    edited.apply(EDITS[0], on_other_weights=True)
    assert edited.applied == (EDITS[0],)


def test_names_of_edits(model: nn.Module) -> None:
    edited = EditedWeights.of(model)
    edited.apply(EDITS[0])
    with pytest.raises(EditError, match="called 'a' is on this model already"):
        edited.apply(EDITS[2].named("a"))
    with pytest.raises(EditError, match=r"no edit called 'b'[\s\S]*one of a"):
        edited.revert(EDITS[1])


def test_several_edits_are_taken_out_in_one_step(model: nn.Module) -> None:
    edited = EditedWeights.of(model)
    edited.apply(*EDITS)
    with pytest.raises(EditError, match="no edit called 'z'"):
        edited.revert("a", "z")
    assert edited.applied == tuple(EDITS), "wholly or not at all"
    edited.revert("c", EDITS[0])
    assert edited.applied == (EDITS[1],) and equal_weights(model, with_alone(frozenset("b")))
    edited.clear()


# ---- weights that were cast


@pytest.mark.parametrize("looks", [True, False])
def test_a_cast_that_changes_numbers_of_w0_alone_is_seen_by_who_looks(model: nn.Module, looks: bool) -> None:
    edited, name = EditedWeights.of(model), "model.layers.1.mlp.down_proj.weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight[0, 0] = 1.03e-6  # fp16 has steps of 6e-8 there, bf16 of 7e-9
    model.to(torch.bfloat16)
    before = weight.detach().clone()
    edited.apply(EDITS[0], on_other_weights=True)
    for dtype in (torch.float16, torch.float32):
        model.to(dtype)
        assert not (looks and edited.changed)
    edited.clear()
    cleared = model.get_parameter(name)
    assert torch.equal(cleared, before.half().float() if looks else before.float())
    assert not torch.equal(before.half().float(), before.float()) and (cleared - before.float()).abs().max() < 2**-24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_after_a_cast_edits_come_out_as_if_the_model_had_been_cast_first(model: nn.Module, dtype: torch.dtype) -> None:
    edited = EditedWeights.of(model)
    edited.apply(*EDITS)
    model.to(dtype)
    plain = FAMILIES["llama"](num_hidden_layers=2).to(dtype)
    EditedWeights.of(plain).apply(*EDITS[1:], on_other_weights=True)
    edited.revert("a")
    assert equal_weights(model, weights_of(plain)) and not edited.changed and edited.rebased == []
    edited.check_weights(random_edit(plain, "d"))
    edited.clear()
    assert equal_weights(model, weights_of(FAMILIES["llama"](num_hidden_layers=2).to(dtype)))


DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@settings(max_examples=40)
@given(st.lists(st.sampled_from([*DTYPES, 0, 1, 2, "look"]), max_size=9))
def test_any_sequence_of_casts_and_edits_leaves_what_the_cast_model_is_with_the_edits_that_remain(moves: list[str | int]) -> None:
    model, base = FAMILIES["llama"](num_hidden_layers=2), FAMILIES["llama"](num_hidden_layers=2)  # the second is never cast with edits
    edited, on, want = EditedWeights.of(model), [], ORIGINAL
    for number, move in enumerate(moves):
        if move in DTYPES:
            model.to(DTYPES[move])
            if move == "float16" and "bfloat16" in moves[:number]:
                assert not edited.changed  # a look: fp16 may round numbers of W0 alone among those that bf16 has rounded already
            base.to(DTYPES[move])
            want = {name: tensor.to(DTYPES[move]) for name, tensor in want.items()}
        elif move == "look":
            assert not edited.changed
        else:
            edit = EDITS[move]
            edited.revert(edit) if edit in on else edited.apply(edit, on_other_weights=True)
            on = [other for other in on if other is not edit] if edit in on else [*on, edit]
            alone = EditedWeights.of(base)
            alone.apply(*on, on_other_weights=True)
            want = weights_of(base)
            alone.clear()
        assert equal_weights(model, want)
    edited.check_weights(random_edit(base, "d"))
    edited.clear()
    assert equal_weights(model, weights_of(base)) and edited.rebased == []


def test_casts_to_fp16_to_bf16_and_back_are_followed_without_a_look() -> None:
    """The other way round the edited weight does not show the second cast: see `EditedWeights`."""
    model, base = FAMILIES["llama"](num_hidden_layers=2), FAMILIES["llama"](num_hidden_layers=2)
    edited = EditedWeights.of(model)
    edited.apply(EDITS[0])
    for dtype in (torch.float16, torch.bfloat16, torch.float16):
        model.to(dtype)
        base.to(dtype)
    edited.revert("a")
    assert equal_weights(model, weights_of(base))


def test_an_edit_that_was_solved_before_a_cast_is_refused_with_a_way_out(model: nn.Module) -> None:
    model.half()
    with pytest.raises(WrongModelError, match=r"solved for other weights[\s\S]*a cast changes them[\s\S]*on_other_weights=True"):
        EditedWeights.of(model).apply(EDITS[0])


def test_a_cast_of_trained_weights_is_no_cast_of_what_was_written(model: nn.Module) -> None:
    edited = EditedWeights.of(model)
    edited.apply(EDITS[0])
    weight(model).data[0, 0] += 1
    model.to(torch.bfloat16)
    with pytest.raises(EditError, match="something else has changed"):
        edited.revert("a")
    assert edited.rebase() == [PATH]
    model.half().float()
    edited.revert("a")
    assert edited.applied == () and edited.rebased == []


# ---- weights that something else has changed


def trained(model: nn.Module) -> Tensor:
    """A step on the edited matrix, as an optimiser takes it; what it adds."""
    step = 1e-3 * torch.randn(weight(model).shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        weight(model).add_(step)
    return step


def test_trained_weights_are_not_touched_unless_it_is_said_what_they_hold(model: nn.Module) -> None:
    edited = EditedWeights.of(model)
    edited.apply(EDITS[0])
    trained(model)
    before = weights_of(model)
    assert edited.changed == [PATH]
    for action in (lambda: edited.revert("a"), lambda: edited.apply(EDITS[2]), edited.clear):
        with pytest.raises(EditError, match=r"something else has changed[\s\S]*rebase\(\)[\s\S]*forget\(\)"):
            action()
    assert equal_weights(model, before)


def test_rebase_keeps_what_was_trained_and_takes_the_edit_out_of_it(model: nn.Module) -> None:
    edited = EditedWeights.of(model)
    edited.apply(EDITS[0])
    edited.apply(EDITS[2])
    trained(model)
    now = weight(model).detach().clone()
    assert edited.rebase() == [PATH] and edited.rebased == [PATH] and torch.equal(weight(model), now) and not edited.changed
    edited.revert("a")
    assert torch.equal(weight(model), (now.double() - EDITS[0].delta(PATH).u.double() @ EDITS[0].delta(PATH).v.double().T).float())
    edited.apply(EDITS[0], on_other_weights=True)
    assert torch.equal(weight(model), now)  # again a function of what is on the model
    edited.clear()
    assert edited.rebased == [] and edited.rebase() == []


def test_forget_takes_loaded_weights_as_they_are(model: nn.Module) -> None:
    edited = EditedWeights.of(model)
    edited.apply(EDITS[0])
    model.load_state_dict(ORIGINAL)
    with pytest.raises(EditError, match="something else has changed"):
        edited.clear()
    edited.forget()
    assert not edited.applied and equal_weights(model, ORIGINAL)
    edited.apply(EDITS[0])
    assert equal_weights(model, with_alone(frozenset("a")))


def test_adopt_takes_the_edits_of_a_checkpoint_as_applied(model: nn.Module) -> None:
    edited = EditedWeights.of(model)
    edited.apply(*EDITS[:2])
    saved = weights_of(model)
    again = FAMILIES["llama"](num_hidden_layers=2)
    again.load_state_dict(saved)
    other = EditedWeights.of(again)
    other.adopt(EDITS[:2])
    assert equal_weights(again, saved) and other.applied == tuple(EDITS[:2]) and len(other.rebased) == 2
    other.clear()
    assert (weight(again) - ORIGINAL[f"{PATH}.weight"]).abs().max() < 1e-6
    again.load_state_dict(saved)
    other.adopt(EDITS[:2], {PATH: ORIGINAL[f"{PATH}.weight"], DOWN["llama"].format(0): torch.zeros(32, 64)})
    assert other.rebased == [DOWN["llama"].format(0)]  # zeros cannot have been there
    other.clear()
    assert torch.equal(weight(again), ORIGINAL[f"{PATH}.weight"])


def test_replace_is_one_step(model: nn.Module) -> None:
    edited, other = EditedWeights.of(model), EDITS[2].named("a")
    edited.apply(*EDITS[:2])
    edited.replace([other])
    assert edited.applied == (other, EDITS[1])
    alone = FAMILIES["llama"](num_hidden_layers=2)
    EditedWeights.of(alone).apply(EDITS[1], other)
    assert equal_weights(model, weights_of(alone))
    with pytest.raises(EditError, match="no edit called 'c'"):
        edited.replace([EDITS[2]])


def test_several_edits_are_applied_together_or_not_at_all(model: nn.Module) -> None:
    with pytest.raises(EditError, match="called 'a' is on this model already"):
        EditedWeights.of(model).apply(EDITS[0], EDITS[1], EDITS[0])
    assert equal_weights(model, ORIGINAL) and not EditedWeights.of(model).applied


# ---- making edits


def test_an_edit_on_top_of_others_knows_the_weights_below_them(model: nn.Module) -> None:
    edited = EditedWeights.of(model)
    edited.apply(EDITS[0])
    second = random_edit(model, "second", seed=7)
    assert second.base == EDITS[0].base and second.provenance == {"over": ["a"]}
    assert torch.allclose(second.deltas[0].values, second.deltas[0].keys @ (weight(model) + second.deltas[0].change()).T, atol=1e-4)
    edited.apply(second)
    edited.revert("a")
    assert [edit.name for edit in edited.applied] == ["second"]


def test_an_edit_of_a_path_that_is_not_there(model: nn.Module) -> None:
    delta = WeightDelta("model.layers.1.mlp.down_prj", 1, torch.ones(32, 1), torch.ones(64, 1))
    with pytest.raises(WrongModelError, match=r"no matrix 'model.layers.1.mlp.down_prj'[\s\S]*did you mean '.*layers.1.mlp.down_proj'"):
        make_edit(model, [], [delta], editor="x")
