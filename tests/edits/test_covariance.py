"""Covariance of keys: the right tokens, added up in any way, kept on disk, refused where it does not belong."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from edits.edit_helpers import model_of, running_text, with_special_tokens
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor

from steer.edits import Covariance, covariance, edited_maps
from steer.edits.factor import Factor
from steer.edits.key_sums import KeySums, ordinary_tokens, text_rows
from steer.errors import DamagedFileError, EditError, NonFiniteError, TokenizerError, WrongModelError
from steer.model.anatomy import Anatomy
from steer.model.capture import capture
from steer.model.tokens import Row

TEXTS = [*running_text(14), *running_text(6, words=9, seed=1)]  # 14 * 19 + 6 * 8 tokens behind the first
TOKENS = 14 * 19 + 6 * 8


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def fitted(model, tmp_path_factory):
    """Of both layers; not to be changed."""
    return fit(model, tmp_path_factory.mktemp("cache"))


def fit(model, folder: Path, texts=TEXTS, layers=(0, 1), tokenizer=None, **options) -> Covariance:
    return Covariance.fit(model, tokenizer or tiny_tokenizer(), texts, layers, folder=folder, progress=False, **options)


def keys_by_hand(model, text: str, layer: int) -> Tensor:
    """[tokens, f] of one text alone."""
    kept = []
    (edited,) = edited_maps(Anatomy.find(model), [layer])
    handle = edited.module.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    with torch.no_grad():
        model(torch.tensor([tiny_tokenizer()(text).input_ids]))
    handle.remove()
    return kept[0][0]


class Stopped(Exception):
    """Stands for what kills a run."""


# ---- what is added up


def test_it_is_the_mean_of_k_k_over_all_tokens_but_the_first_of_each_text(model, fitted):
    for layer in (0, 1):
        keys = torch.cat([keys_by_hand(model, text, layer)[1:] for text in TEXTS]).double()
        assert fitted.tokens[layer] == len(keys) == TOKENS
        torch.testing.assert_close(fitted.moment(layer), keys.T @ keys / TOKENS, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype, apart", [(torch.float64, 1e-6), (torch.bfloat16, 0.03)])
def test_a_model_of_another_precision_has_nearly_the_same(dtype, apart, fitted, tmp_path):
    other = fit(model_of("llama").to(dtype), tmp_path).moment(1)
    assert float((other - fitted.moment(1)).norm()) < apart * float(fitted.moment(1).norm())


def test_two_covariances_of_disjoint_texts_add_up_to_that_of_all(model, fitted, tmp_path):
    total = fit(model, tmp_path, TEXTS[:7]) + fit(model, tmp_path, TEXTS[7:])
    for layer in (0, 1):
        torch.testing.assert_close(total.moment(layer), fitted.moment(layer), atol=1e-7, rtol=1e-5)
    assert total.tokens == fitted.tokens
    total.check(model, tokenizer=tiny_tokenizer())


def test_what_does_not_belong_together_is_not_added(model, fitted, tmp_path):
    with pytest.raises(EditError, match="same texts"):
        fitted + fitted
    with pytest.raises(EditError, match="different layers"):
        fitted + fit(model, tmp_path, TEXTS[:7], [1])
    with pytest.raises(WrongModelError, match="other weights"):
        fitted + fit(scaled(model_of("llama")), tmp_path, TEXTS[:7])


def test_massive_keys_are_left_out_where_the_first_token_has_one():
    norms = torch.tensor([[3000.0, 5, 6, 2900, 4, 0], [300.0, 5, 40, 6, 5, 4], [9.0, 5, 40, 6, 5, 4], [3000.0, 0, 0, 0, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6, [1] * 6, [1, 0, 0, 0, 0, 0]]).bool()
    assert ordinary_tokens(norms, real).int().tolist() == [[0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0] * 6]


def test_a_massive_first_token_does_not_reach_the_sums_and_padding_may_be_anything():
    keys = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    keys[:, 0] *= 1000
    weight = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    keys[1, 3:] = torch.nan
    sums = KeySums(4)
    sums.update(keys, weight, torch.arange(2))
    sums.take_in()
    ordinary = torch.cat([keys[0, 1:], keys[1, 1:3]]).double()
    torch.testing.assert_close(sums.total, ordinary.T @ ordinary, rtol=1e-5, atol=1e-6)
    assert sums.tokens == 6


@pytest.mark.real
def test_the_massive_first_tokens_of_the_real_model_are_left_out(smollm2):
    model, tokenizer = smollm2
    rows = text_rows(
        tokenizer, ["The Eiffel Tower was built in 1889.\nIt is in Paris, on the Champ de Mars.", "I like warm rain."], 512, 99
    )
    (edited,) = edited_maps(Anatomy.find(model), [11])
    largest = []

    class Watched(KeySums):
        def update(self, h, weight, rows):
            largest.append(float(h.norm(dim=-1).max()))
            super().update(h, weight, rows)

    sums = Watched(1536)
    capture(model, rows, {edited.key_site: sums}, span="all", share=False)
    sums.take_in()
    assert max(largest) > 1000 and sums.tokens >= sum(len(row.ids) - 2 for row in rows)
    assert float(sums.total.trace()) / sums.tokens < 200  # mean square of a key


def test_texts_are_cut_into_rows_that_begin_as_the_text_does():
    rows = text_rows(with_special_tokens(), ["the cat sat on the mat", "dog"], 4, 100)
    words = ("the", "cat", "sat", "on", "the", "mat", "dog")
    the, cat, sat, on, _, mat, dog = tiny_tokenizer()(" ".join(words)).input_ids
    assert [row.ids for row in rows] == [(1, the, cat, sat), (1, on, the, mat), (1, dog)]
    assert [row.ids for row in text_rows(tiny_tokenizer(), ["the cat sat on", "dog"], 3, 100)] == [(the, cat, sat)]
    assert [row.ids for row in text_rows(tiny_tokenizer(), [Row((9, 8, 7, 6), 1)], 512, 2)] == [(9, 8, 7)]
    with pytest.raises(EditError, match="no texts"):
        text_rows(tiny_tokenizer(), ["dog", ""], 512, 100)


def test_texts_are_cut_at_the_positions_that_a_model_has(tmp_path):
    long = [" ".join(running_text(20))]
    assert fit(model_of("gpt2"), tmp_path, long, [0]).tokens[0] == 400 - 4  # rows of 128 tokens


def test_keys_that_are_not_finite_are_refused(tmp_path):
    broken = model_of("llama")
    edited_maps(Anatomy.find(broken), [1])  # of a model that is broken from the beginning, the parts cannot be found
    torch.nn.init.constant_(broken.model.layers[1].mlp.up_proj.weight, torch.nan)
    with pytest.raises(NonFiniteError):
        fit(broken, tmp_path, layers=[1])


# ---- the cache


def runs(model) -> list[int]:
    """Fills up with the number of texts of each pass."""
    passes: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[0]))
    return passes


def test_a_layer_that_is_on_disk_is_not_fitted_again(tmp_path):
    model = model_of("llama")
    first = fit(model, tmp_path)
    passes = runs(model)
    again = fit(model, tmp_path, layers=[1])
    assert not passes and torch.equal(again.moment(1), first.moment(1)) and again.layers == [1]
    again.check(model)


@pytest.mark.parametrize("change", ["texts", "number", "weights", "edited weights", "tokenizer"])
def test_it_is_fitted_again_when_what_it_depends_on_changes(change, tmp_path):
    model, options = model_of("llama"), {}
    fit(model, tmp_path, max_tokens=200)
    if change == "weights":
        scaled(model)
    elif change == "edited weights":
        scaled(model, "layers.0.mlp.down_proj")
    elif change == "tokenizer":
        options["tokenizer"] = with_special_tokens()
    elif change == "texts":
        options["texts"] = TEXTS[::-1]
    passes = runs(model)
    fit(model, tmp_path, **{"max_tokens": 200 + (change == "number"), **options})
    assert passes


def test_a_fit_that_was_killed_goes_on_where_it_was_saved(tmp_path, monkeypatch, fitted):
    monkeypatch.setattr(covariance, "PASS_TOKENS", 40)  # two texts
    monkeypatch.setattr(covariance, "SAVE_SECONDS", 0)
    model = model_of("llama")
    passes = runs(model)

    def stop(module, args):
        if len(passes) == 4:
            raise Stopped

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    passes.clear()
    with pytest.raises(Stopped):
        fit(model, tmp_path)
    handle.remove()
    (part,) = tmp_path.iterdir()
    assert part.name.startswith("part-") and sum(passes) == 8
    passes.clear()
    resumed = fit(model, tmp_path)
    assert sum(passes) == len(TEXTS) - 6
    assert resumed.tokens == fitted.tokens and not part.exists()
    torch.testing.assert_close(resumed.moment(1), fitted.moment(1), atol=1e-7, rtol=1e-5)


def test_an_interrupted_fit_leaves_the_model_alone(tmp_path):
    model = model_of("llama").train()
    fit(model, tmp_path / "a", TEXTS[:7])

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        fit(model, tmp_path / "b")
    handle.remove()
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_damaged_file_of_the_cache_is_made_again(tmp_path, caplog, model):
    first = fit(model, tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    again = fit(model, tmp_path)
    assert torch.equal(again.moment(1), first.moment(1)) and "fitted again" in caplog.text


def test_the_cache_is_in_the_folder_of_the_user(tmp_path, monkeypatch, model):
    monkeypatch.setenv("STEER_CACHE", str(tmp_path))
    Covariance.fit(model, tiny_tokenizer(), TEXTS, [1])
    (file,) = (tmp_path / "covariance").iterdir()
    assert file.name.startswith("llama-layer1-")


def test_nothing_is_shown_where_there_is_no_terminal(tmp_path, capfd, model):
    Covariance.fit(model, tiny_tokenizer(), TEXTS, [1], folder=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_file_is_read_as_it_was_written_and_a_damaged_one_refused(tmp_path, fitted, model):
    read = Covariance.load(fitted.save(tmp_path / "c.safetensors"))
    assert read.tokens == fitted.tokens and read.source == fitted.source and torch.equal(read.sums[0], fitted.sums[0])
    read.check(model, tokenizer=tiny_tokenizer())
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:-8])
    with pytest.raises(DamagedFileError):
        Covariance.load(tmp_path / "c.safetensors")
    oblong = Covariance({0: fitted.sums[0][:2]}, {0: TOKENS}, fitted.source)
    with pytest.raises(DamagedFileError, match="square"):
        Covariance.load(oblong.save(tmp_path / "d"))


# ---- whether it fits a model


def scaled(model, part: str = "layers.0.self_attn.q_proj"):
    with torch.no_grad():
        model.get_submodule(f"model.{part}").weight.mul_(1.01)
    return model


def test_it_fits_the_model_that_it_was_fitted_on_also_in_wrappers(fitted):
    model = model_of("llama")
    for wrapped in (model, torch.compile(model), peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))):
        fitted.check(wrapped, [1], tiny_tokenizer())


def test_edits_of_down_projections_do_not_make_it_unfit(fitted):
    fitted.check(scaled(model_of("llama"), "layers.0.mlp.down_proj"))


@pytest.mark.parametrize("part", ["layers.0.self_attn.q_proj", "layers.1.mlp.gate_proj", "layers.1.input_layernorm", "embed_tokens"])
def test_trained_weights_are_seen(fitted, part):
    with pytest.raises(WrongModelError, match="other weights"):
        fitted.check(scaled(model_of("llama"), part))


def test_weights_of_later_layers_do_not_matter(fitted):
    fitted.check(scaled(model_of("llama"), "layers.1.mlp.gate_proj"), [0])


def test_a_trained_adapter_is_seen(fitted):
    model = peft.get_peft_model(model_of("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    with pytest.raises(WrongModelError, match="other weights"):
        fitted.check(model)


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: model_of("qwen2"), "model_type"),
        (lambda: model_of("llama", intermediate_size=48), "64"),
        (lambda: model_of("llama").to(torch.bfloat16), "dtype"),
    ],
    ids=["family", "neurons", "dtype"],
)
def test_another_model_is_seen(fitted, other, message):
    with pytest.raises(WrongModelError, match=message):
        fitted.check(other())


def test_another_tokenizer_is_seen(fitted, model):
    with pytest.raises(TokenizerError, match="another tokenizer"):
        fitted.check(model, tokenizer=with_special_tokens())


def test_a_layer_that_was_not_fitted_is_named(fitted, model):
    with pytest.raises(EditError, match="lacks layer 7"):
        fitted.check(model, [7])
    with pytest.raises(EditError, match="lacks layer 7"):
        fitted.factor(7)


# ---- too little to solve with


def test_fewer_tokens_than_neurons_are_refused(model, tmp_path):
    with pytest.raises(EditError, match="too few tokens") as error:
        fit(model, tmp_path, TEXTS[:2])
    assert error.value.found == 38 and "64" in error.value.expected
    with pytest.raises(EditError, match="too few tokens"):
        fit(model, tmp_path, max_tokens=63)
    with pytest.raises(EditError, match="too few tokens"):
        Covariance({1: torch.eye(64).double()}, {1: 63}, {}).factor(1)


def test_a_covariance_without_keys_or_rank_is_refused_with_its_rank():
    with pytest.raises(EditError, match="zero"):
        Factor(torch.zeros(4, 4))
    flat = torch.diag(torch.tensor([1.0, 1, 0, -1e-3]))
    with pytest.raises(EditError, match="rank 2, condition inf"):
        Factor(flat, ridge=0.0, name="layer 3")


# ---- the factor


def test_the_factor_solves_with_the_covariance_and_its_ridge(fitted):
    factor = fitted.factor(1, ridge=1e-3)
    moment = fitted.moment(1)
    loaded = moment + 1e-3 * moment.diagonal().mean() * torch.eye(64)
    keys = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded @ factor.solve(keys), keys.double(), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(factor.leverage(keys.T), (keys.double() * factor.solve(keys)).sum(0))
    values, vectors = factor.eigen()
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, moment)
    assert (values.diff() >= 0).all()


def test_the_leverage_of_the_tokens_of_the_texts_is_the_number_of_neurons_on_average(model, fitted):
    keys = torch.cat([keys_by_hand(model, text, 1)[1:] for text in TEXTS])
    assert float(fitted.factor(1, ridge=0.0).leverage(keys).mean()) == pytest.approx(64, rel=1e-4)


def test_a_factor_is_worked_out_once(fitted):
    assert fitted.factor(0) is fitted.factor(0) and fitted.factor(0) is not fitted.factor(0, ridge=1e-2)
    assert fitted.factor(0).eigen()[0] is fitted.factor(0).eigen()[0]
