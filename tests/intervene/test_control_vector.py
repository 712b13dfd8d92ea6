"""GGUF control vectors out and in, and the file of lm-eval: what the other program would do with them, written out by hand."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hand import edited, ids, vector

import steer
from steer.errors import ConfigError, DamagedFileError, DeployError, SiteError, StorageFullError, WrongKindError
from steer.intervene import OPERATORS, Ablate, AblateThenAdd, Add, Clamp, Intervention, Plan

SIX = torch.full((32,), 6.0)


def plan(*interventions: Intervention, **fingerprint: Any) -> Plan:
    return Plan(list(interventions), fingerprint=fingerprint or None)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {tensor.name: tensor.data for tensor in reader.tensors}


def test_the_number_of_a_direction_is_the_block_whose_output_it_is_added_to(tmp_path):
    """Values name their layers, so that a shift by one shows."""
    steering = plan(
        Intervention(Add(torch.full((32,), 1.0)), "layers.1.output"),
        Intervention(Add(torch.full((32,), 1.0)), "layers.2.output", strength=2.0),
        Intervention(Add(torch.full((32,), 3.0)), "layers.4.input"),  # the same tensor as layers.3.output
    )
    path = steer.to_gguf(steering, tmp_path / "vector.gguf", model_hint="llama")
    keys, tensors = read(path)
    assert keys == {"general.architecture": "controlvector", "controlvector.model_hint": "llama", "controlvector.layer_count": 3}
    assert {name: (data.dtype, data.shape, float(data[0])) for name, data in tensors.items()} == {
        f"direction.{n}": (np.float32, (32,), float(n)) for n in (1, 2, 3)
    }
    back = steer.import_directions(path)
    assert {str(site): float(direction.vector[0]) for site, direction in back.items()} == {
        f"layers.{n}.output": float(n) for n in (1, 2, 3)
    }
    assert back.provenance["imported"]["model_hint"] == "llama"


def test_there_and_back_is_the_same_model(tiny, tmp_path):
    """repeng steers in this way: a hook on the output of block n adds direction.n."""
    model = tiny("llama")
    steering = plan(Intervention(Add(vector()), "layers.1.output", strength=0.5), Intervention(Add(vector(seed=2)), "layers.2.output"))
    path = steer.to_gguf(steering, tmp_path / "vector.gguf", model_hint="llama")
    _, tensors = read(path)
    with torch.no_grad():
        with steering.attached(model):
            expected = model(ids()).logits
        first, second = (torch.from_numpy(tensors[f"direction.{n}"].copy()) for n in (1, 2))
        with edited(model.model.layers[1], lambda h: h + first), edited(model.model.layers[2], lambda h: h + second):
            by_hand = model(ids()).logits
        again = Plan([Intervention(Add(direction.vector), site) for site, direction in steer.import_directions(path).items()])
        with again.attached(model):
            back = model(ids()).logits
    assert torch.allclose(by_hand, expected, atol=1e-5) and torch.allclose(back, expected, atol=1e-5)


def test_additions_to_one_layer_add_up_and_the_fingerprint_knows_the_model(tmp_path):
    half = Intervention(Add(SIX / 2), "layers.-1.output")
    path = steer.to_gguf(plan(half, Intervention(Add(SIX), "layers.5.output"), model_type="qwen2", n_layers=6), tmp_path / "v.gguf")
    keys, tensors = read(path)
    assert keys["controlvector.model_hint"] == "qwen2" and list(tensors) == ["direction.5"] and float(tensors["direction.5"][0]) == 9.0


@pytest.mark.parametrize(
    ("intervention", "named"),
    [
        (Intervention(Add(SIX), "layers.0.output"), "block 0"),
        (Intervention(Add(SIX), "embed"), "embed"),
        (Intervention(Add(SIX), "layers.1.input"), "block 0"),
        (Intervention(Add(SIX), "layers.-1.output"), "unknown depth"),
        (Intervention(Add(SIX), "layers.2.mlp.output"), "mlp.output"),
        (Intervention(Ablate(SIX), "layers.2.output"), "'ablate'"),
        (Intervention(Add(SIX), "layers.2.output", scope="generated"), "scope 'generated'"),
        (Intervention(Add(SIX), "layers.2.output", phases=("train",)), "only train"),
    ],
)
def test_what_a_control_vector_cannot_carry(intervention, named, tmp_path):
    with pytest.raises(DeployError, match=named):
        steer.to_gguf(plan(intervention), tmp_path / "v.gguf", model_hint="llama")
    assert not (tmp_path / "v.gguf").exists()


def test_generation_is_all_that_llama_cpp_does(tmp_path):
    intervention = Intervention(Add(SIX), "layers.2.output", phases=("generate",))
    assert steer.to_gguf(plan(intervention), tmp_path / "v.gguf", model_hint="llama").is_file()
    with pytest.raises(DeployError, match="1 to 2"):
        steer.to_gguf(plan(Intervention(Add(SIX), "layers.3.output"), model_type="llama", n_layers=3), tmp_path / "w.gguf")
    with pytest.raises(ConfigError, match="model_hint"):
        steer.to_gguf(plan(intervention), tmp_path / "w.gguf")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    steering, path = plan(Intervention(Add(SIX), "layers.2.output")), tmp_path / "new" / "v.gguf"
    before = steer.to_gguf(steering, path, model_hint="llama").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
        with pytest.raises(StorageFullError, match="v.gguf"):
            steer.to_gguf(steering, path, model_hint="llama")
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["v.gguf"]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))  # the system's temporary folder is not needed
    assert steer.to_gguf(steering, tmp_path / "w.gguf", model_hint="llama").read_bytes() == before


def written(path: Path, architecture: str, name: str, data: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_other_and_broken_gguf_files(tmp_path):
    values = np.ones(4, dtype=np.float32)
    with pytest.raises(WrongKindError, match="'llama'"):
        steer.import_directions(written(tmp_path / "model.gguf", "llama", "direction.1", values))
    with pytest.raises(DamagedFileError, match="I8"):
        steer.import_directions(written(tmp_path / "whole.gguf", "controlvector", "direction.1", values.astype(np.int8)))
    with pytest.raises(DamagedFileError, match="direction.<n>"):
        steer.import_directions(written(tmp_path / "named.gguf", "controlvector", "vector", values))
    zero = written(tmp_path / "zero.gguf", "controlvector", "direction.0", values)  # repeng writes it, llama.cpp refuses it
    assert list(map(str, steer.import_directions(zero))) == ["layers.0.output"]
    content = steer.to_gguf(plan(Intervention(Add(SIX), "layers.2.output")), tmp_path / "v.gguf", model_hint="llama").read_bytes()
    (tmp_path / "half.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedFileError):
        steer.import_directions(tmp_path / "half.gguf")


# ---- lm-eval


def as_lm_eval(path: Path, model: Any) -> Any:
    """What lm-eval 0.4.13 does with the file: a hook on each module of the decoder that it names."""
    named = dict(model.base_model.named_modules())
    for hookpoint, entry in torch.load(path, weights_only=True).items():
        assert entry["bias"] is None and entry["head_index"] is None
        v, c = entry["steering_vector"], entry["steering_coefficient"]

        def add(h: torch.Tensor, v: torch.Tensor = v, c: float = c) -> torch.Tensor:
            return h + c * v

        def clamp(h: torch.Tensor, v: torch.Tensor = v, c: float = c) -> torch.Tensor:
            return h - (h @ (v / v.norm()))[..., None] * v / v.norm() + c * v / v.norm()

        yield edited(named[hookpoint], {"add": add, "clamp": clamp}[entry["action"]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "falcon"])
def test_lm_eval_does_what_the_plan_does(family, tiny, tmp_path):
    model = tiny(family)
    steering = plan(
        Intervention(Add(vector()), "layers.1.output", strength=2.0),
        Intervention(Add(vector(seed=2)), "layers.2.input"),  # the same tensor: one entry
        Intervention(Ablate(vector(seed=3)), "layers.0.attn.output"),
        Intervention(Clamp(vector(seed=4), -1.5), "layers.2.mlp.output"),
        Intervention(AblateThenAdd(vector(seed=5)), "layers.0.output"),
    )
    path = steer.to_lm_eval(steering, model, tmp_path / "steer.pt")
    with torch.no_grad():
        with steering.attached(model):
            expected = model(ids()).logits
        hooks = list(as_lm_eval(path, model))
        assert len(hooks) == 4
        for hook in hooks:
            hook.__enter__()
        actual = model(ids()).logits
        for hook in hooks:
            hook.__exit__(None, None, None)
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("interventions", "named"),
    [
        ([Intervention(Add(vector()), "embed")], "embed"),
        ([Intervention(Add(vector()), "layers.1.attn.z")], "attn.z"),
        ([Intervention(Ablate(torch.stack([vector(), vector(seed=5)])), "layers.1.output")], "rank 2"),
        ([Intervention(Ablate(vector()), "layers.1.output", strength=0.5)], "rank 1"),
        ([Intervention(Ablate(vector()), "layers.1.output"), Intervention(Add(vector()), "layers.1.output")], "several edits"),
        ([Intervention(Add(vector(16)), "layers.1.output")], "width 16"),
        ([Intervention(Add(vector()), "layers.1.output", scope="prompt")], "scope 'prompt'"),
    ],
)
def test_what_lm_eval_cannot_carry(interventions, named, tiny, tmp_path):
    with pytest.raises(DeployError, match=named):
        steer.to_lm_eval(plan(*interventions), tiny("llama"), tmp_path / "steer.pt")


def test_lm_eval_knows_the_form_by_the_ending_and_the_model_its_layers(tiny, tmp_path):
    intervention = Intervention(Add(vector()), "layers.7.output")
    with pytest.raises(ConfigError, match=r"\.pt"):
        steer.to_lm_eval(plan(intervention), tiny("llama"), tmp_path / "steer.bin")
    with pytest.raises(SiteError, match="out of range"):
        steer.to_lm_eval(plan(intervention), tiny("llama"), tmp_path / "steer.pt")


@pytest.mark.parametrize("export", ["gguf", "lm_eval", "bake"])
def test_an_edit_that_only_says_that_it_is_affine_is_refused_by_name(export, tiny, tmp_path, monkeypatch):
    OPERATORS.load()
    monkeypatch.setattr(OPERATORS, "_entries", dict(OPERATORS._entries))

    @OPERATORS.register("bounded")
    class Bounded(Add):
        additive = False

        def delta(self, h, strength, per_row):
            return strength * torch.tanh(h)

    @OPERATORS.register("near_zero")
    class NearZero(Ablate):
        def change(self, x, strength, per_row):
            return -strength * x.clamp(-50, 50)

    for operator in (Bounded(vector()), NearZero(vector())):
        steering = plan(Intervention(operator, "layers.1.output"))
        with pytest.raises(ConfigError, match=f"operator '{operator.name}' says that it is `is_affine`, and its edit is none"):
            if export == "gguf":
                steer.to_gguf(steering, tmp_path / "vector.gguf", model_hint="llama")
            elif export == "lm_eval":
                steer.to_lm_eval(steering, tiny("llama"), tmp_path / "steer.pt")
            else:
                steer.bake(steering, tiny("llama"), savable=False)
    assert not list(tmp_path.iterdir())
