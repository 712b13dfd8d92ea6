"""Files of other programs, made by hand as those programs write them (each form was checked against a file of the real program).

The numbers of every vector name its layer, so that a conversion that is off by one shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from hand import edited, ids
from method_tables import check_table
from torch import Tensor

import steer
from steer.directions.importer import IMPORTERS
from steer.errors import (
    ConfigError,
    DamagedFileError,
    FileError,
    NonFiniteError,
    SteerError,
    UnsafeFileError,
    WidthError,
    WrongKindError,
)
from steer.intervene import Add, Intervention, LoReFT, Plan

WIDTH, LAYERS = 8, 4


def layer(n: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((WIDTH,), float(n), dtype=dtype)


def values_by_site(directions: Any) -> dict[str, float]:
    """Site -> the number in every entry of its vector."""
    vectors = {str(site): direction.vector for site, direction in directions.items()}
    assert all(bool((vector == vector[0]).all()) and vector.dtype is torch.float32 for vector in vectors.values())
    return {site: float(vector[0]) for site, vector in vectors.items()}


# ---- one writer per format


def svec(path: Path, layers: range = range(1, LAYERS), **extra: Any) -> Path:
    content = {"model_type": "llama", "directions": {str(n): layer(n).tolist() for n in layers}}
    path.write_text(json.dumps({**content, "explained_variances": {str(n): 0.5 for n in layers}, **extra}))
    return path


def blocks(folder: Path, activations: Any) -> Path:
    """Attributes of a SteeringVector."""
    return saved(folder / "blocks.pt", {"layer_activations": activations, "layer_type": "decoder_block"})


def refused(folder: Path, **metadata: Any) -> Path:
    saved(folder / "direction.pt", layer(1))
    (folder / "direction_metadata.json").write_text(json.dumps({"layer": 1, "pos": -1, **metadata}))
    return folder


def control_vector(path: Path, n: int) -> Path:
    return steer.to_gguf(Plan(Intervention(Add(layer(1)), f"layers.{n}.output")), path, model_hint="llama")


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def refusal(folder: Path, n: int = 2) -> Path:
    saved(folder / "direction.pt", layer(n, torch.float64))
    (folder / "direction_metadata.json").write_text(json.dumps({"pos": -2, "layer": n}))
    return folder


def repsteer(folder: Path, tensors: dict[str, Tensor], component: str = "resid_post", n: int | None = 2, **manifest: Any) -> Path:
    folder.mkdir()
    model = {"architecture": manifest.pop("architecture", "LlamaForCausalLM"), "hidden_size": WIDTH, "id": "tiny", "revision": None}
    site = {"component": component, "io": "output", "layer": n, "stream": "language", "tensor_path": [], "unit": None}
    content = {"schema_version": "1.0", "artifact_type": "direction", "method": "diff_mean", "model": model, "site": site, **manifest}
    (folder / "manifest.json").write_text(json.dumps(content))
    safetensors.torch.save_file(tensors, folder / "tensors.safetensors")
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("manifest.json", "tensors.safetensors")}
    (folder / "checksums.json").write_text(json.dumps({"algorithm": "sha256", "files": hashes}))
    return folder


def pyvene(folder: Path, *interventions: tuple[int, str, str, dict[str, Tensor]], **fields: Any) -> Path:
    """Writes what pyvene saves. interventions: layer, component, class, state."""
    folder.mkdir()
    specs, kinds, keys = [], [], []
    for n, component, kind, state in interventions:
        specs.append([n, component, fields.get("unit", "pos"), 1, None, None, None, fields.get("partition"), *[None] * 6])
        kinds.append(f"<class '{kind}'>")
        where = f"comp_{component.replace('.', '_')}" if "." in component else f"layer_{n}_comp_{component}"
        keys.append(f"{where}_unit_pos_nunit_1#{sum(key.startswith(where) for key in keys)}")
        torch.save(state, folder / f"intkey_{keys[-1]}.bin")
    config = {"representations": specs, "intervention_types": kinds, "sorted_keys": keys, "mode": "parallel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def addition(n: float) -> dict[str, Tensor]:
    return {"embed_dim": torch.tensor(WIDTH), "interchange_dim": torch.tensor(WIDTH), "source_representation": layer(n)}


ADDITION, LOREFT = "pyvene.models.interventions.AdditionIntervention", "pyreft.interventions.LoreftIntervention"


# ---- sites


def test_cast_reads_after_the_block_and_after_the_final_norm_for_the_last(tmp_path):
    path = svec(tmp_path / "refusal.svec")
    read = steer.import_directions(path, n_layers=LAYERS)
    assert values_by_site(read) == {"layers.1.output": 1, "layers.2.output": 2, "final_norm": 3}
    assert read.name == "refusal" and read.provenance["imported"]["explained_variances"] == {"1": 0.5, "2": 0.5, "3": 0.5}
    assert values_by_site(steer.import_directions(path, site="layers.{layer}.input")) == {f"layers.{n}.input": n for n in (1, 2, 3)}
    with pytest.raises(ConfigError, match="n_layers"):
        steer.import_directions(path)
    with pytest.raises(DamagedFileError, match="0 to 1"):
        steer.import_directions(path, n_layers=2)


def test_persona_rows_are_hidden_states(tmp_path):
    """Row L goes into block L: the embedding first, the final norm last."""
    rows = torch.stack([layer(n + 1, torch.bfloat16) for n in range(LAYERS + 1)])  # row L has the value L + 1
    path = saved(tmp_path / "evil_response_avg_diff.pt", rows)
    expected = {"embed": 1, "layers.0.output": 2, "layers.1.output": 3, "layers.2.output": 4, "final_norm": 5}
    read = steer.import_directions(path, n_layers=LAYERS)
    assert values_by_site(read) == expected == values_by_site(steer.import_directions(path, "persona"))
    assert {direction.span for direction in read.values()} == {"response"}
    assert {direction.method for direction in read.values()} == {"mean_difference"}
    with pytest.raises(WidthError, match="5 rows|hidden-directions"):
        steer.import_directions(path, "persona", n_layers=LAYERS + 1)


def test_hidden_directions_rows_are_blocks(tmp_path):
    rows = torch.stack([layer(n + 1, torch.float16) for n in range(LAYERS)])
    path = saved(tmp_path / "v_pref.pt", rows)
    expected = {"layers.0.output": 1, "layers.1.output": 2, "layers.2.output": 3, "final_norm": 4}
    assert (
        values_by_site(steer.import_directions(path, n_layers=LAYERS))
        == expected
        == values_by_site(steer.import_directions(path, "hidden-directions"))
    )
    with pytest.raises(ConfigError, match="'persona'") as caught:  # the same numbers mean other sites there
        steer.import_directions(path)
    assert "n_layers=" in caught.value.remedy
    assert values_by_site(steer.import_directions(path, n_layers=LAYERS - 1))["embed"] == 1
    baked = saved(tmp_path / "advocate_bias.pt", {"bias": layer(2, torch.bfloat16), "layer": 2, "base_model": "tiny", "note": None})
    assert values_by_site(steer.import_directions(baked)) == {"layers.2.mlp.output": 2}


def test_zero_rows_are_left_out_and_said(tmp_path):
    rows = torch.stack([layer(n) for n in range(LAYERS)])  # row 0 is zero: the last prompt token has one embedding on both sides
    read = steer.import_directions(saved(tmp_path / "t_prompt_last_diff.pt", rows), "persona")
    assert "embed" not in values_by_site(read) and read.provenance["imported"]["left_out"] == ["embed"]
    assert next(iter(read.values())).span == "prompt_last"
    with pytest.raises(DamagedFileError, match="no vector"):
        steer.import_directions(saved(tmp_path / "zero.pt", torch.zeros(3, WIDTH)), "persona")


@pytest.mark.parametrize("options", [{"n_layers": 3.5}, {"n_layers": "3"}, {"n_layers": 0}, {"n_layers": True}])
def test_the_number_of_layers_is_a_whole_number(options, tmp_path):
    with pytest.raises(ConfigError, match="n_layers"):
        steer.import_directions(svec(tmp_path / "v.svec"), **options)


@pytest.mark.parametrize("site", ["layers.{}.output", "layers.{number}.output", "layers.{layer.output", "layers.1.output", 3])
def test_a_site_for_several_layers_has_their_place_in_it(site, tmp_path):
    with pytest.raises(ConfigError) as caught:
        steer.import_directions(blocks(tmp_path, {1: layer(1), 2: layer(2)}), site=site)
    assert "{layer}" in caught.value.remedy


def test_steering_vectors_keys_are_blocks(tmp_path):
    content = {"layer_activations": {n: layer(n) for n in (3, 1)}, "layer_type": "decoder_block"}
    assert values_by_site(steer.import_directions(saved(tmp_path / "v.pt", content))) == {"layers.3.output": 3, "layers.1.output": 1}
    mlp_file = saved(tmp_path / "mlp.pt", {**content, "layer_type": "mlp"})
    with pytest.raises(ConfigError, match="layer_type 'mlp'") as caught:
        steer.import_directions(mlp_file)
    assert "site=" in caught.value.remedy
    assert values_by_site(steer.import_directions(mlp_file, site="layers.{layer}.mlp.output")) == {
        "layers.3.mlp.output": 3,
        "layers.1.mlp.output": 1,
    }


def test_easyedit_files_are_blocks(tmp_path):
    folder = tmp_path / "caa_vector"
    for n in (1, 3):
        saved(folder / f"layer_{n}.pt", layer(n))
    assert values_by_site(steer.import_directions(folder)) == {"layers.1.output": 1, "layers.3.output": 3}
    assert values_by_site(steer.import_directions(folder / "layer_3.pt")) == {"layers.3.output": 3}
    saved(folder / "layer_3_merged_vector.pt", layer(9))
    with pytest.raises(ConfigError, match="layer_3_merged_vector.pt"):
        steer.import_directions(folder)
    with pytest.raises(WidthError, match="several concepts"):
        steer.import_directions(saved(tmp_path / "layer_2.pt", torch.ones(5, WIDTH)), "easyedit")
    with pytest.raises(DamagedFileError, match="dict"):
        steer.import_directions(saved(tmp_path / "lora" / "layer_2.pt", {"lora_A": layer(1)}), "easyedit")


def test_refusal_directions_go_into_the_block(tmp_path):
    folder = refusal(tmp_path / "run")
    for path in (folder, folder / "direction.pt"):
        read = steer.import_directions(path)
        assert values_by_site(read) == {"layers.2.input": 2} and read["layers.2.input"].span == -2
    (folder / "direction_metadata.json").write_text("{}")
    with pytest.raises(DamagedFileError, match="layer and pos"):
        steer.import_directions(folder)


@pytest.mark.parametrize(
    ("component", "architecture", "site"),
    [
        ("resid_post", "LlamaForCausalLM", "layers.2.output"),
        ("resid_pre", "LlamaForCausalLM", "layers.2.input"),
        ("head_result", "LlamaForCausalLM", "layers.2.attn.z"),
        ("attn_out", "LlamaForCausalLM", "layers.2.attn.output"),
        ("mlp_out", "Qwen2ForCausalLM", "layers.2.mlp.output"),
        ("attn_out", "Gemma2ForCausalLM", "module:layers.2.self_attn:output"),
        ("mlp_out", "Gemma2ForCausalLM", "module:layers.2.mlp:output"),
        ("resid_mid", "LlamaForCausalLM", "module:layers.2.post_attention_layernorm:input"),
        ("resid_mid", "Gemma2ForCausalLM", "module:layers.2.pre_feedforward_layernorm:input"),
    ],
)
def test_repsteer_sites(component, architecture, site, tmp_path, tiny):
    folder = repsteer(tmp_path / "artifact", {"direction": layer(2)}, component, architecture=architecture)
    read = steer.import_directions(folder)
    assert values_by_site(read) == {site: 2} and next(iter(read.values())).method == "diff_mean"
    family = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Gemma2ForCausalLM": "gemma2"}[architecture]
    assert steer.Anatomy.find(tiny(family)).point(site).module is not None  # it exists there


def test_repsteer_kinds_hashes_and_what_it_does_not_say(tmp_path):
    probe = repsteer(tmp_path / "probe", {"weight": layer(3)[None], "bias": torch.zeros(1)}, n=3, artifact_type="probe")
    assert values_by_site(steer.import_directions(probe)) == {"layers.3.output": 3}
    span = repsteer(tmp_path / "span", {"basis": torch.eye(WIDTH)[:2]}, artifact_type="subspace")
    with pytest.raises(WrongKindError, match="subspace"):
        steer.import_directions(span)
    unsaid = repsteer(tmp_path / "unsaid", {"direction": layer(2)}, "mlp_out", architecture=None)
    with pytest.raises(ConfigError, match="mlp_out"):
        steer.import_directions(unsaid)
    assert values_by_site(steer.import_directions(unsaid, site="layers.{layer}.mlp.output")) == {"layers.2.mlp.output": 2}
    altered = repsteer(tmp_path / "altered", {"direction": layer(2)})
    safetensors.torch.save_file({"direction": layer(7)}, altered / "tensors.safetensors")
    with pytest.raises(DamagedFileError, match="altered"):
        steer.import_directions(altered)


# ---- plans


def test_pyvene_components_and_additions(tmp_path):
    folder = pyvene(
        tmp_path / "pv",
        (0, "block_input", ADDITION, addition(1)),
        (2, "block_output", ADDITION, addition(2)),
        (2, "block_output", ADDITION.replace("Addition", "Subtraction"), addition(3)),
        (1, "attention_value_output", ADDITION, addition(4)),
        (9, "model.layers[3].output", ADDITION, addition(5)),
        (9, "model.layers[3].mlp.down_proj.input", ADDITION, addition(6)),
    )
    plan = steer.import_plan(folder, scope="prompt[-1:]")
    actual = [
        (str(intervention.site), float(intervention.operator.tensors["vector"][0, 0]), str(intervention.scope))
        for intervention in plan.interventions
    ]
    assert actual == [
        ("layers.0.input", 1, "prompt[-1:]"),
        ("layers.2.output", 2, "prompt[-1:]"),
        ("layers.2.output", -3, "prompt[-1:]"),
        ("layers.1.attn.z", 4, "prompt[-1:]"),
        ("layers.3.output", 5, "prompt[-1:]"),
        ("module:model.layers.3.mlp.down_proj:input", 6, "prompt[-1:]"),
    ]


def test_pyreft_does_what_its_formula_says(tiny, tmp_path):
    """LoReFT(h) = h + R^T (W h + b - R h), with R stored as [width, rank]."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(32, 2, generator=generator)).Q
    weight, bias = torch.randn(2, 32, generator=generator), torch.randn(2, generator=generator)
    folder = pyvene(tmp_path / "reft", (1, "block_output", LOREFT, {"weight": weight, "bias": bias, "rotate_layer": rotation}))
    plan, model = steer.import_plan(folder, scope="all"), tiny("llama")
    assert isinstance(plan.interventions[0].operator, LoReFT)
    with torch.no_grad():
        with plan.attached(model):
            got = model(ids()).logits
        with edited(model.model.layers[1], lambda h: h + (h @ weight.mT + bias - h @ rotation) @ rotation.mT):
            expected = model(ids()).logits
    assert torch.allclose(got, expected, atol=1e-5)


