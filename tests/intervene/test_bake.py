"""Baked plans against the same plans at run time, on every family: equal, undone to the bit, saved and loaded; or refused by name."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from features.feature_plans import autoencoder
from hand import ids, padded, vector
from method_tables import own_names
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import steer
from steer import AddDecoder
from steer.errors import AttachError, DeployError, WidthError
from steer.intervene import (
    OPERATORS,
    Ablate,
    AblateComponents,
    AblateThenAdd,
    Ace,
    Add,
    Clamp,
    Erase,
    GateComponents,
    HeadShift,
    Intervention,
    LoReFT,
    Mirror,
    Operator,
    Plan,
    ProbeGate,
    ReftR1,
    Replace,
    Rotate,
    Scale,
)
from steer.intervene.deploy import bake
from steer.intervene.deploy.check import evaluating

LAYERS = range(3)
ROWS = torch.stack([vector(seed=2), vector(seed=3)])
WRITERS = ["embed", *(f"layers.{n}.{part}" for n in LAYERS for part in ("attn.output", "mlp.output"))]
SANDWICH = ("gemma2", "gemma3", "olmo2")
MIXTURES = ("mixtral", "qwen3_moe")
TIED = ("gemma2", "gemma3", "gpt2", "opt", "falcon", "smollm3")
SAVED_BIAS = {  # families whose configuration speaks of a bias of the MLP, and of attention
    "mlp": ("llama", "smollm3", "falcon", "gpt2", "gpt_neox", "opt"),
    "attn": ("llama", "smollm3", "falcon", "gpt2", "gpt_neox", "opt", "qwen3", "qwen3_moe"),
}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def steered(model: nn.Module, plan: Plan, **inputs: Tensor) -> Tensor:
    with plan.attached(model):
        return model(**(inputs or {"input_ids": ids()})).logits


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=ids()).logits


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def adding(*sites: str) -> Plan:
    return Plan([Intervention(Add(vector(seed=7 + i)), site, strength=1.5 - i) for i, site in enumerate(sites)])


# ---- additions and ablations


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(
    "sites",
    [("layers.2.output",), ("layers.2.input", "layers.1.output", "layers.1.mlp.output"), ("layers.0.attn.output",)],
    ids="-".join,
)
def test_an_addition_becomes_a_bias(family, sites, tiny):
    model, plan = tiny(family), adding(*sites)
    in_mlp = "attn" not in sites[0]
    if family in SANDWICH or (in_mlp and family in MIXTURES):
        with pytest.raises(DeployError, match="norm" if family in SANDWICH else "mixture of experts"):
            bake(plan, model)
        return
    expected, plain = steered(model, plan), logits(model)
    saved = family in SAVED_BIAS["mlp" if in_mlp else "attn"]
    if not saved:
        with pytest.raises(DeployError, match="savable=False"):
            bake(plan, model)
        assert torch.equal(logits(model), plain)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with bake(plan, model, savable=saved) as baked:
        assert_close(logits(model), expected)
        assert baked.error < 1e-6 and all(name.endswith(".bias") for name in baked.changed)
    assert torch.equal(logits(model), plain) and not torch.allclose(expected, plain, atol=1e-2)
    after = model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_addition_to_the_embedding(family, tiny):
    """Learned positions take it, else a tied head gets a copy of the old embedding; Gemma's scale is found out by running."""
    model, plan = tiny(family), adding("embed")
    plain, positions = logits(model), family in ("gpt2", "opt")
    if family in ("gemma2", "gemma3"):
        with pytest.raises(DeployError, match="scales"):
            bake(plan, model)
        assert torch.equal(logits(model), plain)
        return
    expected = steered(model, plan)
    with bake(plan, model) as baked:
        assert_close(logits(model), expected)
        assert len(baked.changed) == (2 if family in TIED and not positions else 1)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ablation_of_everything_written_is_orthogonal_weights(family, tiny):
    model = tiny(family)
    plan = Plan([Intervention(Ablate(ROWS), site) for site in WRITERS])
    if family in SANDWICH:
        with pytest.raises(DeployError):
            bake(plan, model)
        return
    expected, plain = steered(model, plan), logits(model)
    with bake(plan, model) as baked:
        assert_close(logits(model), expected)
        assert not any(name.endswith("bias") for name in baked.changed) or family in ("gpt2", "gpt_neox", "opt")
        states = model(input_ids=ids(), output_hidden_states=True).hidden_states[:-1]
        unit = torch.linalg.qr(ROWS.mT).Q
        assert all((state @ unit).abs().max() < 1e-4 * state.abs().max() for state in states)
    assert torch.equal(logits(model), plain)


