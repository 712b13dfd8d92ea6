"""Edits as LoRA adapters: what PEFT alone makes of them, and what is read back."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from edits.edit_helpers import DOWN, IDS, equal_weights, fact, random_edit, weights_of
from families import FAMILIES, WIDTH
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import steer
from steer.edits.edit import Edit, WeightDelta
from steer.edits.edit_adapter import from_adapter, to_adapter
from steer.edits.edited_weights import EditedWeights
from steer.edits.make_edit import make_edit
from steer.errors import ConfigError, DeployError, EditError, ModelNotFoundError, StorageFullError, WrongModelError
from steer.intervene import Ablate, Add, Intervention, Plan

PATH = DOWN["llama"].format(1)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def model() -> nn.Module:
    return FAMILIES["llama"](num_hidden_layers=2)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def with_edits(model: nn.Module, *edits: Edit) -> Tensor:
    edited = EditedWeights.of(model)
    try:
        for edit in edits:
            edited.apply(edit)
        return logits(model)
    finally:
        edited.clear()


def loaded(model: nn.Module, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what PEFT says of missing or unexpected tensors
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*|.*tie_word_embeddings.*|.*lora_bias.*")
        return PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_alone_runs_merges_and_switches_off_an_edit(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    edit, plain, before = random_edit(model, family=family, layers=(0, 2), rank=3), logits(model), weights_of(model)
    want = with_edits(model, edit)
    to_adapter(edit, model, tmp_path)
    assert equal_weights(model, before) and {file.name for file in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    adapted = loaded(model, tmp_path)
    assert (want - plain).abs().max() > 0.1  # it does something
    torch.testing.assert_close(logits(adapted), want, atol=1e-4, rtol=1e-4)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), want, atol=1e-4, rtol=1e-4)


def test_the_factors_are_balanced_and_scaled_by_one(model: nn.Module, tmp_path: Path) -> None:
    edit = random_edit(model, size=1e-3)
    far_apart = Edit(edit.facts, "x", (WeightDelta(PATH, 1, 1e-4 * edit.deltas[0].u, 1e4 * edit.deltas[0].v),))
    to_adapter(far_apart, model, tmp_path, on_other_weights=True)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 2 and config["target_modules"] == [PATH]
    tensors = steer.files.read_safetensors(tmp_path / WEIGHTS)[0]
    a, b = (tensors[f"base_model.model.{PATH}.lora_{side}.weight"] for side in "AB")
    ratio = a.norm(dim=1) / b.norm(dim=0)
    assert bool(((ratio > 0.49) & (ratio < 2.01)).all())
    assert torch.equal(b.double() @ a.double(), far_apart.deltas[0].u.double() @ far_apart.deltas[0].v.double().T)


def test_what_is_read_back_changes_weights_by_the_same_numbers(model: nn.Module, tmp_path: Path) -> None:
    edit = random_edit(model, layers=(0, 1))
    deltas = (edit.deltas[0], WeightDelta(PATH, 1, torch.cat([edit.deltas[1].u] * 2, 1), torch.cat([edit.deltas[1].v] * 2, 1)))
    edit = Edit(edit.facts, "memit", deltas, "mine", {"ridge": 1.0}, {"prefixes": ["The"], "seed": 1}, base=edit.base)
    again = from_adapter(to_adapter(edit, model, tmp_path), model)
    assert (again.name, again.facts, again.editor, again.base, again.contexts, again.settings) == (
        "mine", edit.facts, "memit", edit.base, edit.contexts, {"ridge": 1.0}
    )  # fmt: skip
    assert [(delta.layer, delta.rank) for delta in again.deltas] == [(0, 2), (1, 4)]  # not padded any more
    edited = EditedWeights.of(model)
    edited.apply(edit)
    want = weights_of(model)
    edited.clear()
    edited.apply(again)
    assert equal_weights(model, want)


def test_several_edits_are_one_adapter(model: nn.Module, tmp_path: Path) -> None:
    edits = [random_edit(model, "a"), random_edit(model, "b", layers=(0, 1), rank=3, seed=4)]
    want = with_edits(model, *edits)
    again = from_adapter(to_adapter(edits, model, tmp_path), model)
    assert again.name == "a+b" and again.facts == (edits[0].facts + edits[1].facts) and again.rank == 5
    torch.testing.assert_close(logits(loaded(model, tmp_path)), want, atol=1e-4, rtol=1e-4)


def test_an_edit_without_effect_is_an_adapter_without_effect(model: nn.Module, tmp_path: Path) -> None:
    plain = logits(model)
    again = from_adapter(to_adapter(random_edit(model, rank=0), model, tmp_path), model)
    assert again.rank == 0 and torch.equal(logits(loaded(model, tmp_path)), plain)


def test_a_model_with_adapters_of_its_own(model: nn.Module, tmp_path: Path) -> None:
    """The edit beside an adapter that is trained, on the same map."""
    edit = random_edit(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    want = with_edits(adapted, edit)
    to_adapter(edit, adapted, tmp_path)
    adapted.load_adapter(tmp_path, "edit")
    adapted.base_model.set_adapter(["default", "edit"])
    torch.testing.assert_close(logits(adapted), want, atol=1e-4, rtol=1e-4)


PLANS = {
    "ablates what the edited map gives": Intervention(Ablate(torch.randn(WIDTH)), "layers.1.mlp.output"),
    "adds a constant": Intervention(Add(torch.randn(WIDTH)), "layers.0.attn.output"),
}


@pytest.mark.parametrize("kind", PLANS)
def test_an_adapter_of_an_edit_and_a_plan_file(kind: str, model: nn.Module, tmp_path: Path) -> None:
    edit, plan = random_edit(model, layers=(0, 1)), Plan(PLANS[kind])
    plan.save(tmp_path / "plan")
    before = weights_of(model)
    with edit.applied(model), plan.attached(model):
        want = logits(model)
    to_adapter(edit, model, tmp_path / "both", plan=tmp_path / "plan")
    assert equal_weights(model, before) and not EditedWeights.of(model).applied
    torch.testing.assert_close(logits(loaded(model, tmp_path / "both")), want, atol=1e-4, rtol=1e-4)


def test_a_plan_is_not_worked_out_on_edits_that_stay_behind(model: nn.Module, tmp_path: Path) -> None:
    EditedWeights.of(model).apply(random_edit(model, "other", seed=8))
    with pytest.raises(ConfigError, match=r"hold other edits[\s\S]*other"):
        to_adapter(random_edit(model), model, tmp_path, plan=Plan(PLANS["adds a constant"]))


# ---- what cannot be an adapter


def test_dense_deltas_and_large_ranks_are_refused(model: nn.Module, tmp_path: Path) -> None:
    dense = Edit((fact(),), "ft", (WeightDelta.of_change(PATH, 1, 1e-3 * torch.randn(32, 64)),))
    with pytest.raises(DeployError, match=r"no smaller than the matrix[\s\S]*below 32[\s\S]*rank 32, dense[\s\S]*save_pretrained"):
        to_adapter(dense, model, tmp_path)
    with pytest.raises(DeployError, match="rank 36"):
        to_adapter([random_edit(model, f"e{n}", rank=12, seed=n) for n in range(3)], model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="no edit to write"):
        to_adapter([], model, tmp_path)


def test_an_adapter_knows_the_weights_that_it_was_solved_for(model: nn.Module, tmp_path: Path) -> None:
    edit = random_edit(model)
    to_adapter(edit, model, tmp_path)
    with torch.no_grad():
        model.get_submodule(PATH).weight[0, 0] += 1
    for action in (
        lambda **options: to_adapter(edit, model, tmp_path, **options),
        lambda **options: from_adapter(tmp_path, model, **options),
    ):
        with pytest.raises(WrongModelError, match="solved for other weights"):
            action()
        action(on_other_weights=True)
    with pytest.raises(WrongModelError, match="no matrix"):
        from_adapter(tmp_path, FAMILIES["gpt2"]())
    with pytest.raises(WrongModelError, match="another shape"):
        from_adapter(tmp_path, FAMILIES["llama"](intermediate_size=48))


def test_hashes_are_of_the_weights_below_edits(model: nn.Module, tmp_path: Path) -> None:
    edit = random_edit(model)
    EditedWeights.of(model).apply(random_edit(model, "other", seed=3))
    to_adapter(edit, model, tmp_path)
    assert from_adapter(tmp_path, model).base == edit.base


@pytest.mark.parametrize("scaled", [{}, {"use_rslora": True}])
def test_any_lora_adapter_of_linear_maps_is_an_edit_without_facts(model: nn.Module, tmp_path: Path, scaled: dict[str, bool]) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **scaled)
    adapted = get_peft_model(FAMILIES["llama"](num_hidden_layers=2), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    want = logits(adapted)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    edit = from_adapter(tmp_path, model, name="theirs")
    assert edit.facts == () and edit.editor == "lora" and len(edit.deltas) == 4 and edit.base == {}
    torch.testing.assert_close(with_edits(model, edit), want, atol=1e-4, rtol=1e-4)


def test_adapters_that_do_more_are_refused(model: nn.Module, tmp_path: Path) -> None:
    for number, (options, said) in enumerate(
        [
            ({"use_dora": True}, "use_dora=True"),
            ({"target_modules": ["embed_tokens"]}, "linear map"),
            ({"rank_pattern": {"down_proj": 2}}, "rank_pattern"),
        ]
    ):
        config = LoraConfig(**{"r": 3, "target_modules": ["down_proj"], "task_type": "CAUSAL_LM", **options})
        folder = tmp_path / str(number)
        get_peft_model(FAMILIES["llama"](num_hidden_layers=2), config).save_pretrained(folder, save_embedding_layers=False)
        with pytest.raises(ConfigError, match=said):
            from_adapter(folder, model)
    with pytest.raises(ModelNotFoundError):
        from_adapter(tmp_path, model)


def test_a_full_disk_leaves_the_old_adapter(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_adapter(random_edit(model), model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageFullError):
        to_adapter(random_edit(model, seed=5), model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


class PackedLinear(nn.Module):
    """A linear map that keeps bytes, as quantised ones do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.packed.to(x) * self.scale).T