def test_what_a_pyvene_folder_does_not_hold_is_asked_for_or_refused(tmp_path):
    folder = pyvene(tmp_path / "mlp", (2, "mlp_output", ADDITION, addition(2)))
    with pytest.raises(ConfigError, match="mlp_output"):
        steer.import_plan(folder, scope="all")
    assert str(steer.import_plan(folder, scope="all", site="layers.{layer}.mlp.output").interventions[0].site) == "layers.2.mlp.output"
    with pytest.raises(WrongKindError, match="import_plan"):
        steer.import_directions(folder)
    with pytest.raises(WrongKindError, match="import_directions"):
        steer.import_plan(refusal(tmp_path / "run"), scope="all")
    rotated = pyvene(tmp_path / "das", (2, "block_output", "pyvene.models.interventions.RotatedSpaceIntervention", {}))
    with pytest.raises(WrongKindError, match="RotatedSpaceIntervention"):
        steer.import_plan(rotated, scope="all")
    half = pyvene(tmp_path / "half", (2, "block_output", ADDITION, addition(2) | {"interchange_dim": torch.tensor(4)}))
    with pytest.raises(ConfigError, match="first 4"):
        steer.import_plan(half, scope="all")
    heads = pyvene(tmp_path / "heads", (2, "block_output", ADDITION, addition(2)), unit="h.pos")
    with pytest.raises(ConfigError, match="h.pos"):
        steer.import_plan(heads, scope="all")
    (folder / "intkey_layer_2_comp_mlp_output_unit_pos_nunit_1#0.bin").rename(folder / "intkey_other.bin")
    with pytest.raises(DamagedFileError, match="intkey_layer_2"):
        steer.import_plan(folder, scope="all", site="layers.{layer}.mlp.output")