def test_ablation_of_the_stream_bakes_only_where_nothing_is_left_to_remove(tiny):
    model = tiny("llama")
    everywhere = [Intervention(Ablate(ROWS), site) for site in WRITERS]
    stream = [Intervention(Ablate(ROWS[0]), f"layers.{n}.{side}") for n in LAYERS for side in ("input", "output")]
    as_published = Plan([*everywhere, *stream])  # refusal_direction hooks the inputs of blocks too
    expected = steered(model, as_published)
    with bake(as_published, model):
        assert_close(logits(model), expected)
    for remaining in ([], everywhere[1:], everywhere[:-2], [*everywhere, Intervention(Add(vector()), "layers.1.mlp.output")]):
        plan = Plan([*remaining, Intervention(Ablate(ROWS[0]), "layers.2.output")])
        with pytest.raises(DeployError, match="layers.2.output"):
            bake(plan, model, savable=False)
    half = Plan([Intervention(Ablate(ROWS), site, strength=0.5) for site in WRITERS] + [Intervention(Ablate(ROWS), "layers.2.output")])
    with pytest.raises(DeployError, match="layers.2.output"):
        bake(half, model)


def test_a_clamp_of_a_silent_stream_adds_its_value(tiny):
    model = tiny("llama")
    silent = [Intervention(Ablate(ROWS), site) for site in WRITERS]
    clamp = Intervention(Clamp(ROWS[0], 1.5), "layers.2.input")
    beside = Add(vector() - (vector() @ ROWS[0]) / (ROWS[0] @ ROWS[0]) * ROWS[0])
    plan = Plan([*silent, clamp, Intervention(beside, "layers.1.output")])  # the output comes before the input of the next
    expected = steered(model, plan)
    with bake(plan, model):
        assert_close(logits(model), expected)
    with pytest.raises(DeployError, match="layers.2.input"):
        bake(Plan([*silent, clamp, Intervention(Add(ROWS[0]), "layers.1.output")]), model)


# ---- other operators and sites