def test_a_quantised_model_gets_its_edit_as_an_adapter(model: nn.Module, tmp_path: Path) -> None:
    model.model.layers[1].mlp.down_proj = PackedLinear(model.model.layers[1].mlp.down_proj)
    edit = random_edit(model)
    assert edit.base == {} and edit.deltas[0].keys is not None and edit.deltas[0].values is None
    with pytest.raises(EditError, match=r"cannot be edited in place[\s\S]*to_adapter"):
        EditedWeights.of(model).apply(edit)
    assert from_adapter(to_adapter(edit, model, tmp_path), model).deltas[0].rank == 2


@pytest.mark.real
def test_real_model(smollm2, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Tied embeddings, three edits of one matrix as an adapter of a few kilobytes; the weights come back to the bit."""
    model, tokenizer = smollm2
    batch = tokenizer("The mother tongue of Danielle Darrieux is", return_tensors="pt")
    path = DOWN["llama"].format(8)
    before = model.get_submodule(path).weight.detach().clone()
    edits = [random_edit(model, f"e{n}", layers=(8,), rank=1, seed=n, size=0.2) for n in range(3)]
    edited = EditedWeights.of(model)
    with torch.no_grad():
        plain = model(**batch).logits
        try:
            edited.apply(*edits)
            want = model(**batch).logits
            edited.revert("e1")
            edited.revert("e0")
        finally:
            edited.clear()
        assert torch.equal(model.get_submodule(path).weight, before) and (want - plain).abs().max() > 1
        folder = to_adapter(edits, model, tmp_path)
        assert (folder / WEIGHTS).stat().st_size < 40_000
        adapted = loaded(model, folder)
        try:
            assert (adapted(**batch).logits - want).abs().max() < 1e-4 * (want - plain).abs().max()
            with adapted.disable_adapter():
                assert torch.equal(adapted(**batch).logits, plain)
        finally:
            adapted.unload()
    assert torch.equal(model.get_submodule(path).weight, before)


def test_an_edit_that_changes_nothing_makes_no_adapter(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to write into an adapter"):
        to_adapter(make_edit(model, [fact()], [], editor="memit", settings={}), model, tmp_path / "adapter")
    not_found = make_edit(model, [fact()], [], editor="memit", settings={}, provenance={"not_found": [fact().name]})
    with pytest.raises(ConfigError, match=r"no value was found[\s\S]*lower layer"):
        to_adapter(not_found, model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