# ---- nothing but vectors


def bare_files(folder: Path, content: Any) -> list[Path]:
    """The same vectors in every form that people keep them in. content: one vector, or vectors by name."""
    named = content if isinstance(content, dict) else {"layer_2": content}
    folder.mkdir()
    np.savez(folder / "v.npz", **{name: vector.numpy() for name, vector in named.items()})
    np.savez_compressed(folder / "w.npz", **{name: vector.numpy() for name, vector in named.items()})
    safetensors.torch.save_file(named, folder / "v.safetensors")
    torch.save(named, folder / "named.pt")
    torch.save(named, folder / "old.pt", _use_new_zipfile_serialization=False)
    if not isinstance(content, dict):
        torch.save(content, folder / "one.pt")
        np.save(folder / "one.npy", content.numpy())
        np.save(folder / "row.npy", content.double().numpy()[None].astype(">f8"))
    return sorted(folder.iterdir())


def test_one_vector_goes_to_the_site_that_is_named(tmp_path):
    files = bare_files(tmp_path / "one", layer(2))
    assert len(files) == 8
    for file in files:
        assert values_by_site(steer.import_directions(file, site="layers.2.input")) == {"layers.2.input": 2}, file
        with pytest.raises(ConfigError, match="does not say at which tensor its vectors belong"):
            steer.import_directions(file)
    for file in (tmp_path / "one" / "one.pt", tmp_path / "one" / "one.npy"):
        with pytest.raises(ConfigError, match="to which layer"):
            steer.import_directions(file, site="layers.{layer}.output")


