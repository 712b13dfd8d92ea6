"""Models of one's own: found by structure or described, steered and read by every scope that their call can tell."""

from __future__ import annotations

import pytest
import torch
from hand import Means, edited, vector
from own_models import BLOCKS, LAYERS, OWN, VOCAB, WIDTH, TinyEncoder, TinyGPT, call_of, logits_of, own_model
from torch import Tensor, nn

import steer
from steer.errors import AnatomyError, ConfigError, ContextError, SiteError, WrongModelError
from steer.intervene import Add, Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.capture import capture
from steer.model.site import Site
from steer.model.tokens import Row


def chosen(scope: str, real: Tensor) -> Tensor:
    """[batch, tokens] the tokens of a scope, worked out by hand."""
    if scope == "all":
        return real
    if scope == "last":
        return torch.nn.functional.one_hot(real.sum(1) - 1, real.shape[1]).bool()
    return real & (torch.arange(real.shape[1]) >= 1) & (torch.arange(real.shape[1]) < 6)  # positions[1:6]


@pytest.mark.parametrize("scope", ["all", "last", "positions[1:6]"])
@pytest.mark.parametrize("name", sorted(OWN))
def test_steering_a_block_equals_a_hook_written_by_hand(name, scope):
    model = own_model(name)
    args, real = call_of(name)
    tokens = chosen(scope, real)
    push = tokens.unsqueeze(-1) * vector()  # [batch, tokens, width]
    with torch.no_grad():
        plain = logits_of(model(*args))
        for layer in range(LAYERS):
            block = model.get_submodule(f"{BLOCKS[name]}.{layer}")
            with edited(block, lambda h: h + push):
                expected = logits_of(model(*args))
            with Plan(Intervention(Add(vector()), f"layers.{layer}.output", scope)).attached(model) as attachment:
                assert torch.allclose(logits_of(model(*args)), expected, atol=1e-5)
            assert attachment.fired() == {f"add@layers.{layer}.output": int(tokens.sum())}
            with Plan(Intervention(Add(vector()), f"layers.{layer}.output", scope, strength=0.0)).attached(model):
                assert torch.equal(logits_of(model(*args)), plain)


def test_the_input_of_a_block_is_its_residual_stream_wherever_it_stands_among_the_arguments():
    model = own_model("encoder")
    args, real = call_of("encoder")
    push = real.unsqueeze(-1) * vector()
    with torch.no_grad():
        with edited(model.stack[0], lambda h: h + push):
            expected = model(*args)
        with Plan(Intervention(Add(vector()), "layers.1.input")).attached(model):
            assert torch.allclose(model(*args), expected, atol=1e-5)


def test_what_a_call_does_not_tell_is_refused():
    gpt, policy = own_model("gpt"), own_model("policy")
    (words,), (frames,) = call_of("gpt")[0], call_of("policy")[0]
    push = Add(vector())
    for model, given in ((gpt, words), (policy, frames)):
        with pytest.raises(ContextError, match="cannot tell prompt from response"):
            with Plan(Intervention(push, "layers.0.output", "response")).attached(model):
                model(given)
        response = torch.arange(7).expand(2, 7) >= 4
        with Plan(Intervention(push, "layers.0.output", "response")).attached(model) as attachment:
            with steer.response_tokens(model, response):
                model(given)
        assert attachment.fired() == {"add@layers.0.output": 6}
    with Plan(Intervention(push, "layers.0.output", f"tokens[{int(words[0, 0])}]")).attached(gpt) as attachment:
        gpt(idx=words)
    assert attachment.fired() == {"add@layers.0.output": int((words == words[0, 0]).sum())}
    with pytest.raises(ContextError, match="needs token ids"):
        with Plan(Intervention(push, "layers.0.output", "tokens[3]")).attached(policy):
            policy(frames)


def test_a_mask_that_was_not_proven_to_hide_tokens_is_refused_when_it_leaves_some_out():
    class Weighted(TinyGPT):
        def forward(self, idx, loss_mask=None):  # type: ignore[override]
            logits = super().forward(idx)[0]
            return logits if loss_mask is None else logits * loss_mask.unsqueeze(-1)

    model = Weighted()
    words = call_of("gpt")[0][0]
    mask = torch.ones(2, 7)
    with Plan(Intervention(Add(vector()), "layers.0.output")).attached(model):
        model(words, mask)
        mask[0, 5:] = 0
        with pytest.raises(ContextError, match="'loss_mask' of this Weighted"):
            model(words, mask)


