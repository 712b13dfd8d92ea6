"""Anatomy on every family: each site is found, is the tensor it claims to be, and the writers add up to the residual stream."""

import pytest
import torch
from families import FAMILIES, LAYERS, WIDTH
from hand import ids, recorded, relative
from torch import nn
from transformers import AutoModelForSequenceClassification, FalconConfig, FalconForCausalLM, LlamaConfig, LlamaModel

from steer.errors import AnatomyError, SiteError
from steer.model.anatomy import Anatomy
from steer.model.site import LAYER_PARTS, MODEL_PARTS

MOE = ("mixtral", "qwen3_moe")


def every_site(family: str) -> list[str]:
    parts = [part for part in LAYER_PARTS if not (family in MOE and part == "mlp.neurons")]
    return [f"layers.{layer}.{part}" for layer in range(LAYERS) for part in parts] + list(MODEL_PARTS)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pass_(request):
    """(family, model, anatomy, activations of every site, output) of one forward pass."""
    model = FAMILIES[request.param]()
    with torch.no_grad(), recorded(model, every_site(request.param)) as seen:
        output = model(ids(), output_hidden_states=True, use_cache=False)
    return request.param, model, Anatomy.find(model), seen, output


def test_every_site_is_read_with_the_width_it_states(pass_):
    family, model, anatomy, seen, _ = pass_
    assert set(seen) == set(every_site(family))
    for site, h in seen.items():
        assert h.shape == (2, 7, anatomy.point(site).width), site
    assert anatomy.n_layers == LAYERS and anatomy.width == WIDTH and anatomy.moe == (family in MOE)


def test_the_writers_add_up_to_the_final_residual_stream(pass_):
    _, _, anatomy, seen, _ = pass_
    total = seen["layers.0.input"].clone()
    for layer in range(LAYERS):
        heads = anatomy.head_outputs(layer, seen[f"layers.{layer}.attn.z"]).detach()
        assert heads.shape == (anatomy.n_heads + 1, 2, 7, WIDTH)
        assert relative(heads.sum(0), seen[f"layers.{layer}.attn.output"]) < 1e-5
        total += heads.sum(0) + seen[f"layers.{layer}.mlp.output"]
    assert relative(total, seen[f"layers.{LAYERS - 1}.output"]) < 1e-4


def test_hidden_states_are_the_sites_they_are_said_to_be(pass_):
    _, _, _, seen, output = pass_
    for layer in range(LAYERS):
        assert torch.equal(output.hidden_states[layer], seen[f"layers.{layer}.input"])
        if layer:
            assert torch.equal(output.hidden_states[layer], seen[f"layers.{layer - 1}.output"])
    assert torch.equal(output.hidden_states[-1], seen["final_norm"])
    assert torch.equal(seen["embed"], seen["layers.0.input"])


def test_the_unembedding_makes_the_logits(pass_):
    family, _, anatomy, seen, output = pass_
    logits = seen["logits"]
    if family == "gemma2":  # caps what the unembedding gives
        logits = 30.0 * torch.tanh(logits / 30.0)
    assert torch.allclose(logits, output.logits, atol=1e-6)
    assert anatomy.unembedding(seen["final_norm"]).equal(seen["logits"])


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma2", "gemma3", "olmo2"}))  # their post-norm's scale depends on all heads
def test_heads_are_told_apart(family):
    """Zeroing one head's part of z takes exactly that head's contribution away."""
    anatomy = Anatomy.find(FAMILIES[family]())
    z = torch.randn(2, 3, anatomy.n_heads * anatomy.head_dim)
    heads = anatomy.head_outputs(1, z)
    without = z.clone()
    without[..., anatomy.head_dim : 2 * anatomy.head_dim] = 0
    assert torch.allclose(heads.sum(0) - heads[1], anatomy.head_outputs(1, without).sum(0), atol=1e-5)


def test_a_bare_decoder_and_a_classifier():
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
    bare = Anatomy.find(LlamaModel(config))
    assert bare.path == "" and bare.unembedding is None and bare.n_layers == 2
    with pytest.raises(SiteError, match="no 'logits'"):
        bare.point("logits")
    assert bare.point("final_norm").width == 32
    classifier = Anatomy.find(AutoModelForSequenceClassification.from_config(config))
    assert classifier.path == "model" and classifier.point("layers.1.output").width == 32


