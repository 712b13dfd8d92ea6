"""Anatomy on every family: each site is found, is the tensor it claims to be, and the writers add up to the residual stream."""

import gc
import weakref

import pytest
import torch
from families import FAMILIES, LAYERS, WIDTH
from hand import edited, hook_count, ids, recorded, relative, vector
from tiny_causal import build as causal
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaModel,
)

from steer.errors import AnatomyError, SiteError
from steer.intervene import Add, Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.site import LAYER_PARTS, MODEL_PARTS

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MOE = ("mixtral", "qwen3_moe")


def spread(model: nn.Module) -> nn.Module:
    """Initial biases are zeros and norms ones: a test could mix them up and still pass."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.2))
    return model.eval()


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
    with pytest.raises(AnatomyError, match="no list of modules at all"):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_scaled_before_it_is_added_is_refused_with_the_factor(dtype):
    """Granite: the sites inside its attention and MLP keep their meaning."""
    config = LlamaConfig(**SMALL).to_dict() | {"residual_multiplier": 0.22}
    config.pop("model_type")
    model = spread(GraniteForCausalLM(GraniteConfig(**config))).to(dtype)
    anatomy = Anatomy.find(model)
    for part, module in (("attn", "self_attn"), ("mlp", "mlp"), ("mixer", "self_attn")):
        with pytest.raises(SiteError, match=rf"'{module}', of whose output 0.2[12]\d* times[\s\S]*module:model.layers.1.{module}:output"):
            anatomy.point(f"layers.1.{part}.output")
    assert anatomy.point("layers.1.attn.z").path == "model.layers.1.self_attn.o_proj"
    assert anatomy.point("layers.1.mlp.neurons").path == "model.layers.1.mlp.down_proj"
    with pytest.raises(SiteError, match="layers"):
        anatomy.written_sites()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_that_gives_the_stream_itself_is_no_writer(dtype):
    """BLOOM adds the residual inside attention and MLP: what is added comes from their last linear maps."""
    model = spread(BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=3, n_head=4, pad_token_id=0))).to(dtype)
    sites = ["layers.1.input", "layers.1.attn.output", "layers.1.mlp.output", "layers.1.output"]
    with torch.no_grad(), recorded(model, sites) as seen:
        model(ids())
    before, attn, mlp, after = (seen[site].double() for site in sites)
    assert relative(before + attn + mlp - before, after - before) < (1e-5 if dtype is torch.float32 else 0.05)


def test_a_post_norm_block_says_what_it_gives():
    config = BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, is_decoder=True, pad_token_id=0
    )
    anatomy = Anatomy.find(spread(BertLMHeadModel(config)))
    with pytest.raises(SiteError, match="output, without the stream as it came"):
        anatomy.point("layers.1.attn.output")
    assert anatomy.point("layers.1.output").width == 32


def test_layers_of_a_hybrid_have_what_they_have():
    model = causal("qwen3_next")
    anatomy = Anatomy.find(model)
    kinds = model.config.layer_types
    attention = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    assert 0 < len(attention) < len(kinds)
    assert [site.layer for site in anatomy.sites("layers.*.attn.output")] == attention
    assert [site.layer for site in anatomy.sites("layers.*.mixer.output")] == list(range(len(kinds)))
    other = next(layer for layer in range(len(kinds)) if layer not in attention)
    with pytest.raises(SiteError, match=r"no 'attn'[\s\S]*linear_attn \(mixer.output\), mlp \(mlp.output\)"):
        anatomy.point(f"layers.{other}.attn.output")
    with pytest.raises(SiteError, match="attn.q"):  # it gives a gate, too
        anatomy.point(f"layers.{attention[0]}.attn.q")
    with pytest.raises(SiteError, match="no 'attn'"):
        Anatomy.find(causal("mamba")).sites("layers.*.attn.output")


def test_a_state_space_model_has_no_heads():
    anatomy = Anatomy.find(causal("mamba"))
    for name in ("n_heads", "n_kv_heads", "head_dim"):
        with pytest.raises(AnatomyError, match=f"no one {name}"):
            getattr(anatomy, name)
    assert anatomy.fingerprint()["n_heads"] is None and anatomy.fingerprint()["width"] == 32


def test_heads_that_differ_by_layer_have_the_size_of_their_layer():
    anatomy = Anatomy.find(causal("gemma4_text"))
    sizes = {heads.head_dim for parts in anatomy.parts for writer in parts.writers if (heads := writer.heads) is not None}
    assert len(sizes) == 2
    with pytest.raises(AnatomyError, match="in different layers"):
        anatomy.head_dim  # noqa: B018
    for layer in range(anatomy.n_layers):
        attention = anatomy.blocks[layer].self_attn
        assert anatomy.point(f"layers.{layer}.attn.q").width == attention.q_proj.out_features
        assert anatomy.point(f"layers.{layer}.attn.z").width == attention.o_proj.in_features


def test_a_fused_layout_that_is_not_what_its_name_says_is_refused():
    """CodeGen mixes queries, keys and values in an order of its own under a name that other models use."""
    with pytest.raises(SiteError, match="attn.v"):
        Anatomy.find(causal("codegen")).point("layers.0.attn.v")


class Block(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.alpha = nn.GRU(12, 12, batch_first=True) if first else Shift()
        self.beta = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))

    def forward(self, stream):
        mixed = self.alpha(stream)
        stream = stream + (mixed[0] if isinstance(mixed, tuple) else mixed)
        return stream + self.beta(stream)


class Shift(nn.Module):
    """Gives every token a map of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(12, 12)

    def forward(self, x):
        return self.map(nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class ByHand(nn.Module):
    """A language model with names that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 12)
        self.tower = nn.ModuleDict({"one": Block(True), "two": Block(False), "three": Block(False)})
        self.last = nn.LayerNorm(12)
        self.guess = nn.Linear(12, 50, bias=False)

    def forward(self, words):
        stream = self.words(words)
        for block in self.tower.values():
            stream = block(stream)
        return self.guess(self.last(stream))


def test_a_module_written_by_hand():
    torch.manual_seed(0)
    model = spread(ByHand())
    anatomy = Anatomy.find(model)
    assert anatomy.blocks == list(model.tower.values()) and anatomy.width == 12
    assert (anatomy.embedding, anatomy.final_norm, anatomy.unembedding) == (model.words, model.last, model.guess)
    assert [anatomy.point(f"layers.{n}.mixer.output").module for n in range(3)] == [block.alpha for block in anatomy.blocks]
    assert [anatomy.point(f"layers.{n}.mlp.output").module for n in range(3)] == [block.beta for block in anatomy.blocks]
    with pytest.raises(SiteError, match="no 'attn'"):
        anatomy.point("layers.0.attn.output")
    with pytest.raises(AnatomyError, match="has no config"):
        anatomy.config  # noqa: B018
    assert anatomy.fingerprint()["vocabulary"] == 50
    x = torch.randint(50, (2, 6))
    with torch.no_grad():
        with edited(model.tower["two"], lambda h: h + vector(12)):
            expected = model(x)
        with Plan(Intervention(Add(vector(12)), "layers.1.output")).attached(model):
            assert torch.allclose(model(x), expected, atol=1e-6)


def test_a_trial_pass_leaves_no_trace(tiny):
    model = tiny("llama")
    model.train()
    model.model.layers[1].eval()
    model.model.norm.register_buffer("count", torch.zeros(1))
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append("hook"))
    modes = [module.training for module in model.modules()]
    hooks, state = hook_count(model), torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Anatomy.find(model).point("layers.0.attn.output")
    assert not calls and hook_count(model) == hooks and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("layer", [0, 2])
def test_an_interrupt_in_a_trial_pass_leaves_no_trace(layer, tiny, monkeypatch):
    model = tiny("llama").train()
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.model.layers[layer], "forward", interrupted)
    hooks = hook_count(model)
    with pytest.raises(KeyboardInterrupt):
        Anatomy.find(model)
    assert hook_count(model) == hooks and all(module.training for module in model.modules())


def test_a_model_is_run_once_as_long_as_its_modules_stay(tiny, monkeypatch):
    model = tiny("llama")
    passes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs))
    for _ in range(3):
        Anatomy.find(model).point("layers.0.output")
    assert len(passes) == 1
    for _ in range(3):
        Anatomy.find(nn.ModuleDict({"net": model})).point("layers.0.attn.output")
    assert len(passes) == 2
    model.model.layers.append(tiny("llama").model.layers[0])
    assert Anatomy.find(model).n_layers == LAYERS + 1


def test_a_model_that_was_looked_at_can_be_freed(tiny):
    model = tiny("llama")
    Anatomy.find(model).point("layers.0.attn.output")
    bare = LlamaModel(LlamaConfig(**SMALL))
    Anatomy.find(bare).point("layers.0.attn.output")
    references = [weakref.ref(model), weakref.ref(bare)]
    del model, bare
    gc.collect()
    assert [reference() for reference in references] == [None, None]
