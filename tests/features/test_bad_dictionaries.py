"""Damaged and mislabelled files of dictionaries end in typed errors that name file, key, expected and found."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from features.dictionary_files import (
    Case,
    D,
    N,
    circuit_tracer,
    circuit_tracer_clt,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    gemma_scope_2_layers,
    llama_scope,
    openai,
    qwen_scope,
    saelens,
    sparsify,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import steer
from steer.errors import ConfigError, DamagedFileError, FileError, NonFiniteError, SiteError, UnsafeFileError, WidthError, WrongKindError
from steer.features import Untrained


def edited_json(path: Path, **changes: object) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edited_tensors(path: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def edited_torch(path: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def fails(path: Path, error: type[Exception], *said: str, **arguments: object) -> None:
    with pytest.raises(error) as caught:
        steer.load_dictionary(path, **arguments).encode(torch.zeros(1, D))
    for text in said:
        assert text in str(caught.value)


def own(folder: Path) -> Case:
    case = saelens(folder / "foreign", "standard")
    steer.load_dictionary(case.path).save(folder / "own")
    return replace(case, path=folder / "own")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = saelens(tmp_path, "jumprelu").path
    edited_tensors(path / "sae_weights.safetensors", lambda tensors: tensors.pop("threshold"))
    fails(path, DamagedFileError, str(path), "'threshold'", "W_enc")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    path = saelens(tmp_path, "standard").path
    edited_tensors(path / "sae_weights.safetensors", lambda tensors: tensors.update(W_dec=tensors["W_dec"].T))
    fails(path, DamagedFileError, str(path), "'W_dec'", f"[{N}, {D}]", f"[{D}, {N}]")


def test_a_matrix_the_wrong_way_round_is_no_dictionary(tmp_path: Path) -> None:
    path = dictionary_learning(tmp_path, "BatchTopKSAE").path
    edited_torch(path / "ae.pt", lambda tensors: tensors.update({"decoder.weight": tensors["decoder.weight"].T}))
    fails(path, DamagedFileError, "'decoder.weight'", f"[{D}, {N}]", f"[{N}, {D}]")


def test_a_tensor_that_is_not_used_is_not_passed_over(tmp_path: Path) -> None:
    path = sparsify(tmp_path, "sae").path
    edited_tensors(path / "sae.safetensors", lambda tensors: tensors.update(W_skip=torch.zeros(D, D)))
    fails(path, WrongKindError, "W_skip")


@pytest.mark.parametrize("key", ["b_enc", "W_enc"])
def test_numbers_that_are_not_finite(tmp_path: Path, key: str) -> None:
    path = saelens(tmp_path, "standard").path
    edited_tensors(path / "sae_weights.safetensors", lambda tensors: tensors[key].view(-1)[-1:].fill_(float("nan")))
    fails(path, NonFiniteError, f"'{key}'", "sae_weights" if key == "W_enc" else str(path))


def test_a_row_that_is_not_finite_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = saelens(tmp_path, "standard").path
    edited_tensors(path / "sae_weights.safetensors", lambda tensors: tensors["W_enc"][:, 7].fill_(float("inf")))
    dictionary = steer.load_dictionary(path)
    assert bool(dictionary.encode_selected(torch.ones(1, D), [3]).isfinite().all())
    with pytest.raises(NonFiniteError, match="W_enc"):
        dictionary.encode_selected(torch.ones(1, D), [7])


def test_a_file_that_changes_while_it_is_used(tmp_path: Path) -> None:
    path = saelens(tmp_path, "standard").path
    dictionary = steer.load_dictionary(path)
    edited_tensors(path / "sae_weights.safetensors", lambda tensors: tensors.update(W_enc=torch.zeros(D, N + 1)))
    with pytest.raises(DamagedFileError, match="has changed"):
        dictionary.encode_selected(torch.ones(1, D), [3])


def test_truncated_files(tmp_path: Path) -> None:
    weights = saelens(tmp_path / "a", "standard").path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    fails(weights.parent, DamagedFileError, str(weights))
    npz = gemma_scope(tmp_path / "b").path / "params.npz"
    npz.write_bytes(npz.read_bytes()[:-40])
    fails(npz.parent, DamagedFileError, str(npz))
    (tmp_path / "a" / "cfg.json").write_text("{")
    fails(tmp_path / "a", DamagedFileError, "cfg.json")


def test_pickles_are_refused(tmp_path: Path) -> None:
    class Loaded:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "run",))

    path = dictionary_learning(tmp_path, "AutoEncoder").path
    torch.save({"bias": Loaded()}, path / "ae.pt")
    fails(path, UnsafeFileError, "ae.pt")
    (saelens(tmp_path / "sae", "standard").path / "sae_weights.safetensors").write_bytes(pickle.dumps(Loaded(), 4))
    fails(tmp_path / "sae", UnsafeFileError, "sae_weights.safetensors")
    assert not (tmp_path / "run").exists()


def test_objects_in_numpy_files_are_refused(tmp_path: Path) -> None:
    path = gemma_scope(tmp_path).path
    np.savez(path / "params.npz", W_enc=np.array([{}], dtype=object))
    fails(path, UnsafeFileError, "params.npz")


@pytest.mark.parametrize("architecture", ["matching_pursuit", "temporal", "of_the_future"])
def test_architectures_that_are_not_read(tmp_path: Path, architecture: str) -> None:
    path = saelens(tmp_path, "standard").path
    edited_json(path / "cfg.json", architecture=architecture)
    fails(path, WrongKindError, architecture, "jumprelu")


def test_other_things_that_are_not_read(tmp_path: Path) -> None:
    path = saelens(tmp_path / "a", "standard", normalize_activations="covariance_whitening").path
    fails(path, WrongKindError, "covariance_whitening")
    path = dictionary_learning(tmp_path / "b", "AutoEncoder").path
    edited_json(path / "config.json", trainer={"dict_class": "CrossCoder"})
    fails(path, WrongKindError, "CrossCoder")
    path = sparsify(tmp_path / "c", "sae").path
    edited_json(path / "cfg.json", signed=True)
    fails(path, WrongKindError, "signed")
    path = gemma_scope_2(tmp_path / "d", "sae").path
    edited_json(path / "config.json", architecture="topk")
    fails(path, WrongKindError, "topk")
    path = llama_scope(tmp_path / "e", "jumprelu").path
    edited_json(path / "hyperparams.json", norm_activation="token-wise")
    fails(path, WrongKindError, "token-wise")


@pytest.mark.parametrize(("key", "value"), [("d_sae", "20"), ("d_in", True), ("d_sae", ...), ("k", 0)])
def test_wrong_numbers_in_a_configuration(tmp_path: Path, key: str, value: object) -> None:
    path = saelens(tmp_path, "topk").path
    edited_json(path / "cfg.json", **{key: value})
    fails(path, DamagedFileError, f"'{key}'")


def test_a_configuration_of_another_dictionary(tmp_path: Path) -> None:
    path = saelens(tmp_path, "standard").path
    edited_json(path / "cfg.json", d_sae=N + 1)
    fails(path, DamagedFileError, "'W_enc'", f"[{D}, {N + 1}]", f"[{D}, {N}]")


@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_mid", "hook_embed", "blocks.2.hook_mlp_in", "blocks.2.mlp.hook_out", "None"])
def test_a_hook_that_does_not_say_which_tensor_is_meant(tmp_path: Path, hook: str) -> None:
    path = saelens(tmp_path, "standard").path
    edited_json(path / "cfg.json", metadata={"hook_name": hook})
    fails(path, ConfigError, hook, "reads=")
    site = "module:model.layers.2.post_attention_layernorm:input"
    assert [str(site) for site in steer.load_dictionary(path, reads=site).reads] == [site]


def test_what_the_caller_has_to_say(tmp_path: Path) -> None:
    fails(saelens(tmp_path / "a", "standard", normalize_activations=True).path, ConfigError, "norm_factor=")
    fails(gemma_scope(tmp_path / "b", "transcoders").path, ConfigError, "gain=")
    fails(qwen_scope(tmp_path).path, ConfigError, "layer=", "0, 1")
    fails(circuit_tracer(tmp_path / "c", "relu").path, ConfigError, "layer=", "0, 1")
    fails(circuit_tracer_clt(tmp_path / "d", "relu").path, ConfigError, "reads=", "hook_resid_mid")
    (tmp_path / "e").mkdir()
    (gemma_scope(tmp_path / "f").path / "params.npz").rename(tmp_path / "e" / "params.npz")
    fails(tmp_path / "e", ConfigError, "reads=")
    openai(tmp_path / "g", "ReLU").path.rename(tmp_path / "7.pt")
    fails(tmp_path / "7.pt", ConfigError, "reads=")
    fails(saelens(tmp_path / "h", "standard").path, SiteError, "layer 12", reads="layer 12")


def test_a_gain_of_another_width(tmp_path: Path) -> None:
    fails(gemma_scope(tmp_path, "transcoders").path, WidthError, "gain", f"[{D}]", gain=torch.ones(D + 1))


def test_layers_that_are_missing(tmp_path: Path) -> None:
    path = gemma_scope_2_layers(tmp_path / "a", "crosscoder").path
    (path / "params_layer_1.safetensors").unlink()
    fails(path, DamagedFileError, "params_layer")
    path = gemma_scope_2_layers(tmp_path / "b", "crosscoder").path
    (path / "params_layer_2.safetensors").unlink()
    fails(path, DamagedFileError, "{5,9,12}", "2 files")
    path = circuit_tracer_clt(tmp_path / "c", "relu").path
    (path / "W_dec_1.safetensors").unlink()
    fails(path, DamagedFileError, "W_dec_1", reads="layers.{layer}.mlp.input")


def test_places_where_no_dictionary_is(tmp_path: Path) -> None:
    fails(tmp_path / "nothing", FileError, "no dictionary at")
    fails("smollm2-135m-sae12", FileError, "did you mean 'smollm2-135m-sae-12'")
    fails(tmp_path, WrongKindError, "no dictionary that can be read", "cfg.json")
    fails(saelens(tmp_path / "a", "standard").path, WrongKindError, "not of the format 'sparsify'", format="sparsify")
    fails(tmp_path / "a", ConfigError, "unknown dictionary format 'sealens'", "did you mean 'saelens'", format="sealens")


def test_chosen_features_and_activations_that_do_not_fit(tmp_path: Path) -> None:
    dictionary = steer.load_dictionary(saelens(tmp_path, "standard").path)
    for wrong in ([N], [-1], [0.5], "3", [[1, 2]], True):
        with pytest.raises(ConfigError, match="feature"):
            dictionary.encode_selected(torch.zeros(1, D), wrong)
    with pytest.raises(WidthError, match=rf"\[..., {D}\]"):
        dictionary.encode(torch.zeros(3, D + 1))
    assert dictionary.encode_selected(torch.zeros(2, 3, D), []).shape == (2, 3, 0)


@pytest.mark.parametrize("arguments", [{"layer": -1}, {"layer": 1.5}, {"k": 0}, {"norm_factor": 0.0}, {"gain": "one"}, {"folder": 3}])
def test_arguments_of_wrong_types(tmp_path: Path, arguments: dict[str, object]) -> None:
    fails(saelens(tmp_path, "standard").path, ConfigError, **arguments)


def test_our_own_files_are_sealed(tmp_path: Path) -> None:
    dictionary = steer.load_dictionary(saelens(tmp_path / "a", "standard").path)
    path = dictionary.save(tmp_path / "own")
    edited_json(path / "manifest.json", architecture="crosscoder")
    fails(path, DamagedFileError, "altered")
    path = dictionary.save(tmp_path / "other")
    edited_tensors(path / "tensors.safetensors", lambda tensors: tensors["encoder"].add_(1))
    fails(path, DamagedFileError, "altered")
    with pytest.raises(ConfigError, match="int4"):
        dictionary.save(tmp_path / "own", dtype="int4")
    with pytest.raises(ConfigError, match="is read, not written"):
        dictionary.save(tmp_path / "own", format="sparsify")


def test_our_own_files_take_what_the_caller_says_better(tmp_path: Path) -> None:
    path = steer.load_dictionary(saelens(tmp_path / "a", "standard").path).save(tmp_path / "own")
    h = torch.randn(2, 4, D)
    dictionary = steer.load_dictionary(path, reads="layers.{layer}.output", layer=5, untrained=Untrained(first=2))
    assert [str(site) for site in (*dictionary.reads, *dictionary.writes)] == ["layers.5.output"] * 2
    assert not bool(dictionary.encode(h, positions=torch.arange(4))[:, :2].any())
    fails(path, ConfigError, "1 to read", reads=["layers.1.output", "layers.2.output"])
    path = steer.load_dictionary(saelens(tmp_path / "b", "transcoder").path).save(tmp_path / "transcoder")
    dictionary = steer.load_dictionary(path, writes="layers.4.mlp.output")
    assert [str(site) for site in (*dictionary.reads, *dictionary.writes)] == ["layers.2.mlp.input", "layers.4.mlp.output"]


@pytest.mark.parametrize(
    "arguments",
    [{"k": 3}, {"layer": 9}, {"gain": torch.ones(D)}, {"norm_factor": 2.0}, {"writes": "layers.1.mlp.output"}, {"models": ["a", "b"]},
     {"reads": ["layers.1.output", "layers.2.output"]}],
)  # fmt: skip
@pytest.mark.parametrize("made", ["saelens", "openai", "dictionary_learning", "own"])
def test_an_argument_that_changes_nothing_is_refused(tmp_path: Path, made: str, arguments: dict[str, object]) -> None:
    cases: dict[str, Callable[[Path], Case]] = {
        "saelens": lambda folder: saelens(folder, "standard"),
        "openai": lambda folder: openai(folder, "TopK"),
        "dictionary_learning": lambda folder: dictionary_learning(folder, "BatchTopKSAE"),
        "own": own,
    }
    fails(cases[made](tmp_path / "made").path, ConfigError, str(tmp_path), **arguments)


def test_an_argument_that_says_what_the_file_says_is_none_too_many(tmp_path: Path) -> None:
    assert steer.load_dictionary(openai(tmp_path / "a", "TopK").path, layer=7, writes="layers.7.output").width == N


def test_a_gain_is_folded_in_whatever_names_the_site(tmp_path: Path) -> None:
    path, gain, h = gemma_scope(tmp_path, "transcoders").path, torch.linspace(0.5, 2, D), torch.randn(3, D)
    with_gain = steer.load_dictionary(path, gain=gain)
    named = steer.load_dictionary(path, gain=gain, reads="layers.3.mlp.input")
    assert torch.equal(with_gain.encode(h), named.encode(h))
    plain = steer.load_dictionary(path, reads="module:model.layers.3.norm:input")
    torch.testing.assert_close(plain.encode(h / gain), named.encode(h))
    for wrong in (torch.zeros(D), torch.full((D,), float("nan"))):
        fails(path, ConfigError, "gain", "other than 0", gain=wrong)


def test_more_features_per_token_than_there_are(tmp_path: Path) -> None:
    edited_json(saelens(tmp_path / "a", "topk").path / "cfg.json", k=N + 1)
    edited_json(sparsify(tmp_path / "b", "sae").path / "cfg.json", k=N + 1)
    edited_json(llama_scope(tmp_path / "c", "topk").path / "hyperparams.json", top_k=N + 1)
    edited_torch(dictionary_learning(tmp_path / "d", "AutoEncoderTopK").path / "ae.pt", lambda state: state.update(k=torch.tensor(N + 1)))
    path = openai(tmp_path / "e", "TopK").path
    edited_torch(path, lambda state: state["activation_state_dict"].update(k=N + 1))
    for place in (tmp_path / "a", tmp_path / "b" / "layers.5", tmp_path / "c", tmp_path / "d", path):
        fails(place, DamagedFileError, str(place), f"{N} or less", str(N + 1))
    fails(qwen_scope(tmp_path).path, ConfigError, "1 to 1024", layer=1, k=1025)


@pytest.mark.parametrize(("key", "value"), [("k", [4, 4]), ("k", 0), ("k", 2.5), ("threshold", [0.1, 0.2])])
def test_numbers_of_a_batchtopk_file(tmp_path: Path, key: str, value: object) -> None:
    path = dictionary_learning(tmp_path, "BatchTopKSAE").path
    edited_torch(path / "ae.pt", lambda state: state.update({key: torch.tensor(value)}))
    fails(path, DamagedFileError, str(path), f"'{key}'")


@pytest.mark.parametrize("key", ["W_enc", "W_dec", "b_dec", "b_enc"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_that_hold_no_real_numbers(tmp_path: Path, key: str, dtype: torch.dtype) -> None:
    path = saelens(tmp_path, "standard").path
    edited_tensors(path / "sae_weights.safetensors", lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    fails(path, DamagedFileError, str(path), f"'{key}'", str(dtype))


@pytest.mark.parametrize("changes", [{"metadata": "x"}, {"architecture": ["standard"]}, {"normalize_activations": ["none"]}])
def test_a_damaged_configuration_is_not_put_down_to_the_reader(tmp_path: Path, changes: dict[str, object]) -> None:
    path = saelens(tmp_path, "standard").path
    edited_json(path / "cfg.json", **changes)
    fails(path, DamagedFileError, str(path))


def test_a_file_of_openai_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    path = openai(tmp_path, "TopK").path
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    fails(path, DamagedFileError, str(path))
    path.write_bytes(whole)
    edited_torch(path, lambda state: state.pop("latent_bias"))
    fails(path, DamagedFileError, str(path), "'latent_bias'")
    torch.save({"pre_bias": Path("x")}, path)
    fails(path, UnsafeFileError, str(path))


def test_numbers_of_another_shape_than_the_dictionary(tmp_path: Path) -> None:
    dictionary, h = steer.load_dictionary(saelens(tmp_path, "standard").path, untrained=Untrained(first=1)), torch.randn(2, 4, D)
    for call in (
        lambda: dictionary.decode(torch.zeros(2, N + 1)),
        lambda: dictionary.decode_selected(torch.zeros(2, 3), [1, 2]),
        lambda: dictionary.encode(h, positions=torch.arange(5)),
        lambda: dictionary.encode(h, positions=torch.zeros(4, 4, 1)),
        lambda: setattr(dictionary, "maxima", torch.ones(N + 1)),
        lambda: setattr(dictionary, "density", torch.ones(N, 2)),
    ):
        with pytest.raises(WidthError):
            call()
    dictionary.maxima = torch.ones(N)
    assert dictionary.maxima.shape == (N,) and dictionary.density is None
