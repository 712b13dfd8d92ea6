"""The maps that edits change: found in every family, and the right side of the right matrix."""

from __future__ import annotations

import peft
import pytest
import torch
from accelerate import cpu_offload
from edits.edit_helpers import DENSE, FACTS, model_of
from tiny_tokenizer import tiny_tokenizer
from torch import nn

from steer.edits import edited_maps, locate
from steer.edits.keys import read_at
from steer.errors import ConfigError, EditError
from steer.model.anatomy import Anatomy


def map_of(model, layer=1):
    (edited,) = edited_maps(Anatomy.find(model), [layer])
    return edited


def subjects():
    return [locate(tiny_tokenizer(), fact.prompt, fact.subject) for fact in FACTS]


@pytest.mark.parametrize("family", DENSE)
def test_a_change_along_a_key_shifts_what_the_map_gives_by_the_value_at_that_key_alone(family):
    """Delta k = shift to rounding, at the map itself: before a post-norm, whatever the gate, bias, layout or order of the block."""
    model = model_of(family)
    edited = map_of(model)
    before = read_at(model, subjects(), [edited.key_site, edited.value_site])
    keys, outputs = before[edited.key_site], before[edited.value_site]
    assert keys.shape == (3, edited.in_width) and outputs.shape == (3, edited.out_width)
    bias = edited.module.bias
    torch.testing.assert_close(outputs, keys @ edited.weight().T + (0 if bias is None else bias.detach()))

    shift = torch.randn(edited.out_width, generator=torch.Generator().manual_seed(0))
    rows = torch.linalg.pinv(keys)[:, 0]  # 1 along the first key, 0 along the others
    held = edited.parameter.detach().clone()
    with torch.no_grad():
        edited.parameter.add_(edited.as_held(torch.outer(shift, rows)))
    after = read_at(model, subjects(), [edited.value_site])[edited.value_site]
    torch.testing.assert_close(after[0], outputs[0] + shift, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after[1:], outputs[1:], atol=1e-4, rtol=1e-4)
    assert not torch.equal(edited.parameter, held) and edited.weight().data_ptr() != edited.parameter.data_ptr()


@pytest.mark.parametrize("family, has_one", [("llama", False), ("gemma2", True), ("gemma3", True), ("gpt_neox", False)])
def test_a_norm_behind_the_map_is_known(family, has_one):
    assert map_of(model_of(family)).has_post_norm is has_one


def test_gpt2_holds_its_weight_transposed():
    edited = map_of(model_of("gpt2"))
    assert edited.transposed and edited.parameter.shape == (128, 32) and edited.weight().shape == (32, 128)
    assert "Conv1D" in repr(edited)


def test_layers_are_each_given_once_in_ascending_order():
    anatomy = Anatomy.find(model_of("llama"))
    assert [edited.layer for edited in edited_maps(anatomy, [-1, 0, 1, 1])] == [0, 1]


@pytest.mark.parametrize("layers, message", [([2], "not in this model"), ([-3], "not in this model"), ([], "no layer was named")])
def test_layers_that_are_not_there_are_refused(layers, message):
    with pytest.raises(EditError, match=message):
        edited_maps(Anatomy.find(model_of("llama")), layers)


@pytest.mark.parametrize("layers", [8, ["0"], "01", [True]])
def test_layers_that_are_no_list_of_numbers_are_refused(layers):
    with pytest.raises(ConfigError):
        edited_maps(Anatomy.find(model_of("llama")), layers)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_is_refused_by_its_name(family):
    with pytest.raises(EditError, match="mixture of experts"):
        edited_maps(Anatomy.find(model_of(family)), [1])


def test_tied_embeddings_are_no_obstacle_and_stay_as_they_are():
    model = model_of("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert map_of(model).parameter is model.model.layers[1].mlp.down_proj.weight


@pytest.mark.parametrize("share", ["weight", "module"])
def test_a_weight_that_several_blocks_use_is_refused(share):
    model = model_of("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    if share == "weight":
        second.down_proj.weight = first.down_proj.weight
    else:
        second.down_proj = first.down_proj
    with pytest.raises(EditError, match="several places"):
        map_of(model)


class Int8(nn.Linear):
    """As bitsandbytes and its like hold weights: integers, and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_a_quantised_map_is_flagged_and_its_weight_is_not_given():
    model = model_of("llama")
    model.model.layers[1].mlp.down_proj = Int8(model.model.layers[1].mlp.down_proj)
    edited = map_of(model)
    assert edited.is_quantised and (edited.in_width, edited.out_width) == (64, 32)
    with pytest.raises(EditError, match="quantised"):
        edited.weight()
    assert read_at(model, subjects(), [edited.key_site])[edited.key_site].shape == (3, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_in_half_precision_is_given_in_single(dtype):
    edited = map_of(model_of("llama").to(dtype))
    assert not edited.is_quantised and edited.weight().dtype == torch.float32 and edited.parameter.dtype == dtype


def test_an_offloaded_weight_is_refused():
    model = model_of("llama")
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(EditError, match="offloaded"):
        map_of(model)


def test_a_wrapped_model_has_the_same_map_under_the_same_name():
    model = model_of("llama")
    plain = map_of(model)
    compiled = map_of(torch.compile(model))
    assert compiled.module is plain.module and compiled.name == plain.name == plain.path != compiled.path
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj", "q_proj"], r=2))
    edited = map_of(adapted)
    assert edited.module is plain.module and edited.name == plain.name
    assert adapted.get_submodule(edited.path) is plain.module and edited.path.endswith("down_proj.base_layer")
