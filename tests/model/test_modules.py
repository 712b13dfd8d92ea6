"""Any other nn.Module: networks that are no decoder, and the parts of a model beside its decoder."""

import pytest
import torch
from families import FAMILIES
from hand import edited, ids, vector
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from steer.errors import ContextError, SiteError
from steer.intervene import Add, Intervention, Plan
from steer.model import context
from steer.model.anatomy import Anatomy, module_point
from steer.model.site import Site


class Robot(nn.Module):
    """A vision tower before, and an action head after, a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32))
        self.language = FAMILIES["llama"]()
        self.action = nn.Linear(96, 4)

    def forward(self, pixels, input_ids, **kwargs):
        seen = self.vision(pixels).unsqueeze(1)
        embeds = torch.cat([seen, self.language.get_input_embeddings()(input_ids)], 1)
        return self.action(self.language(inputs_embeds=embeds, **kwargs).logits[:, -1])


def test_modules_beside_the_decoder():
    robot = Robot()
    pixels = torch.randn(2, 8)
    with torch.no_grad():
        plain = robot(pixels, ids())
        with edited(robot.vision[1], lambda h: h + vector()), edited(robot.action, lambda h: h + vector(4)):
            expected = robot(pixels, ids(), use_cache=True)
    beside = [Intervention(Add(vector()), "module:vision.1:output"), Intervention(Add(vector(4)), "module:action:output")]
    text = Intervention(Add(vector()), "layers.0.output", strength=0.0)
    plan = Plan([*beside, text])
    with plan.attached(robot) as attachment, torch.no_grad():
        assert torch.allclose(robot(pixels, ids(), use_cache=True), expected, atol=1e-6)
        assert attachment.fired() == {"add@module:vision.1:output": 1, "add@module:action:output": 1, "add@layers.0.output": 0}
        robot.language(ids())  # the tower and the head have no part in this pass
    assert attachment.fired()["add@module:vision.1:output"] == 1
    with torch.no_grad():
        assert torch.equal(robot(pixels, ids()), plain)
    only = Plan(Intervention(Add(vector()), "module:vision.1:output", scope="last"))
    with pytest.raises(ContextError, match="needs tokens"), only.attached(robot):
        robot(pixels, ids())


def test_phases_reach_modules_beside_the_decoder():
    robot = Robot()
    counted = {}
    for phase in context.PHASES:
        plan = Plan([Intervention(Add(vector()), "module:vision.1:output", phases=phase, name=phase)])
        with plan.attached(robot) as attachment:
            robot(torch.randn(2, 8), ids(), use_cache=False)
            with torch.no_grad():
                robot(torch.randn(2, 8), ids(), use_cache=False)
                robot(torch.randn(2, 8), ids(), use_cache=True)
                robot(torch.randn(2, 8), ids(), use_cache=True)
        counted |= attachment.fired()
    assert counted == {"train": 1, "validate": 1, "generate": 2}


def test_a_module_that_never_ran_is_said_at_the_end(tiny):
    model = tiny("llama")
    with pytest.warns(UserWarning, match="module:model.layers.1.self_attn.o_proj:output never ran"), torch.no_grad():
        with Plan(Intervention(Add(vector()), "module:model.layers.1.self_attn.o_proj:output")).attached(model):
            model.model.layers[1].self_attn.o_proj = nn.Linear(32, 32)
            model(ids())


def test_a_network_that_is_no_decoder():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(5, 4)
    plain = net(x)
    with edited(net[0], lambda h: h + vector(6)):
        expected = net(x)
    plan = Plan([Intervention(Add(vector(6)), "module:0:output"), Intervention(Add(vector(4)), "module:0:input", strength=0.0)])
    with plan.attached(net) as attachment:
        assert torch.allclose(net(x), expected, atol=1e-6)
        net[0](x)  # called on its own: it acts there too
        assert attachment.fired() == {"add@module:0:output": 2, "add@module:0:input": 0}
    assert torch.equal(net(x), plain)
    with Plan(Intervention(Add(vector(4)), "module:0:input")).attached(net.double()) as doubled:
        assert net(x.double()).dtype == torch.float64
        assert doubled.fired() == {"add@module:0:input": 1}


def test_paths_may_leave_a_wrappers_prefix_out_but_not_be_ambiguous(tiny):
    model = tiny("llama")
    assert module_point(model, Site.parse("module:layers.1.mlp:output")).path == "model.layers.1.mlp"
    with pytest.raises(SiteError, match=r"ambiguous[\s\S]*layers.0.mlp"):
        module_point(model, Site.parse("module:mlp:output"))
    with pytest.raises(SiteError, match=r"not in LlamaForCausalLM[\s\S]*model.layers.1.mlp"):
        module_point(model, Site.parse("module:model.layers.1.mpl:output"))


def test_what_a_module_gives_must_hold_a_tensor():
    class Words(nn.Module):
        def forward(self, x):
            return "words"

    net = nn.Sequential(Words())
    attachment = Plan(Intervention(Add(vector(4)), "module:0:output")).attach(net)
    with pytest.raises(SiteError, match=r"gives no tensor[\s\S]*str"):
        net(torch.zeros(1, 4))
    attachment.enable(False)
    with pytest.warns(UserWarning, match="never ran"):
        attachment.detach()


@pytest.mark.parametrize("kind", [tuple, list])
def test_the_rest_of_a_tuple_or_list_is_passed_on(kind):
    class Pair(nn.Module):
        def forward(self, x):
            return kind((x, "rest"))

    net = nn.Sequential(Pair())
    with Plan(Intervention(Add(vector(4)), "module:0:output")).attached(net):
        out = net(torch.zeros(1, 4))
    assert type(out) is kind and out[1] == "rest" and torch.equal(out[0][0], vector(4))


def test_a_vision_language_model():
    """The decoder is found beside the tower; image tokens are prompt; the tower runs in the prefill only."""
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
    text = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=95, image_seq_length=4)
    model = LlavaForConditionalGeneration(config).eval()
    batch = {"input_ids": ids(1, 8), "pixel_values": torch.randn(1, 3, 8, 8), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    batch["input_ids"][0, 1:5] = 95
    anatomy = Anatomy.find(model)
    assert anatomy.path == "model.language_model" and anatomy.unembedding is model.lm_head
    tower = "module:vision_tower.encoder.layers.1:output"
    interventions = [
        Intervention(Add(vector()), "layers.1.output", "response", name="text"),
        Intervention(Add(vector(16)), tower, name="tower"),
    ]
    plan = Plan(interventions)
    with torch.no_grad():
        plain = model(**batch).logits
        with plan.attached(model) as attachment:
            labels = batch["input_ids"].clone()
            labels[:, :6] = -100
            assert not torch.allclose(model(**batch, labels=labels).logits, plain, atol=1e-3)
            assert attachment.fired() == {"text": 2, "tower": 1}
            model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            assert attachment.fired() == {"text": 4, "tower": 2}
        assert torch.equal(model(**batch).logits, plain)