def affine_operators(width: int, site: str = "layers.1.output") -> dict[str, Any]:
    a, b, rows = vector(width, 4), vector(width, 5), torch.stack([vector(width, 6), vector(width, 7)])
    return {
        "add": Add(a),
        "add_decoder": AddDecoder(autoencoder(width=width, site=site), [7, 2], 0.5),
        "ablate": Ablate(rows),
        "ablate_then_add": AblateThenAdd(a),
        "ablate_components": AblateComponents(a.relu(), b),
        "ace": Ace(a, b, 0.4),
        "clamp": Clamp(a, 1.5),
        "erase": Erase(torch.linalg.pinv(rows).mT, rows, b),
        "gate_components": GateComponents(a[:3], torch.arange(width) % 4, b),
        "head_shift": HeadShift(vector(2 * width // 4).view(2, -1), [0, 3], 4),
        "loreft": LoReFT(rows, rows.flip(0), torch.tensor([0.3, -1.0])),
        "reft_r1": ReftR1(a, level=1.2),
        "replace": Replace(a, b),
        "rotate": Rotate(rows, 0.7),
        "scale": Scale(a, 2.5),
    }


def test_every_affine_operator_is_tested():
    affine = affine_operators(32)
    known = {name for name in own_names(OPERATORS) if OPERATORS.get(name).is_affine is not Operator.is_affine}
    assert affine.keys() == known, f"`affine_operators` of tests/intervene/test_bake.py and the registry differ in {affine.keys() ^ known}"
    assert all(operator.is_affine() for operator in affine.values())
    rest = [Clamp(vector(), low=0.0), Rotate(ROWS, 0.7, towards=True), ReftR1(vector()), Mirror(vector())]
    assert not any(operator.is_affine() for operator in rest)


@pytest.mark.parametrize("name", affine_operators(32))
@pytest.mark.parametrize("site", ["layers.1.attn.output", "layers.1.mlp.neurons", "layers.0.attn.v"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_affine_operator_at_what_linear_maps_take_and_give(name, site, family, tiny):
    model, site = tiny(family), "layers.1.attn.z" if name == "head_shift" else site
    width = steer.Anatomy.find(model).point(site).width
    plan = Plan(Intervention(affine_operators(width, site)[name], site, strength=0.8))
    expected, plain = steered(model, plan), logits(model)
    with bake(plan, model, savable=False):
        assert_close(logits(model), expected, 5e-6)
    assert torch.equal(logits(model), plain)
    assert not torch.allclose(expected, plain, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "falcon", "phi3"])
def test_edits_of_one_map_keep_their_order(family, tiny):
    """Edits of the input come first, then those of the output in plan order, then the stream; columns of a fused projection stay apart."""
    model, anatomy = tiny(family), steer.Anatomy.find(tiny(family))
    interventions = [
        Intervention(Add(vector(seed=8)), "layers.1.output"),
        Intervention(Add(vector(seed=9)), "layers.1.mlp.output"),
        Intervention(Ablate(ROWS), "layers.1.mlp.output", strength=0.7),
        Intervention(Scale(vector(anatomy.point("layers.1.mlp.neurons").width), 0.3), "layers.1.mlp.neurons"),
        *(Intervention(Ablate(vector(anatomy.point(f"layers.0.attn.{k}").width)), f"layers.0.attn.{k}") for k in "qkv"),
    ]
    plan = Plan(interventions)
    expected = steered(model, plan)
    with bake(plan, model, savable=False):
        assert_close(logits(model), expected, 5e-6)
    turned = Plan([interventions[2], interventions[1], *interventions[3:], interventions[0]])
    assert not torch.allclose(steered(model, turned), expected, rtol=1e-3)


def test_padding_does_not_matter_and_generation_goes_on_alike(tiny):
    model, plan = tiny("llama"), adding("layers.0.output", "layers.1.attn.output")
    batch = {name: tensor for name, tensor in padded("left").items() if name != "labels"}
    expected, text = steered(model, plan, **batch), None
    with plan.attached(model):
        text = model.generate(**batch, max_new_tokens=8, do_sample=False)
    with bake(plan, model):
        real = batch["attention_mask"].bool()
        assert_close(model(**batch).logits[real], expected[real])
        assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), text)


# ---- refusals


def gated() -> Intervention:
    return Intervention(Add(vector()), "layers.1.attn.output", gate=ProbeGate(vector()))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Intervention(Add(vector()), "layers.1.attn.output", scope="generated"), "scope 'generated'"),
        (lambda: Intervention(Add(vector()), "layers.1.attn.output", scope="all~16"), "scope 'all~16'"),
        (gated, "gate"),
        (lambda: Intervention(Add(vector()), "layers.1.attn.output", schedule=steer.Linear(10)), "Linear"),
        (lambda: Intervention(Add(vector()), "layers.1.attn.output", phases=("generate",)), "train, validate"),
        (lambda: Intervention(Add(vector()), "layers.1.attn.output", roles=("reference",)), "role policy"),
        (lambda: Intervention(Add(vector()), "layers.1.attn.output", preserve_norm=True), "preserve_norm"),
        (lambda: Intervention(Add(torch.stack([vector(), vector(seed=5)])), "layers.1.attn.output"), "2 row slots"),
        (lambda: Intervention(Add(vector()), "layers.1.attn.output", strength=[1.0, 2.0]), "2 row slots"),
        (lambda: Intervention(Clamp(vector(), low=0.0), "layers.1.attn.output"), "'clamp'"),
        (lambda: Intervention(Add(vector()), "final_norm"), "'final_norm'"),
        (lambda: Intervention(Add(vector()), "layers.1.mlp.input"), "mlp.input"),
        (lambda: Intervention(Add(vector()), "module:model.layers.1.mlp:output"), "module:"),
        (lambda: Intervention(Add(vector()), "layers.1.attn.output", enabled=False), "do nothing"),
        (lambda: Intervention(Add(vector()), "layers.1.attn.output", strength=0.0), "do nothing"),
    ],
)
def test_what_weights_cannot_carry_is_refused_by_name(make: Callable[[], Intervention], named: str, tiny):
    model = tiny("llama")
    plain = logits(model)
    with pytest.raises(DeployError, match=named) as caught:
        bake(Plan(make()), model, savable=False)
    assert caught.value.remedy and torch.equal(logits(model), plain)


def test_a_plan_that_is_attached_or_does_not_fit_is_refused(tiny):
    model, plan = tiny("llama"), adding("layers.1.attn.output")
    with plan.attached(model):
        logits(model)
        with pytest.raises(AttachError, match="twice"):
            bake(plan, model)
    with pytest.raises(WidthError):
        bake(Plan(Intervention(Add(vector(16)), "layers.1.attn.output")), model)
    assert bake(plan, model, savable=False).changed == ["model.layers.1.self_attn.o_proj.bias"]


