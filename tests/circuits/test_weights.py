"""Weights between features without an input: what they are is what the model does to the rows, path by path."""

import pytest
import torch
from circuits.circuit_helpers import WIDTH, autoencoder, transcoder
from families import HEAD_DIM, HEADS, KV_HEADS
from hand import hook_count

from steer.circuits import feature_weights
from steer.errors import ConfigError, SiteError

SOURCES, RECEIVERS = [1, 4, 7], [0, 2]


def test_along_the_stream_a_weight_is_the_product_of_the_rows(tiny):
    tc, sae = transcoder(), autoencoder()
    weights = feature_weights(tiny("llama"), tc, sae, SOURCES, RECEIVERS)
    assert torch.allclose(weights.direct, tc.decoder_rows(SOURCES) @ sae.encoder_rows(RECEIVERS).T, atol=1e-6)
    assert weights.heads == {}  # no attention lies between an MLP and the output of its block
    i, j, weight = weights.strongest(1)[0]
    assert abs(weight) == pytest.approx(float(weights.direct.abs().max())) and i in SOURCES and j in RECEIVERS


def test_a_reader_behind_a_norm_has_its_gain_folded_in(tiny):
    model = tiny("llama")
    early, tc = autoencoder("layers.0.output"), transcoder(2)
    weights = feature_weights(model, early, tc, SOURCES, RECEIVERS)
    gain = model.model.layers[2].post_attention_layernorm.weight.detach()
    assert torch.allclose(weights.direct, early.decoder_rows(SOURCES) @ (tc.encoder_rows(RECEIVERS) * gain).T, atol=1e-5)
    assert sorted(weights.heads) == [1, 2] and hook_count(model) == 0


def test_a_layer_norm_takes_the_mean_off(tiny):
    model = tiny("gpt2")
    early, tc = autoencoder("layers.0.output"), transcoder(1)
    weights = feature_weights(model, early, tc, SOURCES, RECEIVERS, heads=False)
    rows = early.decoder_rows(SOURCES)
    normed = (rows - rows.mean(1, keepdim=True)) * model.transformer.h[1].ln_2.weight.detach()
    assert torch.allclose(weights.direct, normed @ tc.encoder_rows(RECEIVERS).T, atol=1e-5) and weights.heads == {}


def test_a_head_moves_a_row_through_its_value_and_output_matrices(tiny):
    model = tiny("llama")
    early, sae = autoencoder("layers.0.output"), autoencoder("layers.1.output", seed=30)
    weights = feature_weights(model, early, sae, SOURCES, RECEIVERS)
    attention, gain = model.model.layers[1].self_attn, model.model.layers[1].input_layernorm.weight
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        value = attention.v_proj.weight[group * HEAD_DIM : (group + 1) * HEAD_DIM]
        out = attention.o_proj.weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
        expected = (early.decoder_rows(SOURCES) * gain) @ value.T @ out.T @ sae.encoder_rows(RECEIVERS).T
        assert torch.allclose(weights.heads[1][head], expected.detach(), atol=1e-5)
    assert list(weights.heads) == [1]


def test_all_paths_together_are_the_change_of_a_pre_activation(tiny):
    """One token alone attends to itself, and a norm that is frozen leaves the model linear, MLP 1 put aside."""
    model = tiny("llama")
    early, sae = autoencoder("layers.0.output"), autoencoder("layers.1.output", seed=30)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    weights = feature_weights(model, early, sae, SOURCES, RECEIVERS)
    inputs = {}
    block, norm = model.model.layers[1], model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda m, args, out: inputs.update(x=args[0]))
    block.register_forward_hook(lambda m, args, out: inputs.update(y=out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(torch.tensor([[7]]))
    x, y = inputs["x"].reshape(WIDTH), inputs["y"].reshape(WIDTH)
    denominator = float((x.square().mean() + norm.variance_epsilon).sqrt())
    heads = weights.heads[1].sum(0) / denominator
    # the stream itself behind block 1 is x + attention(x), both linear in x once the denominator is fixed
    row = early.decoder_rows(SOURCES)
    with torch.no_grad():
        attention = block.self_attn
        value = (x + row) / denominator * norm.weight @ attention.v_proj.weight.T
        grouped = value.view(len(SOURCES), KV_HEADS, HEAD_DIM).repeat_interleave(HEADS // KV_HEADS, 1).flatten(1)
        moved = x + row + grouped @ attention.o_proj.weight.T
    change = (moved - y) @ sae.encoder_rows(RECEIVERS).T
    assert torch.allclose(weights.direct + heads, change, atol=1e-4)


def test_an_mlp_beside_attention_does_not_read_what_it_writes(tiny):
    model = tiny("gpt_neox")
    early, tc = autoencoder("layers.0.output"), transcoder(1)
    assert feature_weights(model, early, tc, SOURCES, RECEIVERS).heads == {}
    attention = autoencoder("layers.1.attn.output")
    with pytest.raises(SiteError, match="do not reach"):
        feature_weights(model, attention, tc, SOURCES, RECEIVERS)


def test_what_has_no_such_weights_is_refused(tiny):
    model = tiny("llama")
    with pytest.raises(SiteError, match="do not reach"):
        feature_weights(model, autoencoder(), transcoder(), SOURCES, RECEIVERS)
    with pytest.raises(SiteError, match="reads 'layers.1.attn.output'"):
        feature_weights(model, autoencoder("layers.0.output"), autoencoder("layers.1.attn.output"), SOURCES, RECEIVERS)
    with pytest.raises(SiteError, match="writes 'final_norm'"):
        feature_weights(model, autoencoder("final_norm"), autoencoder(), SOURCES, RECEIVERS)
    with pytest.raises(ConfigError, match="outside the dictionary"):
        feature_weights(model, transcoder(), autoencoder(), [99], RECEIVERS)
    with pytest.raises(ConfigError, match="no dictionary"):
        feature_weights(model, "sae", autoencoder(), SOURCES, RECEIVERS)
    with pytest.raises(SiteError, match="heads=False"):
        feature_weights(tiny("gemma2"), autoencoder("layers.0.output"), autoencoder(), SOURCES, RECEIVERS)
