"""Dictionaries of every format give what the library that wrote them gives, whole and in parts, with true gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from features.dictionary_files import CASES, Case, saelens
from method_tables import check_table
from torch import Tensor

import steer
from steer.features import ACTIVATIONS, ARCHITECTURES, FORMATS, Dictionary, Untrained
from steer.features.rows import InFile

NAMES = sorted(CASES)


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return CASES[request.param](tmp_path)


def load(case: Case) -> Dictionary:
    return steer.load_dictionary(case.path, **case.arguments)


def activations(case: Case, tokens: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tokens, *case.shape, generator=torch.Generator().manual_seed(42), dtype=dtype) * 2 + 0.3


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def test_every_format_has_a_file() -> None:
    check_table(FORMATS, {name.split(" ")[0] for name in NAMES} | {"steer"}, "CASES of tests/features/dictionary_files.py", "a file")


def test_encode_and_decode_are_those_of_the_library(case: Case) -> None:
    dictionary, h = load(case), activations(case)
    f = case.encode(h)
    share = float((f != 0).double().mean())
    assert 0.05 < share < 0.95 or f.shape[-1] > 100, "the case says nothing"
    close(dictionary.encode(h), f)
    close(dictionary.decode(f, h), case.decode(f, h))
    close(dictionary.reconstruct(h), case.decode(f, h))


def test_fp32_is_enough(case: Case) -> None:
    dictionary, h = load(case), activations(case, dtype=torch.float32)
    f = dictionary.encode(h)
    assert f.dtype is torch.float32
    close(f, case.encode(h.double()))
    close(dictionary.decode(f, h), case.decode(f.double(), h.double()))


def test_sites_and_what_was_not_trained(case: Case) -> None:
    dictionary = load(case)
    assert [str(site) for site in dictionary.reads] == case.reads
    assert [str(site) for site in dictionary.writes] == case.writes
    assert dictionary.untrained.first == case.first
    assert dictionary.source.files and all(len(digest) == 64 for digest in dictionary.source.sha256().values())


def test_a_few_features_are_those_of_all(case: Case) -> None:
    dictionary, h = load(case), activations(case)
    features = [dictionary.width - 1, 0, 7, 3]
    f = dictionary.encode(h)
    close(load(case).encode_selected(h, features), f[:, features], 1e-9)
    close(load(case).pre_activations(h, features), dictionary.pre_activations(h)[:, features], 1e-9)
    only = torch.zeros_like(f)
    only[:, features] = f[:, features]
    change = dictionary.decode(only, h) - dictionary.decode(torch.zeros_like(f), h)
    close(load(case).decode_selected(f[:, features], features, h), change, 1e-9)
    everything = list(range(dictionary.width))
    close(load(case).encoder_rows(features), dictionary.encoder_rows(everything)[features].double(), 0)
    close(load(case).decoder_rows(features), dictionary.decoder_rows(everything)[features].double(), 0)


def test_thresholds_say_when_a_feature_is_on(case: Case) -> None:
    dictionary, h = load(case), activations(case)
    threshold = dictionary.threshold()
    if threshold is None:
        assert "topk" in dictionary.activation_name or dictionary.activation_name == "groupmax"
        return
    assert torch.equal(dictionary.encode(h) != 0, dictionary.pre_activations(h) > threshold)
    assert torch.equal(dictionary.threshold([3, 1]), threshold[[3, 1]])


def test_gradients_are_true(case: Case) -> None:
    dictionary, h = load(case), activations(case, tokens=2).requires_grad_()
    assert torch.autograd.gradcheck(dictionary.reconstruct, (h,), atol=1e-4)
    features = (dictionary.encode(h) != 0).any(0).nonzero()[:2, 0].tolist() + [0, 5]
    (whole,) = torch.autograd.grad(dictionary.encode(h)[:, features].square().sum(), h)
    (selected,) = torch.autograd.grad(dictionary.encode_selected(h, features).square().sum(), h)
    assert float(whole.abs().sum()) > 0
    close(selected, whole, 1e-9)


def test_the_error_is_what_the_reconstruction_lacks(case: Case) -> None:
    dictionary, h = load(case), activations(case)
    if dictionary.reads == dictionary.writes:
        close(dictionary.error(h) + dictionary.reconstruct(h), h, 1e-12)
        return
    with pytest.raises(steer.SteerError, match="needs what it should have reconstructed"):
        dictionary.error(h)
    target = torch.ones_like(dictionary.reconstruct(h))
    close(dictionary.error(h, target) + dictionary.reconstruct(h), target, 1e-12)


@pytest.mark.parametrize(("dtype", "form"), [("float32", "folder"), ("bfloat16", "file.safetensors"), ("int8", "folder")])
def test_our_own_format_keeps_it(case: Case, tmp_path: Path, dtype: str, form: str) -> None:
    dictionary, h = load(case), activations(case)
    path = dictionary.save(tmp_path / "saved" / form, dtype=dtype)
    again = steer.load_dictionary(path)
    assert type(again) is type(dictionary) and again.width == dictionary.width
    assert (again.reads, again.writes, again.untrained) == (dictionary.reads, dictionary.writes, dictionary.untrained)
    assert again.source.described() == dictionary.source.described()
    tolerance = {"float32": 1e-6, "bfloat16": 2**-8, "int8": 1 / 127}[dtype]
    everything = list(range(dictionary.width))
    for rows in ("encoder_rows", "decoder_rows"):
        stored, kept = getattr(dictionary, rows)(everything).flatten(1), getattr(again, rows)(everything).flatten(1)
        assert bool(((kept - stored).abs() <= tolerance * stored.abs().amax(1, keepdim=True)).all())
    if dtype == "float32":
        close(again.encode(h), dictionary.encode(h), 1e-5)
        close(again.reconstruct(h), dictionary.reconstruct(h), 1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("saelens", "gemma_scope_2", "circuit_tracer"))])
def test_rows_of_safetensors_stay_in_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name](tmp_path)
    h, features, whole = activations(case), [1, 3], load(case)
    if not whole.activation_name.startswith(("relu", "jumprelu", "gated", "batchtopk")):
        return  # top-k asks all features which are on
    expected = whole.encode(h)[:, features]
    dictionary = load(case)

    def read_all(rows: InFile) -> Tensor:
        raise AssertionError(f"all of {rows} was read")

    monkeypatch.setattr(InFile, "_all", read_all)
    close(dictionary.encode_selected(h, features), expected, 1e-9)
    dictionary.decode_selected(expected, features, h)
    with pytest.raises(AssertionError, match="was read"):
        dictionary.encode(h)


def test_kinds_are_found_in_the_registries() -> None:
    assert {"relu", "gated", "topk", "batchtopk", "jumprelu", "abstopk", "groupmax"} <= set(ACTIVATIONS)
    assert set(ARCHITECTURES) >= {"sparse_autoencoder", "transcoder", "cross_layer_transcoder", "crosscoder"}


def test_saelens_folders_of_ours_keep_the_tokens_that_were_left_out(tmp_path: Path) -> None:
    untrained = Untrained(first=2, max_norm=7.5)
    dictionary = steer.load_dictionary(saelens(tmp_path / "a", "jumprelu").path, untrained=untrained)
    assert steer.load_dictionary(dictionary.save(tmp_path / "b", format="saelens")).untrained == untrained


@pytest.mark.parametrize(("positions", "first"), [([3, None], 3), ("slice(3, None)", 3), ([None, 5], 0), ([-5, None], 0), ([None], 0)])
def test_positions_of_saelens(tmp_path: Path, positions: object, first: int) -> None:
    path = saelens(tmp_path, "standard", seqpos_slice=positions).path
    assert steer.load_dictionary(path).untrained.first == first