def test_quantised_weights_are_refused(tiny):
    model = tiny("llama")
    projection = model.model.layers[1].self_attn.o_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)
    projection.forward = lambda x: nn.functional.linear(x, projection.weight.to(x.dtype), projection.bias)
    with pytest.raises(DeployError, match="float8"):
        bake(adding("layers.1.attn.output"), model)


def test_a_block_that_scales_what_it_adds_is_found_out_by_running(tiny):
    """Granite does this: it has the structure of a llama, but not its arithmetic."""
    model = tiny("llama")
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp = Scaled(mlp)
    plain = logits(model)
    with pytest.raises(DeployError, match="scales"):
        bake(adding("layers.1.output"), model, savable=False)
    assert torch.equal(logits(model), plain) and mlp.down_proj.bias is None


class Scaled(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.activation = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        return 0.25 * self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def test_undo_does_not_throw_away_what_was_learned_since(tiny):
    model = tiny("llama")
    baked = bake(Plan([Intervention(Ablate(ROWS), "layers.1.attn.output")]), model)
    model.model.layers[1].self_attn.o_proj.weight.add_(0.1)
    learned = logits(model)
    with pytest.raises(DeployError, match="o_proj.weight"):
        baked.undo()
    assert torch.equal(logits(model), learned)


def test_undo_names_the_bake_that_came_after_it(tiny):
    model = tiny("llama")
    before = logits(model)
    first = bake(Plan([Intervention(Ablate(ROWS), "layers.1.attn.output")]), model)
    second = bake(Plan([Intervention(Ablate(vector(seed=5)), WRITERS)]), model)
    elsewhere = bake(Plan([Intervention(Ablate(ROWS), "layers.1.attn.output")]), tiny("llama"))
    with pytest.raises(DeployError, match=r"changed by another one after it[\s\S]*found: Baked\(7 parameters") as raised:
        first.undo()
    assert "undo that bake first" in raised.value.remedy
    assert str(raised.value).count("Baked(") == 1
    second.undo()
    first.undo()
    elsewhere.undo()
    assert torch.equal(logits(model), before)


# ---- wrappers and files


def test_peft(tiny):
    """Constants go into the base weights, where the pass without adapters finds them too; ablation would have to change the adapter."""
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)).eval()
    both = {"roles": ("policy", "reference")}
    plain = logits(model)
    with pytest.raises(DeployError, match="reference"):
        bake(adding("layers.1.output"), model, savable=False)
    plan = Plan(Intervention(Add(vector()), "layers.1.output", **both))
    with pytest.raises(DeployError, match="adapter"):
        bake(plan, model)
    expected = steered(model, plan)
    with model.disable_adapter():
        expected_off = steered(model, plan)
    with bake(plan, model, savable=False):
        assert_close(logits(model), expected)
        with model.disable_adapter():
            assert_close(logits(model), expected_off)
    assert torch.equal(logits(model), plain)
    with pytest.raises(DeployError, match="merge"):
        bake(Plan(Intervention(Ablate(ROWS), "layers.1.mlp.output", **both)), model, savable=False)
    elsewhere = Plan(Intervention(Ablate(ROWS), "layers.1.attn.output", **both))  # not adapted
    expected = steered(model, elsewhere)
    with bake(elsewhere, model, savable=False):
        assert_close(logits(model), expected)


@pytest.mark.parametrize(
    ("family", "sites"), [("llama", ("layers.1.output", "layers.0.attn.output")), ("gpt2", ("layers.1.output", "embed"))]
)
def test_a_baked_model_is_saved_and_loaded(family, sites, tiny, tmp_path: Path):
    model, plan = tiny(family), adding(*sites)
    expected, before = steered(model, plan), copy.deepcopy(model.config)
    baked = bake(plan, model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_close(logits(loaded), expected)
    if family == "llama":
        assert loaded.config.mlp_bias and loaded.config.attention_bias
        assert not loaded.model.layers[0].mlp.up_proj.bias.any() and loaded.model.layers[1].mlp.down_proj.bias.any()
    baked.undo()
    baked.undo()
    assert (getattr(model.config, "mlp_bias", None), getattr(model.config, "attention_bias", None)) == (
        getattr(before, "mlp_bias", None),
        getattr(before, "attention_bias", None),
    )
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in tiny(family).named_parameters()}


