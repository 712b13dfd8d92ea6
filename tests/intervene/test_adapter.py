"""Plans written as LoRA adapters, loaded by plain PEFT, against the same plans at run time."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from hand import ids, vector
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import steer
from steer.errors import DeployError, FileError, StorageFullError, WidthError
from steer.intervene import Ablate, Add, Clamp, Intervention, Plan, Scale
from steer.intervene.deploy import adapter_files

ROWS = torch.stack([vector(seed=2), vector(seed=3)])
WRITERS = ["embed", *(f"layers.{n}.{part}" for n in range(3) for part in ("attn.output", "mlp.output"))]
SANDWICH = ("gemma2", "gemma3", "olmo2")
MIXTURES = ("mixtral", "qwen3_moe")
SCALED = ("gemma2", "gemma3")  # the embedding, in the forward pass
BIASED = ("gpt2", "gpt_neox", "opt")
TIED = ("gemma2", "gemma3", "gpt2", "opt", "falcon", "smollm3")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=ids()).logits


def steered(model: nn.Module, plan: Plan) -> Tensor:
    with plan.attached(model):
        return logits(model)


def loaded(model: nn.Module, path: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that merging will not work, and that embeddings are tied
        return PeftModel.from_pretrained(model, str(path)).eval()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()


def plans() -> dict[str, Plan]:
    add, rows = Add(vector(seed=7)), Ablate(ROWS)
    return {
        "add to the stream": Plan([Intervention(add, "layers.1.output", strength=2.0), Intervention(add, "layers.1.input")]),
        "add to attention": Plan([Intervention(add, "layers.1.attn.output"), Intervention(add, "layers.2.attn.output", strength=-1.0)]),
        "add to the embedding": Plan([Intervention(add, "embed")]),
        "ablate in one map": Plan([Intervention(rows, "layers.1.attn.output", strength=0.7)]),
        "ablate everywhere": Plan([Intervention(rows, site) for site in WRITERS]),
        "all kinds": Plan(
            [
                Intervention(add, "embed"),
                Intervention(Clamp(vector(seed=4), 1.5), "layers.0.attn.output"),
                Intervention(Scale(ROWS[0], 3.0), "layers.1.attn.output"),
                Intervention(Add(vector(seed=5)), "layers.1.attn.output"),
            ]
        ),
    }


def refused(family: str, name: str) -> str | None:
    """What the error names when the family cannot carry the plan."""
    if family in SCALED and name in ("add to the embedding", "all kinds"):
        return "norm" if name == "all kinds" else "scales"
    if family in SANDWICH and name != "add to the embedding":
        return "norm"
    if family in MIXTURES and name == "add to the stream":
        return "mixture"
    return "experts" if family in MIXTURES and name == "ablate everywhere" else None


EVERYWHERE = ("add to the stream", "add to the embedding", "ablate everywhere")
CASES = [(family, name) for family in sorted(FAMILIES) for name in plans() if name in EVERYWHERE or family in ("llama", "gpt2", "falcon")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_plain_peft_does_what_the_plan_does(family, name, tiny, tmp_path):
    model, plan = tiny(family), plans()[name]
    plain, what = logits(model), refused(family, name)
    if what is not None:
        with pytest.raises(DeployError, match=what):
            steer.to_adapter(plan, model, tmp_path / "adapter")
        assert torch.equal(logits(model), plain) and not (tmp_path / "adapter").exists()
        return
    expected = steered(model, plan)
    folder = steer.to_adapter(plan, model, tmp_path / "adapter")
    assert torch.equal(logits(model), plain)
    adapted = loaded(model, folder)
    assert_close(logits(adapted), expected)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    assert not torch.allclose(expected, plain, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "name", "merges"),
    [
        ("llama", "ablate everywhere", True),  # no biases, untied
        ("llama", "add to the embedding", True),
        ("gpt2", "add to the stream", True),  # biases that are there
        ("gpt2", "ablate everywhere", True),  # tied, but its embedding is kept as a whole beside the biases
        ("llama", "add to the stream", False),
    ],
)
def test_merging_where_peft_can(family, name, merges, tiny, tmp_path):
    model, plan = tiny(family), plans()[name]
    expected = steered(model, plan)
    adapted = loaded(model, steer.to_adapter(plan, model, tmp_path))
    if not merges:
        with pytest.raises(RuntimeError, match="no bias"):
            adapted.merge_and_unload()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = adapted.merge_and_unload()
    assert_close(logits(merged), expected)
    assert not any("lora" in key for key in merged.state_dict())


def test_the_folder_is_small_and_says_what_it_is(tiny, tmp_path):
    model = tiny("llama")
    steer.to_adapter(plans()["ablate everywhere"], model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["r"] == config["lora_alpha"] == len(ROWS)
    assert len(config["target_modules"]) == 7 and "model.layers.2.mlp.down_proj" in config["target_modules"]
    steer.to_adapter(plans()["add to the embedding"], model, tmp_path)  # replaces it
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["model.embed_tokens"]


def test_an_adapter_can_be_trained_on_and_stacked(tiny, tmp_path):
    """It is an adapter like any other: a second one acts beside it."""
    model, plan = tiny("llama"), plans()["ablate in one map"]
    adapted = loaded(model, steer.to_adapter(plan, model, tmp_path))
    adapted.add_adapter("more", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    alone = logits(adapted)
    adapted.base_model.set_adapter(["default", "more"])
    assert not torch.equal(logits(adapted), alone)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Intervention(Add(vector()), "layers.1.attn.output", scope="response"), "scope 'response'"),
        (lambda: Intervention(Add(vector()), "layers.1.attn.output", roles=("policy", "reference")), "reference"),
        (lambda: Intervention(Ablate(vector()), "layers.1.output"), "ablate at embed"),
        (lambda: Intervention(Add(vector(96)), "logits"), "'logits'"),
    ],
)
def test_what_an_adapter_cannot_carry_is_refused_by_name(make, named, tiny, tmp_path):
    with pytest.raises(DeployError, match=named):
        steer.to_adapter(Plan(make()), tiny("llama"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_models_it_is_not_for(tiny, tmp_path):
    plan = plans()["ablate in one map"]
    adapted = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(DeployError, match="merge_and_unload"):
        steer.to_adapter(plan, adapted, tmp_path)
    with pytest.raises(WidthError):
        steer.to_adapter(Plan(Intervention(Add(vector(16)), "layers.1.attn.output")), tiny("llama"), tmp_path)


def test_names_are_those_of_the_model_inside_wrappers(tiny, tmp_path):
    model, plan = tiny("llama"), plans()["ablate in one map"]
    expected = steered(model, plan)
    steer.to_adapter(plan, torch.compile(model, backend="eager"), tmp_path)
    assert_close(logits(loaded(model, tmp_path)), expected)


@pytest.mark.parametrize("fails", range(6))
def test_an_adapter_that_cannot_be_written_leaves_the_old_one(fails, tiny, tmp_path, monkeypatch):
    """Two files in their temporary names, the two old ones moved away, the two new ones moved in: whichever step fails."""
    model = tiny("llama")
    steer.to_adapter(plans()["ablate in one map"], model, tmp_path)
    (tmp_path / "README.md").write_text("kept")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real, calls = os.replace, iter(range(99))

    def replace(source: Path, target: Path) -> None:
        if next(calls) == fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(StorageFullError):
            steer.to_adapter(plans()["add to attention"], model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    steer.to_adapter(plans()["add to attention"], model, tmp_path)
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert after.keys() == before.keys() and {name for name in after if after[name] == before[name]} == {"README.md"}


def test_a_new_adapter_that_cannot_be_written_leaves_nothing(tiny, tmp_path, monkeypatch):
    real, calls = os.replace, iter(range(99))

    def replace(source: Path, target: Path) -> None:
        if next(calls) == 3:  # the configuration, moved in last
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StorageFullError):
        steer.to_adapter(plans()["add to attention"], tiny("llama"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("killed_at", range(2, 6))
def test_a_killed_write_is_never_a_mixture_and_the_next_call_mends_it(killed_at, tiny, tmp_path, monkeypatch):
    model = tiny("llama")
    steer.to_adapter(plans()["ablate in one map"], model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real, calls = os.replace, iter(range(99))

    def replace(source: Path, target: Path) -> None:
        if next(calls) >= killed_at:  # a process that is gone puts nothing back
            raise OSError(errno.EIO, "killed")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(FileError):
            steer.to_adapter(plans()["add to attention"], model, tmp_path)
    assert killed_at == 2 or not (tmp_path / "adapter_config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(adapter_files, "atomic_write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(StorageFullError):
            steer.to_adapter(plans()["add to attention"], model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.real
def test_real_model(smollm2, tmp_path):
    """Tied embeddings and 61 maps, in a folder of about a megabyte."""
    model, tokenizer = smollm2
    batch = tokenizer("The capital of France is Paris, and the river that runs through it is the", return_tensors="pt")
    writers = ["embed", *(f"layers.{n}.{part}" for n in range(30) for part in ("attn.output", "mlp.output"))]
    plan = Plan([Intervention(Ablate(vector(576, 2)), site) for site in writers])
    with plan.attached(model):
        expected = model(**batch).logits
    plain = model(**batch).logits
    folder = steer.to_adapter(plan, model, tmp_path)
    assert (folder / "adapter_model.safetensors").stat().st_size < 1e6
    adapted = loaded(model, folder)
    actual = adapted(**batch).logits
    adapted.unload()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(model(**batch).logits, plain)
