"""Baking accepts a weight edit for what it changes: in half precision, rounding hides a wrong small edit from a look at the states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from hand import hook_count, ids, relative, vector
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import steer
from steer.errors import DeployError
from steer.intervene import Ablate, Add, Intervention, Plan, Scale
from steer.intervene.deploy import bake

HALF = (torch.bfloat16, torch.float16)
WRITERS = ["embed", *(f"layers.{n}.{part}" for n in range(3) for part in ("attn.output", "mlp.output"))]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def granite(dtype: torch.dtype) -> PreTrainedModel:
    """A llama whose blocks add 0.22 of what their maps give, and whose embedding is scaled."""
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = GraniteForCausalLM(GraniteConfig(**shape, **heads, residual_multiplier=0.22, embedding_multiplier=12.0))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.0))
    return model.eval().to(dtype)


def dosed(model: PreTrainedModel, dose: float, site: str = "layers.1.output") -> Plan:
    """An addition of a share of the size of the states."""
    states = model(input_ids=ids(), output_hidden_states=True).hidden_states[0 if site == "embed" else 2]
    v = vector()
    return Plan(Intervention(Add(v / v.norm() * states.float().norm(dim=-1).mean() * dose), site))


def held(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    hooks = {"hooks": (hook_count(model), torch.empty(0))}
    return hooks | {name: (id(tensor), tensor.clone()) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = held(model)
    assert after.keys() == before.keys()
    for name, (same, value) in before.items():
        assert after[name][0] == same and after[name][1].dtype == value.dtype and torch.equal(after[name][1], value), name


@pytest.mark.parametrize("dose", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_a_scaled_family_is_refused_at_every_dose(dtype, dose, tmp_path):
    model = granite(dtype)
    plans = [dosed(model, dose, site) for site in ("layers.1.output", "embed")]
    before = held(model)
    for plan in plans:
        with pytest.raises(DeployError, match="scales"):
            bake(plan, model, savable=False)
        with pytest.raises(DeployError, match="scales"):
            steer.to_adapter(plan, model, tmp_path / "adapter")
    assert_untouched(model, before)
    assert not (tmp_path / "adapter").exists()


def test_the_refusal_is_right():
    """Editing the weights by hand gives 0.22 of the intervention."""
    model = granite(torch.float32)
    plan = dosed(model, 0.1)
    with plan.attached(model):
        expected = model.model(input_ids=ids())[0]
    plain = model.model(input_ids=ids())[0]
    down = model.model.layers[1].mlp.down_proj
    down.bias = nn.Parameter(plan.interventions[0].operator.tensors["vector"].clone())
    assert relative(model.model(input_ids=ids())[0] - plain, expected - plain) > 0.7


def test_a_small_wrong_edit_is_not_hidden_by_a_large_right_edit():
    model = granite(torch.bfloat16)
    right = [Intervention(Ablate(vector(seed=5)), "layers.2.attn.z")]
    bake(Plan(right), model, savable=False).undo()
    with pytest.raises(DeployError, match="scales"):
        bake(Plan([*right, *dosed(model, 0.02).interventions]), model, savable=False)


@pytest.mark.parametrize("dose", [0.01, 0.1])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma2", "gemma3", "olmo2"}))
def test_a_right_weight_edit_is_accepted_at_every_dose(family, dtype, dose, tiny):
    model = tiny(family).to(dtype)
    plans = [Plan([Intervention(Ablate(vector(seed=3)), site, strength=dose) for site in WRITERS[1:]])]
    if not steer.Anatomy.find(model).moe:
        width = steer.Anatomy.find(model).point("layers.1.mlp.neurons").width
        plans += [dosed(model, dose), Plan(Intervention(Scale(vector(width), 1 + dose), "layers.1.mlp.neurons"))]
    before = held(model)
    for plan in plans:
        with bake(plan, model, savable=False):
            pass
        assert_untouched(model, before)


def test_experts_are_tried_too(tiny):
    """A stack of experts whose outputs are turned is no longer what the plan would edit."""
    model = tiny("mixtral").bfloat16()
    plan = Plan(Intervention(Ablate(vector(seed=3)), "layers.1.mlp.output", strength=0.05))
    bake(plan, model).undo()
    model.model.layers[1].mlp.experts.register_forward_hook(lambda module, args, output: output.roll(1, -1))
    with pytest.raises(DeployError, match="scales"):
        bake(plan, model)


# ---- what float32 needs


def test_attention_that_has_half_precision_only(tiny):
    def flash(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
        if query.dtype == torch.float32:
            raise RuntimeError("only fp16 and bf16")
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *args, **options)

    ALL_ATTENTION_FUNCTIONS.register("half_only", flash)
    model = tiny("llama").bfloat16()
    model.config._attn_implementation = "half_only"
    bake(dosed(model, 0.05), model, savable=False)
    assert model.config._attn_implementation == "half_only"


def test_compiled_blocks_are_not_traced_again(tiny):
    model = tiny("llama").bfloat16()
    plan = dosed(model, 0.05)
    torch._dynamo.reset()
    for block in model.model.layers:
        block.compile(backend="eager", fullgraph=True)
    before = held(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        bake(plan, model, savable=False).undo()
    assert_untouched(model, before)


@pytest.mark.parametrize("where", ["inside", "at the end"])
def test_a_model_that_does_not_run_in_float32_is_refused(where, tiny):
    model = tiny("llama").bfloat16()
    plan = dosed(model, 0.05)
    mlp = model.model.layers[1].mlp
    if where == "inside":
        mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)).bfloat16() * mlp.up_proj(x).bfloat16())
    else:
        model.model.norm.register_forward_hook(lambda module, args, output: output.bfloat16())
    before = held(model)
    with pytest.raises(DeployError, match="float32") as caught:
        bake(plan, model, savable=False)
    assert "float32" in caught.value.remedy
    assert_untouched(model, before)


def test_what_overflows_in_half_precision_is_refused(tiny):
    model = tiny("llama").half()
    before = held(model)
    large = vector() / vector().abs().max() * 6e4  # which fp16 holds, but not twice
    with pytest.raises(DeployError, match="overflow in float16"):
        bake(Plan([Intervention(Add(large), f"layers.{layer}.output") for layer in (0, 1)]), model, savable=False)
    assert_untouched(model, before)


@pytest.mark.parametrize("older", [True, False])
def test_products_are_exact_while_it_is_tried(older, tiny, monkeypatch):
    """TF32 and autocast round more than a small edit is worth."""
    model, seen, matmul = tiny("llama"), [], torch.backends.cuda.matmul
    if older:
        torch.set_float32_matmul_precision("high")
    else:
        matmul.fp32_precision = "tf32"
    precision = matmul.fp32_precision
    model.model.register_forward_hook(lambda *_: seen.append((matmul.fp32_precision, torch.is_autocast_enabled("cpu"))))
    try:
        plan = dosed(model, 0.01)
        with torch.autocast("cpu", torch.bfloat16):
            seen.clear()
            assert bake(plan, model, savable=False).error < 1e-6
        assert set(seen) == {("ieee", False)} and matmul.fp32_precision == precision == "tf32"
    finally:
        if older:
            torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"


# ---- undoing what has changed since


def changes() -> dict[str, tuple[str, Callable[[PreTrainedModel], Any]]]:
    """What is changed after a bake, and what the error names."""
    mlp, attn = "layers.1.mlp.down_proj", "layers.1.self_attn.o_proj"

    def everything(model: PreTrainedModel) -> None:
        vector_to_parameters(parameters_to_vector(model.parameters()) + 0.5, model.parameters())

    def replaced(model: PreTrainedModel) -> None:
        model.get_submodule(f"model.{attn}").weight = nn.Parameter(torch.zeros(32, 32))

    return {
        "all of them, through .data": (f"{attn}.weight", everything),
        "a weight, in place through .data": (f"{attn}.weight", lambda m: m.get_submodule(f"model.{attn}").weight.data.mul_(2)),
        "another weight in its place": (f"{attn}.weight", replaced),
        "the type": (f"{attn}.weight", lambda m: m.half()),
        "a new bias": (f"{mlp}.bias", lambda m: m.get_submodule(f"model.{mlp}").bias.data.add_(1)),
        "a new bias that is gone": (f"{mlp}.bias", lambda m: m.get_submodule(f"model.{mlp}").register_parameter("bias", None)),
        "a setting": ("config.mlp_bias", lambda m: setattr(m.config, "mlp_bias", False)),
    }


@pytest.mark.parametrize("what", changes())
def test_undo_throws_away_nothing_that_came_after_the_bake(what, tiny):
    model = tiny("llama")
    ablation = Intervention(Ablate(vector(seed=3)), "layers.1.attn.output")
    baked = bake(Plan([ablation, Intervention(Add(vector()), "layers.1.output")]), model)
    named, change = changes()[what]
    change(model)
    later, config = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()
    with pytest.raises(DeployError, match=named):
        baked.undo()
    after = model.state_dict()
    assert after.keys() == later.keys() and all(torch.equal(after[name], later[name]) for name in later)
    assert model.config.to_dict() == config


def test_undo_goes_on_after_what_leaves_the_values_alone(tiny):
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    baked = bake(Plan([Intervention(Ablate(vector(seed=3)), "layers.1.attn.output")]), model)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    baked.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
