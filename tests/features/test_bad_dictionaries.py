"""Damaged and mislabelled files of dictionaries end in typed errors that name file, key, expected and found."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from features.dictionary_files import (
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