@pytest.mark.parametrize("key", ["{}", "layer_{}", "layer-{}", "model.layers.{}.mlp"])
def test_vectors_by_layer_go_where_the_pattern_says(key, tmp_path):
    for file in bare_files(tmp_path / "several", {key.format(n): layer(n) for n in (3, 12)}):
        assert values_by_site(steer.import_directions(file, site="layers.{layer}.output")) == {"layers.3.output": 3, "layers.12.output": 12}
        with pytest.raises(ConfigError, match="{layer}"):
            steer.import_directions(file, site="layers.3.output")
        with pytest.raises(DamagedFileError, match="0 to 5"):
            steer.import_directions(file, site="layers.{layer}.output", n_layers=6)
    by_number = saved(tmp_path / "v.pt", {18: layer(3)})
    with pytest.raises(ConfigError, match=r"^'v.pt' does not say at which tensor(.|\n)*under 18(.|\n)*'layers.\{layer\}.output'"):
        steer.import_directions(by_number)
    by_number = saved(tmp_path / "v.pt", {3: layer(3), 12: layer(12)[None]})
    assert values_by_site(steer.import_directions(by_number, site="layers.{layer}.input")) == {"layers.3.input": 3, "layers.12.input": 12}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"layer_1": layer(1), "1": layer(2)}, DamagedFileError),
        ({"layer_1_of_4": layer(1), "layer_2_of_4": layer(2)}, ConfigError),
        ({"warm": layer(1), "cold": layer(2)}, ConfigError),
        ({-1: layer(1), 2: layer(2)}, DamagedFileError),
        ({"layer_-1": layer(1), "2": layer(2)}, DamagedFileError),
        ({1: layer(1), 2: torch.ones(WIDTH, dtype=torch.long)}, WrongKindError),
        ({1: layer(1), "scale": 2.0}, WrongKindError),
        ({}, WrongKindError),
        (torch.ones(2, 3, WIDTH), WrongKindError),
        (torch.tensor(1.0), WrongKindError),
        ([layer(1)], WrongKindError),
        ({1: torch.zeros(WIDTH)}, DamagedFileError),
        ({1: layer(float("nan")), 2: layer(1)}, NonFiniteError),
    ],
)
def test_what_is_not_one_vector_a_layer(content, error, tmp_path):
    with pytest.raises(error) as caught:
        steer.import_directions(saved(tmp_path / "v.pt", content), site="layers.{layer}.output")
    assert str(caught.value.remedy)


