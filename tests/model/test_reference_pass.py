"""The pass of a reference adapter, which TRL and loops of one's own switch to instead of switching the adapters off."""

import pytest
import torch
from hand import edited, ids, vector
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn

from steer.intervene import Add, Intervention, Plan

TASK = {"task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj"], **TASK),
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], **TASK),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **TASK),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "adaption prompt": AdaptionPromptConfig(adapter_len=2, adapter_layers=2, **TASK),
}


def plan(**options) -> Plan:
    return Plan(Intervention(Add(vector()), "layers.1.output", **options))


def with_two(how: str, name: str, tiny) -> PeftModel:
    model = get_peft_model(tiny("llama"), ADAPTERS[how])
    model.add_adapter(name, ADAPTERS[how])
    return model.eval()


@pytest.mark.parametrize("how", ADAPTERS)
@pytest.mark.parametrize("name", ["ref", "reference"])
def test_a_reference_adapter_is_not_steered(how, name, tiny):
    model = with_two(how, name, tiny)
    model.set_adapter(name)
    with torch.no_grad():
        plain = model(input_ids=ids()).logits
        with plan().attached(model) as attachment:
            assert torch.equal(model(input_ids=ids()).logits, plain)
            model.set_adapter("default")
            assert attachment.fired() == {"add@layers.1.output": 0}
            model(input_ids=ids())
    assert attachment.fired()["add@layers.1.output"] >= ids().numel()


@pytest.mark.parametrize(
    ("name", "is_reference"),
    [("dpo_ref", True), ("Reference-2", True), ("teacher", True), ("ref.policy", True), ("refined", False), ("preference", False)],
)
def test_names_of_reference_adapters(name, is_reference, tiny):
    model = with_two("lora", name.replace(".", "-"), tiny)  # no module may have a dot in its name
    model.set_adapter(name.replace(".", "-"))
    with plan().attached(model) as attachment, torch.no_grad():
        model(input_ids=ids())
    assert attachment.fired() == {"add@layers.1.output": 0 if is_reference else ids().numel()}


def test_a_frozen_copy_beside_the_adapter_in_training_is_the_reference(tiny, tmp_path):
    get_peft_model(tiny("llama"), ADAPTERS["lora"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    model.load_adapter(tmp_path, adapter_name="start")
    with plan().attached(model) as attachment, torch.no_grad():
        model.set_adapter("start")
        model(input_ids=ids())
        assert attachment.fired() == {"add@layers.1.output": 0}
        model.set_adapter("default")
        model(input_ids=ids())
    assert attachment.fired() == {"add@layers.1.output": ids().numel()}


def test_of_several_adapters_that_are_all_loaded_for_inference_each_is_the_policy(tiny, tmp_path):
    get_peft_model(tiny("llama"), ADAPTERS["lora"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    model.load_adapter(tmp_path, adapter_name="other")
    model.set_adapter("other")
    base: nn.Module = model.get_base_model()
    with edited(base.model.layers[1], lambda h: h + vector()), torch.no_grad():
        by_hand = model(input_ids=ids()).logits
    with plan().attached(model), torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids()).logits, by_hand)