def test_layers_out_of_range_and_missing_parts(tiny):
    anatomy = Anatomy.find(tiny("llama"))
    assert str(anatomy.point("layers.-1.output").site) == "layers.2.output"
    for layer in (3, -4):
        with pytest.raises(SiteError, match="expected: 0 to 2"):
            anatomy.point(f"layers.{layer}.output")
    with pytest.raises(SiteError, match="mixture-of-experts"):
        Anatomy.find(tiny("mixtral")).point("layers.0.mlp.neurons")


def test_a_failure_lists_what_was_found():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    with pytest.raises(AnatomyError, match=r"trunk \(2 x Linear\)[\s\S]*module:"):
        Anatomy.find(Odd())
    with pytest.raises(AnatomyError, match="no nn.ModuleList at all"):
        Anatomy.find(nn.Linear(2, 2))


def test_two_decoders_in_one_module_are_not_guessed_between(tiny):
    both = nn.ModuleDict({"policy": tiny("llama"), "judge": tiny("llama")})
    with pytest.raises(AnatomyError, match=r"several decoders[\s\S]*policy.model"):
        Anatomy.find(both)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_fingerprint_is_stable_and_tells_models_apart(family, tiny):
    model = tiny(family)
    first = Anatomy.find(model).fingerprint()
    assert Anatomy.find(tiny(family)).fingerprint() == first
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    assert Anatomy.find(model).fingerprint()["embedding_digest"] != first["embedding_digest"]
    assert first["n_layers"] == LAYERS and first["width"] == WIDTH


def falcon(**options) -> FalconForCausalLM:
    base = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0, "bias": True}
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(**{**base, "alibi": False, **options})).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


FALCONS = {
    "falcon new": lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon one key": lambda: falcon(multi_query=True),
    "falcon sequential": lambda: falcon(multi_query=False, parallel_attn=False),
    "falcon alibi": lambda: falcon(multi_query=False, alibi=True),
}


@pytest.mark.parametrize("name", ["llama", "mixtral", "phi3", "gpt2", "gpt_neox", "opt", "falcon", *FALCONS])
def test_q_k_v_are_what_attention_gets(name, monkeypatch):
    """The kernel itself is asked: at position 0, where rotary embedding is the identity, it gets q and k of the site; v everywhere."""
    model = FALCONS[name]() if name in FALCONS else FAMILIES[name]()
    anatomy = Anatomy.find(model)
    attended = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        attended.append((query, key, value))
        return kernel(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), recorded(model, ["layers.1.attn.q", "layers.1.attn.k", "layers.1.attn.v"]) as seen:
        attended.clear()  # of the passes in which the sites were found
        model(ids(), use_cache=False)
    query, key, value = attended[1]
    groups = anatomy.n_heads // anatomy.n_kv_heads
    for part, tensor in (("q", query), ("k", key), ("v", value)):
        heads = anatomy.n_heads if part == "q" else anatomy.n_kv_heads
        if part != "q" and tensor.shape[1] == anatomy.n_heads:
            tensor = tensor[:, ::groups]
        mine = seen[f"layers.1.attn.{part}"].unflatten(-1, (heads, anatomy.head_dim)).transpose(1, 2)
        tokens = slice(None) if part == "v" else slice(0, 1)
        scale = {"opt": anatomy.head_dim**-0.5}.get(name, 1.0) if part == "q" else 1.0  # OPT scales its query before the kernel
        assert torch.allclose(mine[:, :, tokens] * scale, tensor[:, :, tokens], atol=1e-5), part


@pytest.mark.parametrize("name", [*sorted(FAMILIES), *FALCONS])
def test_with_one_token_each_head_passes_its_value_on(name):
    model = FALCONS[name]() if name in FALCONS else FAMILIES[name]()
    anatomy = Anatomy.find(model)
    with torch.no_grad(), recorded(model, ["layers.1.attn.v", "layers.1.attn.z"]) as seen:
        model(ids(2, 1), use_cache=False)
    values = seen["layers.1.attn.v"].unflatten(-1, (anatomy.n_kv_heads, anatomy.head_dim))
    heads = values.repeat_interleave(anatomy.n_heads // anatomy.n_kv_heads, dim=2)
    assert torch.allclose(heads.flatten(2), seen["layers.1.attn.z"], atol=1e-5)