def control_vector_of(path: Path, kind: gguf.GGMLQuantizationType, vector: Tensor) -> Path:
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_tensor("direction.3", gguf.quants.quantize(vector.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_control_vectors_of_every_type(kind, tmp_path):
    vector = torch.linspace(-1, 1, 64)
    path = control_vector_of(tmp_path / "v.gguf", gguf.GGMLQuantizationType[kind], vector)
    [(site, direction)] = steer.import_directions(path).items()
    assert str(site) == "layers.3.output" and torch.allclose(direction.vector, vector, atol=0.1 if kind[:2] == "Q4" else 0.04)


# ---- recognition, and broken files


@dataclass
class Pickled:
    """Stand-in for the objects that users of steering-vectors pickle."""

    layer_activations: dict[int, Tensor]
    layer_type: str = "decoder_block"


def test_a_pickled_object_is_not_opened(tmp_path):
    path = saved(tmp_path / "v.pt", Pickled({1: layer(1)}))
    for name in (None, "steering-vectors"):
        with pytest.raises(UnsafeFileError, match="Pickled") as caught:
            steer.import_directions(path, name)
    assert "vars(" in caught.value.remedy
    assert values_by_site(steer.import_directions(saved(tmp_path / "w.pt", vars(Pickled({1: layer(1)}))))) == {"layers.1.output": 1}


def good_files(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """A good file of every format, and the arguments that it needs."""
    control_vector = steer.to_gguf(Plan(Intervention(Add(layer(2)), "layers.2.output")), folder / "v.gguf", model_hint="llama")
    return {
        "bare": (saved(folder / "vector.pt", layer(2)), {"site": "layers.2.output"}),
        "cast": (svec(folder / "v.svec"), {"n_layers": LAYERS}),
        "easyedit": (saved(folder / "layers" / "layer_2.pt", layer(2)).parent, {}),
        "gguf": (control_vector, {}),
        "hidden-directions": (saved(folder / "h.pt", torch.stack([layer(n + 1) for n in range(LAYERS)])), {"n_layers": LAYERS}),
        "persona": (saved(folder / "p.pt", torch.stack([layer(n + 1) for n in range(LAYERS + 1)])), {"n_layers": LAYERS}),
        "pyvene": (pyvene(folder / "pv", (2, "block_output", ADDITION, addition(2))), {"scope": "all"}),
        "refusal": (refusal(folder / "run"), {}),
        "repsteer": (repsteer(folder / "artifact", {"direction": layer(2)}), {}),
        "steering-vectors": (saved(folder / "s.pt", {"layer_activations": {2: layer(2)}, "layer_type": "decoder_block"}), {}),
    }


def test_every_format_is_recognised_by_its_content_alone(tmp_path):
    files = good_files(tmp_path)
    check_table(IMPORTERS, files, "`good_files` of tests/directions/test_foreign.py", "what writes a good file, and the arguments it needs")
    for name, (path, arguments) in files.items():
        read = steer.import_plan if IMPORTERS.get(name).makes == "plan" else steer.import_directions
        told, named = read(path, **arguments), read(path, name, **arguments)
        assert type(told) is type(named)
        if name != "pyvene":
            assert values_by_site(told) == values_by_site(named)
            again = steer.Directions.load(told.save(tmp_path / f"{name}.safetensors"))
            assert values_by_site(again) == values_by_site(told) and again.provenance == told.provenance
        rest = [format_name for format_name, (file, needed) in files.items() if format_name != name]
        for format_name in rest:
            if {name, format_name} == {"persona", "hidden-directions"}:
                continue  # both are one matrix; the number of layers tells them apart
            with pytest.raises(WrongKindError, match=f"'{format_name}'"):
                read(path, format_name, **arguments)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda folder: folder / "nowhere", FileError),
        (lambda folder: folder, WrongKindError),
        (lambda folder: saved(folder / "v.pt", torch.ones(WIDTH)), ConfigError),
        (lambda folder: saved(folder / "v.pt", {"what": 1}), WrongKindError),
        (lambda folder: svec(folder / "v.svec", directions={"1": ["a"]}), DamagedFileError),
        (lambda folder: svec(folder / "v.svec", directions={"1": [[1.0, 2.0]]}), WidthError),
        (lambda folder: svec(folder / "v.svec", directions={"1": [1.0, float("nan")]}), NonFiniteError),
        (
            lambda folder: saved(folder / "v.pt", {"layer_activations": {1: layer(float("inf"))}, "layer_type": "decoder_block"}),
            NonFiniteError,
        ),
        (lambda folder: svec(folder / "v.svec", directions={"x": [1.0]}), DamagedFileError),
        (lambda folder: svec(folder / "v.svec", directions=None), DamagedFileError),
        (lambda folder: svec(folder / "v.svec", explained_variances={"1": "much"}), DamagedFileError),
        (lambda folder: svec(folder / "v.svec", directions={"1": [1.0], "2": [1.0, 2.0]}), WidthError),
        (lambda folder: blocks(folder, {"a": layer(1)}), DamagedFileError),
        (lambda folder: blocks(folder, {-1: layer(1)}), DamagedFileError),
        (lambda folder: blocks(folder, {LAYERS: layer(1)}), DamagedFileError),
        (lambda folder: blocks(folder, {1: [1.0, 2.0]}), DamagedFileError),
        (lambda folder: blocks(folder, {1: layer(1), 2: torch.ones(WIDTH + 1)}), WidthError),
        (lambda folder: blocks(folder, [layer(1)]), DamagedFileError),
        (lambda folder: saved(folder / "v" / f"layer_{LAYERS}.pt", layer(1)).parent, DamagedFileError),
        (lambda folder: refused(folder / "v", layer="a"), DamagedFileError),
        (lambda folder: refused(folder / "v", pos=None), DamagedFileError),
        (lambda folder: control_vector(folder / "v.gguf", LAYERS), DamagedFileError),
    ],
)
def test_files_that_hold_no_vectors(make: Callable[[Path], Path], error: type[SteerError], tmp_path):
    with pytest.raises(error) as caught:
        steer.import_directions(make(tmp_path), n_layers=LAYERS)
    assert str(caught.value.remedy)
    if error is WrongKindError:
        assert all(f"'{name}'" in str(caught.value) for name in IMPORTERS)


@pytest.mark.parametrize("name", ["cast", "hidden-directions", "repsteer", "refusal", "steering-vectors"])
def test_files_cut_short(name, tmp_path):
    path, arguments = good_files(tmp_path)[name]
    cut = {"repsteer": path / "tensors.safetensors", "refusal": path / "direction.pt"}.get(name, path)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(DamagedFileError):
        steer.import_directions(path, **arguments)


def test_imported_directions_steer_but_have_no_metrics(tiny, tmp_path):
    path = saved(tmp_path / "v.pt", {"layer_activations": {1: torch.ones(32)}, "layer_type": "decoder_block"})
    read, model = steer.import_directions(path), tiny("llama")
    with torch.no_grad():
        with Plan([Intervention(Add(direction.vector), site) for site, direction in read.items()]).attached(model):
            got = model(ids()).logits
        with edited(model.model.layers[1], lambda h: h + 1.0):
            assert torch.allclose(got, model(ids()).logits, atol=1e-5)
    for call in (read.best, lambda: read["layers.1.output"].relative_dose(1.0)):
        with pytest.raises(ConfigError, match="not measured"):
            call()