def test_describe_names_the_parts():
    model = own_model("gpt")
    assert Anatomy.find(model).parts[0].attention() == []  # structure tells a mixer, no name says that it is attention
    with pytest.raises(SiteError, match="no 'attn'"):
        Anatomy.find(model).point("layers.0.attn.output")
    steer.describe(model, "transformer.h", embed="transformer.wte", norm="transformer.ln_f", attn="mix", mlp="think")
    anatomy = Anatomy.find(nn.ModuleDict({"around": model}))
    assert anatomy.point("layers.1.attn.output").module is model.transformer["h"][1].mix
    assert anatomy.point("layers.1.mlp.output").module is model.transformer["h"][1].think
    assert anatomy.embedding is model.transformer["wte"] and anatomy.final_norm is model.transformer["ln_f"]
    assert anatomy.point("layers.1.attn.z").module is model.transformer["h"][1].mix.c_proj


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"layers": "transformer.g"}, r"'layers'[\s\S]*did you mean 'transformer.h'"),
        ({"layers": "transformer.h", "attn": "mxi"}, r"'attn'[\s\S]*did you mean 'mix'"),
        ({"layers": "transformer.h", "attn": "think"}, "does not depend on the others"),
        ({"layers": "transformer.h", "mlp": "mix"}, "depends on other tokens"),
        ({"layers": "transformer.h", "attn": "ln_1"}, r"input \+ what is added = output[\s\S]*mix, think"),
        ({"layers": "transformer.h", "norm": "transformer.wte"}, "takes what the last block gives"),
        ({"layers": "transformer.h", "embed": "transformer.wpe"}, "one row for every token"),
        ({"layers": "transformer.h.0.think"}, "not the stack of blocks"),
        ({"layers": "lm_head"}, "holds blocks"),
    ],
)
def test_a_wrong_description_is_refused_and_leaves_the_model_as_it_was(said, message):
    model = own_model("gpt")
    with pytest.raises(AnatomyError, match=message):
        steer.describe(model, **said)
    assert Anatomy.find(model).n_layers == LAYERS


def test_attention_of_a_post_norm_block_cannot_be_described():
    with pytest.raises(AnatomyError, match="without the stream as it came"):
        steer.describe(own_model("encoder"), "stack", attn="attend")


def test_the_class_may_hold_the_description():
    class Said(TinyGPT):
        steer_description = {"layers": "transformer.h", "attn": "mix"}

    assert Anatomy.find(Said()).point("layers.0.attn.output").width == WIDTH
    Said.steer_description = {"layers": "transformer.h", "atn": "mix"}
    with pytest.raises(AnatomyError, match="did you mean 'attn'"):
        Anatomy.find(Said())
    Said.steer_description = "transformer.h"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="steer_description"):
        Anatomy.find(Said())


def test_an_example_runs_what_cannot_be_guessed():
    class Robot(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = own_model("gpt")

        def forward(self, state):
            return self.inner(state["words"])[0]

    robot = Robot()
    words = torch.randint(0, VOCAB, (4, 6))
    anatomy = steer.describe(robot, "inner.transformer.h", example=({"words": words},))
    assert anatomy.decoder is robot.inner and anatomy.width == WIDTH
    with Plan(Intervention(Add(vector()), "layers.0.output", "last")).attached(robot) as attachment:
        robot({"words": words})
    assert attachment.fired() == {"add@layers.0.output": 4}


@pytest.mark.parametrize("name", ["gpt", "encoder"])
def test_capture_runs_texts_by_the_models_own_names(name):
    model = own_model(name)
    rows = [Row(tuple(range(3, 3 + length)), 1) for length in (4, 6, 4)]
    means = Means()
    capture(model, rows, {Site.parse("layers.1.output"): means}, span="all")
    seen: list[Tensor] = []
    handle = model.get_submodule(f"{BLOCKS[name]}.1").register_forward_hook(lambda *a: seen.append(a[-1].detach()))
    for i, row in enumerate(rows):
        words = torch.tensor([row.ids])
        model(words) if name == "gpt" else model(words, torch.zeros(1, len(row.ids), dtype=torch.bool))
        assert torch.allclose(means.values[i], seen[-1][0].mean(0), atol=1e-5)
    handle.remove()


def test_capture_refuses_a_model_without_token_ids():
    with pytest.raises(ConfigError, match="texts cannot be run through this TinyPolicy"):
        capture(own_model("policy"), [Row((1, 2), 1)], {Site.parse("layers.0.output"): Means()})


def test_a_plan_is_saved_with_the_fingerprint_of_a_model_without_config(tmp_path):
    model = own_model("gpt")
    fingerprint = Anatomy.find(model).fingerprint()
    assert fingerprint["n_layers"] == LAYERS and fingerprint["width"] == WIDTH and fingerprint["embedding_digest"]
    Plan(Intervention(Add(vector()), "layers.1.output"), fingerprint=fingerprint).save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    loaded.attach(model).detach()
    with pytest.raises(WrongModelError, match="TinyGPT"):
        loaded.attach(TinyEncoder())
