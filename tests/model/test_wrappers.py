"""The same sites through every wrapper a training run may put around a model."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from families import FAMILIES
from hand import edited, ids, recorded, vector
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.parallel import DistributedDataParallel

from steer.errors import HookDidNotRunError
from steer.intervene import Add, Intervention, Plan
from steer.model.anatomy import Anatomy

SITES = ["layers.1.output", "layers.1.attn.z", "layers.1.mlp.output", "layers.1.attn.q"]


def plan(*sites: str, widths: dict[str, int] | None = None) -> Plan:
    return Plan([Intervention(Add(vector((widths or {}).get(site, 32), seed)), site) for seed, site in enumerate(sites)])


def lora(model, targets=("q_proj", "o_proj", "down_proj")):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)).eval()


class Lit(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.net = model

    def training_step(self, batch, _=0):
        return self.net(**batch).loss

    def forward(self, **batch):
        return self.net(**batch)


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(kind, model):
    if kind == "peft":
        return lora(model)
    if kind == "compiled":
        return torch.compile(model, backend="eager")
    if kind == "lightning":
        return Lit(model)
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "checkpoint wrapper":
        apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
        return model
    if kind == "everything":
        return Lit(DistributedDataParallel(torch.compile(lora(model), backend="eager")))
    return model


@pytest.mark.parametrize("kind", ["raw", "peft", "compiled", "lightning", "ddp", "checkpoint wrapper", "everything"])
def test_a_wrapper_changes_nothing(kind, tiny, gloo):
    model = tiny("llama")
    block = model.model.layers[1]
    wrapper = wrapped(kind, model)
    x = ids()
    with torch.no_grad():
        plain = wrapper(input_ids=x).logits
        with edited(block, lambda h: h + vector(seed=0)):
            expected = model(input_ids=x).logits  # the inner model, eager
        with plan("layers.1.output").attached(wrapper) as steered:
            assert torch.allclose(wrapper(input_ids=x).logits, expected, atol=1e-6)
            assert steered.fired() == {"add@layers.1.output": 14}
        assert torch.allclose(wrapper(input_ids=x).logits, plain, atol=1e-6)
    assert not torch.allclose(plain, expected, atol=1e-2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_found_inside_peft_and_lightning(family, tiny):
    model = tiny(family)
    raw = Anatomy.find(model)
    linear = ["c_attn"] if family == "gpt2" else "all-linear"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT about fan_in_fan_out and expert weights
        wrapper = Lit(get_peft_model(model, LoraConfig(r=2, target_modules=linear, task_type="CAUSAL_LM")))
    detected = Anatomy.find(wrapper)
    assert detected.blocks == raw.blocks and detected.path.endswith(raw.path) and detected.unembedding is raw.unembedding
    with torch.no_grad(), recorded(wrapper, SITES) as seen:
        model(ids())
    assert set(seen) == set(SITES)


def test_lora_on_the_hooked_module_is_part_of_the_site(tiny):
    """q is read after the adapter: base + delta, and the same once the delta is merged into the weight."""
    peft = lora(tiny("llama"))
    with torch.no_grad(), recorded(peft, ["layers.1.attn.q", "layers.1.attn.z", "layers.1.attn.output"]) as seen:
        peft(ids())
        adapted = dict(seen)
        with peft.disable_adapter():
            peft(ids())
        base = dict(seen)
        peft.merge_adapter()
        peft(ids())
        merged = dict(seen)
        peft.unmerge_adapter()
    for site, h in adapted.items():
        assert not torch.allclose(h, base[site], atol=1e-2)
        assert torch.allclose(h, merged[site], atol=1e-5)


def test_steering_survives_a_merge_of_the_adapter(tiny):
    peft = lora(tiny("llama"))
    with torch.no_grad(), plan("layers.1.attn.q", "layers.0.output").attached(peft):
        before = peft(ids()).logits
        peft.merge_adapter()
        assert torch.allclose(peft(ids()).logits, before, atol=1e-5)


def test_a_replaced_module_is_noticed(tiny):
    peft = lora(tiny("llama"))
    with plan("layers.1.attn.z", "layers.0.output").attached(peft), torch.no_grad():
        peft(ids())
        merged = peft.merge_and_unload()
        with pytest.raises(HookDidNotRunError, match=r"layers.1.attn.z[\s\S]*attach again"):
            merged(ids())


def test_an_unembedding_that_was_replaced_is_noticed(tiny):
    model = tiny("llama")
    with plan("logits", widths={"logits": 96}).attached(model), torch.no_grad():
        model(ids())
        model.lm_head = torch.nn.Linear(32, 96)
        with pytest.raises(HookDidNotRunError, match="logits"):
            model(ids())


def test_copies_for_modules_to_save_are_not_hooked(tiny):
    model = tiny("llama")
    steered = plan("logits", widths={"logits": 96})
    attachment = steered.attach(model)
    with pytest.warns(UserWarning, match="neither steered nor monitored"):
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(HookDidNotRunError):
        peft(ids())
    attachment.detach()
    with steered.attached(peft), torch.no_grad():
        inside = peft(ids()).logits
    with torch.no_grad():
        assert torch.allclose(inside - peft(ids()).logits, vector(96, 0).expand(2, 7, 96), atol=1e-5)


def test_a_submodule_of_a_lightning_module_is_steered_in_its_training_step(tiny):
    module = Lit(tiny("llama"))
    batch = {"input_ids": ids(), "labels": ids()}
    plain = module.training_step(batch)
    with plan("layers.1.output").attached(module) as steered:
        assert abs(float(module.training_step(batch) - plain)) > 1e-4
        assert steered.fired() == {"add@layers.1.output": 14}


def test_a_second_plan_through_an_outer_wrapper_sees_its_adapters(tiny):
    model = tiny("llama")
    first = plan("layers.0.output").attach(model)
    peft = lora(model, ("q_proj",))
    second = plan("layers.1.output").attach(peft, stack=True)
    with torch.no_grad():
        peft(ids())
        with peft.disable_adapter():
            peft(ids())
    assert first.fired() == {"add@layers.0.output": 14} and second.fired() == {"add@layers.1.output": 14}
    first.detach()
    second.detach()
