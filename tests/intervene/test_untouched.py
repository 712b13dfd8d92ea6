"""Attaching changes nothing of a model but our own entries in its hook dictionaries, and copies of it are not steered behind one's back."""

import copy
import io
import pickle

import pytest
import torch
from families import FAMILIES
from hand import hook_count, ids, vector
from peft import LoraConfig, get_peft_model

from steer.intervene import Ablate, Add, Intervention, Plan

SITES = ["embed", "layers.0.output", "layers.1.attn.z", "layers.1.attn.q", "layers.1.attn.output", "layers.2.mlp.output", "logits"]


def everywhere(model) -> Plan:
    from steer.model.anatomy import Anatomy

    anatomy = Anatomy.find(model)
    return Plan([Intervention(Add(vector(anatomy.point(site).width)), site) for site in SITES])


def portrait(model) -> dict:
    """Everything of a model that a user could notice."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "parameters": [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        "buffers": [(name, id(buffer)) for name, buffer in model.named_buffers()],
        "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "forwards": {name: module.forward.__func__ for name, module in model.named_modules()},
        "config": str(getattr(model, "config", "")),
    }


def same(a: dict, b: dict) -> None:
    for key in a:
        if key == "state":
            assert list(a[key]) == list(b[key]) and all(torch.equal(a[key][name], b[key][name]) for name in a[key])
        else:
            assert a[key] == b[key], key


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("peft", [False, True])
def test_a_model_looks_the_same_while_attached_and_afterwards(family, peft, tiny):
    model = tiny(family).train()
    if peft:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=[r".*(q_proj|c_attn|query_key_value|qkv_proj)"][0]))
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    model(ids())  # transformers sets attributes of its own in the first pass
    before = portrait(model)
    count = hook_count(model)
    attachment = everywhere(model).attach(model)
    with torch.no_grad():
        model(ids())
    same(portrait(model), before)
    assert hook_count(model) > count
    attachment.detach()
    same(portrait(model), before)
    assert hook_count(model) == count


def test_other_peoples_hooks_stay_and_keep_their_order(tiny):
    model = tiny("llama")
    block, order = model.model.layers[1], []
    names = ["first", "second", "third"]
    handles = [block.register_forward_hook(lambda *_, name=name: order.append(name)) for name in names[:2]]
    pre = block.register_forward_pre_hook(lambda *_: order.append("pre"))
    with Plan([Intervention(Add(vector()), f"layers.1.{side}") for side in ("input", "output")]).attached(model):
        handles.append(block.register_forward_hook(lambda *_: order.append("third")))
        model(ids())
        assert order == ["pre", "first", "second", "third"]
    order.clear()
    model(ids())
    assert order == ["pre", "first", "second", "third"]
    for handle in [*handles, pre]:
        handle.remove()
    assert hook_count(model) == 0


def test_everybody_who_looks_sees_the_steered_activation(tiny):
    """Covers a recorder from before the attach, too: hooks that transformers keeps after a first output_hidden_states=True."""
    model = tiny("llama")
    with torch.no_grad():
        plain = model(ids(), output_hidden_states=True).hidden_states
        seen = []
        handle = model.model.layers[1].register_forward_hook(lambda _, __, output: seen.append(output))
        with Plan(Intervention(Add(vector()), "layers.1.output")).attached(model):
            steered = model(ids(), output_hidden_states=True).hidden_states
        handle.remove()
    assert torch.equal(steered[1], plain[1])
    assert torch.allclose(steered[2], plain[2] + vector(), atol=1e-6) and torch.equal(seen[0], steered[2])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_steered_model_is_plain_and_says_so(how, tiny):
    model = tiny("llama")
    with torch.no_grad():
        plain = model(ids()).logits
        with everywhere(model).attached(model) as attachment:
            steered = model(ids()).logits
            if how == "deepcopy":
                with pytest.warns(UserWarning, match="neither steered nor monitored") as caught:
                    duplicate = copy.deepcopy(model)
                assert len(caught) == 1
            elif how == "pickle":
                with pytest.warns(UserWarning, match="neither steered nor monitored"):
                    duplicate = pickle.loads(pickle.dumps(model))
            else:
                stream = io.BytesIO()
                with pytest.warns(UserWarning, match="neither steered nor monitored"):
                    torch.save(model, stream)
                duplicate = torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
            fired = attachment.fired()
            assert torch.equal(duplicate(ids()).logits, plain) and attachment.fired() == fired
            assert torch.equal(model(ids()).logits, steered)
        with everywhere(duplicate).attached(duplicate):  # the copy can be steered on its own
            assert torch.equal(duplicate(ids()).logits, steered)
        assert torch.equal(duplicate(ids()).logits, plain)


def test_saving_a_steered_model_saves_the_plain_one(tmp_path, tiny):
    model = tiny("llama")
    with torch.no_grad():
        plain = model(ids()).logits
        with everywhere(model).attached(model):
            model.save_pretrained(tmp_path)
        assert torch.equal(type(model).from_pretrained(tmp_path)(ids()).logits, plain)


def test_training_moves_the_weights_and_not_the_plan(tiny):
    model = tiny("llama").train()
    plan = Plan([Intervention(Add(vector()), "layers.1.output"), Intervention(Ablate(vector(seed=2)), "layers.0.output")])
    tensors = [{key: value.clone() for key, value in intervention.operator.tensors.items()} for intervention in plan.interventions]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with plan.attached(model):
        for _ in range(3):
            model(ids(), labels=ids()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for intervention, before in zip(plan.interventions, tensors, strict=True):
        assert all(torch.equal(intervention.operator.tensors[key], before[key]) and not before[key].requires_grad for key in before)
