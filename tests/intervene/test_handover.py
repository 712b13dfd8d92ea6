"""Weights that another engine copies: they hold what the attached plan does at that moment, and are as they were afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from hand import ids, vector
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import steer
from steer.errors import AttachError, DeployError
from steer.intervene import Ablate, Add, Intervention, Plan
from steer.intervene.schedules.linear import Linear

BLOCKS = "layers.*"


pytestmark = pytest.mark.filterwarnings("ignore:the plan was attached, but no forward pass")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def ablation() -> Plan:
    """The writers of every block, since no bias is needed."""
    return Plan([Intervention(Ablate(vector()), f"{BLOCKS}.{part}", name=part) for part in ("attn.output", "mlp.output")])


def constant(**options: Any) -> Plan:
    return Plan(Intervention(Add(vector()), "layers.1.output", name="add", **options))


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=ids(2, 7)).logits


class Engine:
    """What samples rollouts: a model of its own, which gets weights by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)

    def load(self, model: nn.Module) -> None:
        self.model.load_state_dict(model.state_dict())


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("family", "plan"), [("llama", ablation()), ("qwen3_moe", ablation()), ("gpt2", constant()), ("opt", constant())])
def test_the_engine_does_what_the_plan_does(family: str, plan: Plan) -> None:
    model = FAMILIES[family]()
    engine, before = Engine(model), parameters(model)
    plain = logits(model)
    handover = steer.Handover(plan, model)
    with plan.attached(model) as attachment:
        with handover.weights(attachment) as baked:
            engine.load(model)
        steered = logits(model)
        assert baked.changed == []  # undone
    assert torch.allclose(logits(engine.model), steered, atol=1e-4) and not torch.allclose(plain, steered, atol=1e-2)
    after = parameters(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_strengths_are_those_of_the_moment() -> None:
    model = FAMILIES["gpt2"]()
    plan = constant(schedule=Linear(steps=10))
    engine, plain = Engine(model), logits(model)
    handover = steer.Handover(plan, model)
    with plan.attached(model) as attachment:
        seen = []
        for step in (0, 5, 10):
            attachment.step(step)
            with handover.weights(attachment):
                engine.load(model)
            seen.append(logits(engine.model))
            assert torch.allclose(seen[-1], logits(model), atol=1e-4)
        attachment.enable(False)
        with handover.weights(attachment):
            engine.load(model)
    assert torch.equal(seen[0], plain) and not torch.allclose(seen[1], seen[2], atol=1e-2)
    assert torch.equal(logits(engine.model), plain)


def test_a_learned_vector_is_that_of_the_moment() -> None:
    model = FAMILIES["gpt2"]()
    plan = Plan(Intervention(Add(vector()).train(), "layers.1.output", name="add"))
    engine, handover = Engine(model), steer.Handover(plan, model)
    with plan.attached(model) as attachment:
        plan.parameters()[0].mul_(-3)
        with handover.weights(attachment):
            engine.load(model)
        assert torch.allclose(logits(engine.model), logits(model), atol=1e-4)


def test_weights_may_change_between_two_handovers() -> None:
    model, plan = FAMILIES["llama"](), ablation()
    engine, handover = Engine(model), steer.Handover(plan, model)
    with plan.attached(model) as attachment:
        for parameter in model.parameters():
            parameter.mul_(1.1)
        with handover.weights(attachment):
            engine.load(model)
        assert torch.allclose(logits(engine.model), logits(model), atol=1e-4)


def test_adapters_are_merged_inside_of_it() -> None:
    base = FAMILIES["gpt2"]()
    engine = Engine(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM", init_lora_weights=False))
    plan = constant()
    handover = steer.Handover(plan, model)
    with plan.attached(model) as attachment:
        with handover.weights(attachment):
            model.merge_adapter()
            state = {name.removeprefix("base_model.model.").replace(".base_layer", ""): t for name, t in model.state_dict().items()}
            engine.model.load_state_dict({name: tensor for name, tensor in state.items() if "lora_" not in name})
            model.unmerge_adapter()
        assert torch.allclose(logits(engine.model), logits(model), atol=1e-4)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_copy_leaves_the_weights_as_they_were(error: type[BaseException]) -> None:
    model, plan = FAMILIES["llama"](), ablation()
    before, handover = parameters(model), steer.Handover(plan, model)
    with plan.attached(model) as attachment:
        with pytest.raises(error), handover.weights(attachment):
            raise error
        assert attachment.is_attached
    after = parameters(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_was_written_within_is_not_thrown_away_unsaid() -> None:
    model, plan = FAMILIES["gpt2"](), constant()
    handover = steer.Handover(plan, model)
    with (
        plan.attached(model) as attachment,
        pytest.raises(DeployError, match="changed after the bake"),
        handover.weights(attachment) as baked,
    ):
        model.get_parameter(baked.changed[0]).add_(1)


REFUSED = {
    "a bias that the model lacks": ("llama", constant(), r"'model.layers.1.mlp.down_proj' by a constant[\s\S]*mlp_bias=True"),
    "a tied embedding": ("gpt2", Plan(Intervention(Ablate(vector()), "embed")), r"whose weight the head uses too[\s\S]*untie=True"),
    "not in rollouts": ("gpt2", constant(phases=["train"]), r"switched on in the phase 'generate'"),
    "a scope": ("gpt2", constant(scope="response"), r"expected: scope 'all'"),
    "a kept norm": ("gpt2", constant(preserve_norm=True), r"preserve_norm=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_weights_cannot_carry_is_refused_first(case: str) -> None:
    family, plan, message = REFUSED[case]
    model = FAMILIES[family]()
    before = parameters(model)
    with pytest.raises(DeployError, match=message):
        steer.Handover(plan, model)
    after = parameters(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_another_plan_and_an_attached_model_are_refused() -> None:
    model, plan = FAMILIES["gpt2"](), constant()
    handover = steer.Handover(plan, model)
    with constant().attached(model) as other:
        with pytest.raises(AttachError, match="for the plan that it was proved with"), handover.weights(other):
            pass
        with pytest.raises(AttachError, match="attached"):
            steer.Handover(plan, model)