@pytest.mark.parametrize("family", sorted(set(TIED) - {"gemma2", "gemma3"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_model_is_untied_saved_and_tied_again_by_undo(family, dtype, tiny, tmp_path: Path):
    model = tiny(family).to(dtype)
    plan = Plan([Intervention(Ablate(ROWS), site) for site in WRITERS])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected, plain = steered(model, plan), logits(model)
    with bake(plan, model):
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert_close(logits(loaded), expected, 2e-6 if dtype == torch.float32 else 0.1)
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(logits(model), plain) and model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("says_tied", [True, False])
def test_a_configuration_that_is_wrong_about_the_head_is_set_right(says_tied, tiny, tmp_path: Path):
    """Untied by hand and not said so: the head would be lost. Said so and not done: no file would hold a head."""
    model, plan = tiny("smollm3"), adding("layers.1.attn.output")
    if says_tied:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone() * 1.5)
    else:
        model.config.tie_word_embeddings = False
    expected = steered(model, plan)
    with bake(plan, model):
        model.save_pretrained(tmp_path)
    assert_close(logits(type(model).from_pretrained(tmp_path)), expected)
    assert model.config.tie_word_embeddings == says_tied


def test_a_head_that_was_trained_after_the_bake_is_not_thrown_away(tiny):
    model = tiny("smollm3")
    baked = bake(adding("embed"), model)
    model.get_output_embeddings().weight.add_(0.1)
    with pytest.raises(DeployError, match="lm_head.weight"):
        baked.undo()


def test_weights_that_the_configuration_does_not_speak_of_are_refused(tiny):
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight  # tied by hand
    plain = logits(model)
    with pytest.raises(DeployError, match=r"layers.0.mlp.up_proj.weight.*layers.1.mlp.up_proj.weight"):
        bake(Plan(Intervention(Ablate(ROWS), "layers.1.attn.output")), model)
    assert torch.equal(logits(model), plain)


def test_a_weight_that_another_module_uses_is_not_changed(tiny):
    model = tiny("llama")
    first, second = (model.model.layers[n].self_attn.o_proj for n in (0, 1))
    first.weight = second.weight
    with pytest.raises(DeployError, match="other modules use too"):
        bake(Plan(Intervention(Ablate(ROWS), "layers.1.attn.output")), model, savable=False)


def test_compiled_code_sees_the_bake_and_its_end(tiny):
    model = tiny("llama")
    plan, plain = adding("layers.1.output"), logits(model)
    expected = steered(model, plan)
    torch._dynamo.reset()
    model.model.layers[1].mlp.compile(backend="eager", fullgraph=True)
    assert_close(logits(model), plain)
    with bake(plan, model, savable=False):
        assert_close(logits(model), expected)
    assert_close(logits(model), plain)


def test_training_modes_and_counts_are_left_alone(tiny):
    model, plan = tiny("llama"), adding("layers.1.attn.output")
    with plan.attached(model) as attachment:
        logits(model)
    counted = attachment.fired()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    bake(plan, model, savable=False).undo()
    assert [module.training for module in model.modules()] == modes and attachment.fired() == counted
    with evaluating(model):
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float64, 1e-12)])
def test_other_precisions(dtype, bound, tiny):
    model = tiny("llama").to(dtype)
    plan = Plan([Intervention(Ablate(ROWS), "layers.1.attn.output"), Intervention(Add(vector()), "layers.1.output")])
    with bake(plan, model) as baked:
        assert baked.error <= bound


def test_rounding_is_told_where_it_takes_a_bake_far_from_the_plan(monkeypatch: pytest.MonkeyPatch, tiny):
    monkeypatch.setattr(importlib.import_module("steer.intervene.deploy.bake"), "ROUGH", 0.0)  # a tiny model rounds little
    plan = Plan([Intervention(Ablate(ROWS), WRITERS)])
    with pytest.warns(UserWarning, match=r"the model is \d\.\d\d% off .*, in bfloat16; in float32 it is \d\.\de-0") as warned:
        bake(plan, tiny("llama").bfloat16())
    assert len(warned) == 1 and warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bake(plan, tiny("llama"))


@pytest.mark.real
def test_real_model(smollm2, tmp_path):
    model, tokenizer = smollm2
    batch = tokenizer("The capital of France is Paris, and the river that runs through it is the", return_tensors="pt")
    direction = vector(576)
    writers = [f"layers.{n}.{part}" for n in range(30) for part in ("attn.output", "mlp.output")]
    plan = Plan(
        [Intervention(Ablate(vector(576, 2)), site) for site in writers] + [Intervention(Add(direction), "layers.12.output", strength=2.0)]
    )
    expected, plain = steered(model, plan, **batch), model(**batch).logits
    with bake(plan, model) as baked:
        assert baked.error < 1e-5 and model.config.mlp_bias
        assert_close(model(**batch).logits, expected, 1e-4)
    assert torch.equal(model(**batch).logits, plain) and not model.config.mlp_bias
