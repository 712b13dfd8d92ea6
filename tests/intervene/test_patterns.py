"""An intervention at several sites does at each of them what one of its own would do, and is driven, counted and kept as one."""

from __future__ import annotations

import json

import pytest
import torch
from hand import ids, padded, vector
from torch import nn

import steer
from steer.directions.passes import reads_logits, unchanged_blocks
from steer.errors import ConfigError, DeployError, SiteError
from steer.intervene import Ablate, Add, HeadShift, Intervention, Linear, Plan, ProbeGate
from steer.model.anatomy import Anatomy
from steer.training.steering_run import SteeringRun

WRITERS = ["embed", "layers.*.attn.output", "layers.*.mlp.output"]
WRITTEN_OUT = ["embed", *(f"layers.{n}.{part}.output" for part in ("attn", "mlp") for n in range(3))]


def logits(model: nn.Module, **batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**(batch or {"input_ids": ids()}), use_cache=False).logits


def steered(model: nn.Module, plan: Plan, **batch) -> torch.Tensor:
    with plan.attached(model):
        return logits(model, **batch)


def everywhere(**options) -> Plan:
    return Plan(Intervention(Add(vector()), "layers.*.output", name="add", **options))


# ---- what it does


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon"])
def test_a_pattern_does_what_an_intervention_for_each_site_does(tiny, family):
    model = tiny(family)
    width = Anatomy.find(model).width
    one = Plan(Intervention(Ablate(vector(width)), WRITERS, "response"))
    many = Plan([Intervention(Ablate(vector(width)), site, "response") for site in WRITTEN_OUT])
    assert torch.equal(steered(model, one, **padded()), steered(model, many, **padded()))
    assert not torch.equal(steered(model, one, **padded()), logits(model, **padded()))
    generated = []
    for plan in (one, many):
        with plan.attached(model) as attachment, torch.no_grad():
            generated.append(model.generate(ids(), max_new_tokens=5, do_sample=False))
            assert len(attachment._events[0].prepared._groups) == 1  # stacked for all sites
    assert torch.equal(*generated)


def test_a_site_that_is_named_twice_is_steered_once(tiny):
    model = tiny("llama")
    twice = Plan(Intervention(Add(vector()), ["layers.-1.output", "layers.*.output", "layers.1-2.output", "layers.0.input", "embed"]))
    once = Plan([Intervention(Add(vector()), site) for site in ("layers.2.output", "layers.0.output", "layers.1.output", "embed")])
    torch.testing.assert_close(steered(model, twice), steered(model, once), rtol=0, atol=0)
    with twice.attached(model) as attachment:
        sites = [str(active.site) for active in attachment.interventions]
        logits(model)
    assert sites == ["layers.2.output", "layers.0.output", "layers.1.output", "layers.0.input"]


def test_module_sites_are_steered_in_a_model_that_is_no_decoder():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.ones(1, 3, 4)
    plan = Plan(Intervention(Add(torch.ones(4)), ["module:0:output", "module:1:output"]))
    with plan.attached(model), torch.no_grad():
        found = model(x)
    with torch.no_grad():
        assert torch.equal(found, model[2](model[1](model[0](x) + 1) + 1))


def test_a_gate_without_a_site_reads_each_site_for_itself_and_one_with_a_site_reads_there(tiny):
    model = tiny("llama")
    gates = {"own": lambda: ProbeGate(vector(seed=5)), "elsewhere": lambda: ProbeGate(vector(seed=5), site="layers.0.input")}
    for name, gate in gates.items():
        one = Plan(Intervention(Add(vector()), "layers.*.output", gate=gate(), name="add"))
        many = Plan([Intervention(Add(vector()), f"layers.{n}.output", gate=gate()) for n in range(3)])
        assert torch.equal(steered(model, one), steered(model, many))
        with one.attached(model) as attachment, many.attached(model, stack=True) as others:
            logits(model)
        with one.attached(model) as attachment:
            logits(model)
        with many.attached(model) as others:
            logits(model)
        by_site = list(attachment.fired(by_site=True).values())
        assert by_site == list(others.fired().values())
        assert attachment.fired() == {"add": max(by_site)}
        assert (len(set(by_site)) == 1) == (name == "elsewhere")


def test_learned_tensors_are_one_for_all_sites(tiny):
    model = tiny("llama")
    plan = Plan(Intervention(Add(vector()).train(), "layers.*.output"))
    [parameter] = plan.parameters()
    parts = Plan([Intervention(Add(vector()).train(), f"layers.{n}.output") for n in range(3)])
    for each in (plan, parts):
        with each.attached(model):
            model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    torch.testing.assert_close(parameter.grad, torch.stack([part.grad for part in parts.parameters()]).sum(0))


# ---- how it is driven


def test_it_is_driven_as_one_by_its_name(tiny):
    model = tiny("llama")
    plan = Plan([*everywhere(schedule=Linear(4, 1.0, 0.0)).interventions, Intervention(Ablate(vector(seed=2)), "embed", name="ablate")])
    with plan.attached(model) as attachment:
        attachment.step(2)
        attachment.set_strength(3.0, "add")
        assert [active.strength.item() for active in attachment.interventions] == [1.5, 1.5, 1.5, 1.0]
        attachment.enable(False, "add")
        assert [active.strength.item() for active in attachment.interventions] == [0, 0, 0, 1.0]
        logits(model)
        assert attachment.fired() == {"add": 0, "ablate": 14}
        assert attachment["add"].base == (3.0,)
        assert [active.name for active in attachment.at_sites("add")] == [f"add@layers.{n}.output" for n in range(3)]
        for drive in (lambda name: attachment.set_strength(1.0, name), lambda name: attachment.enable(True, name)):
            with pytest.raises(ConfigError, match=r"add@layers.1.output[\s\S]*one of add, ablate"):
                drive("add@layers.1.output")


def test_windows_move_for_all_sites_and_part_from_those_of_others(tiny):
    model = tiny("llama")
    scope = "generated[:4]"
    plan = Plan([*everywhere(scope=scope).interventions, Intervention(Add(vector()), "embed", scope, name="other")])
    with plan.attached(model) as attachment, torch.no_grad():
        attachment.set_window(0, 2, "add")
        model.generate(ids(1), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert attachment.fired() == {"add": 2, "other": 4}
        assert len({active.key for active in attachment.at_sites("add")}) == 1
        assert str(attachment.as_plan()["add"].scope) == "generated[0:2]"


def test_rows_choose_a_slot_at_every_site(tiny):
    model = tiny("llama")
    vectors = torch.stack([vector(seed=2), vector(seed=3)])
    with Plan(Intervention(Add(vectors), "layers.*.output")).attached(model) as attachment:
        attachment.set_rows([1, 0])
        found = logits(model)
    for row, slot in enumerate([1, 0]):
        alone = Plan(Intervention(Add(vectors[slot]), "layers.*.output"))
        torch.testing.assert_close(found[row : row + 1], steered(model, alone, input_ids=ids()[row : row + 1]))


def test_its_state_goes_to_another_attachment(tiny):
    model = tiny("llama")
    plan = Plan(Intervention(Add(vector()).train(), "layers.*.output", "generated[:4]", name="add"))
    with plan.attached(model) as attachment:
        attachment.set_strength(0.25)
        attachment.set_window(1, 3)
        attachment.step(7)
        state = attachment.state_dict()
        logits(model, **padded())
    assert list(state["interventions"]) == ["add"]
    with plan.attached(model) as attachment:
        attachment.load_state_dict(state)
        assert {active.base for active in attachment.interventions} == {(0.25,)}
        assert {str(active.scope_mask.scope) for active in attachment.interventions} == {"generated[1:3]"}
        assert attachment.current_step == 7
        logits(model, **padded())


def test_a_training_run_logs_one_strength_and_one_count(tiny):
    from steer.training.ranks import Ranks

    model = tiny("llama")
    run = SteeringRun(everywhere(strength=0.5), phases=("train", "validate"))
    run.attach(model, Ranks())
    logits(model)
    assert run.metrics() == {"steer/add/strength": 0.5, "steer/add/tokens": 14.0}
    run.detach()


def test_names_that_were_given_by_hand_stay_apart(tiny):
    model = tiny("llama")
    plan = Plan([*everywhere().interventions, Intervention(Ablate(vector()), "embed", name="add@layers.1.output")])
    with plan.attached(model) as attachment:
        logits(model)
        names = [active.name for active in attachment.interventions]
        assert names == ["add@layers.0.output", "add@layers.1.output#2", "add@layers.2.output", "add@layers.1.output"]
        assert attachment["add@layers.1.output"].operator.name == "ablate"
        assert attachment.fired() == {"add": 14, "add@layers.1.output": 14}


# ---- how it is shown and kept


def test_it_is_explained_with_the_modules_that_are_hooked(tiny):
    model = tiny("llama")
    plan = Plan(Intervention(Ablate(vector()), ["layers.*.attn.output", "layers.0.mlp.output", "layers.2.mlp.output"], name="ablate"))
    assert "at layers.*.attn.output,layers.0.mlp.output,layers.2.mlp.output, width 32" in plan.explain()
    with plan.attached(model) as attachment:
        said = attachment.explain()
        logits(model)
    assert "(5 modules: model.layers.{0-2}.self_attn, model.layers.{0,2}.mlp)" in said
    assert "plan of 1 intervention(s), attached" in said


@pytest.mark.parametrize(
    "site", ["layers.*.output", "layers.1-2.mlp.output", ["layers.1.output", "layers.*.attn.output"], ["embed", "final_norm"]]
)
def test_files_hold_what_was_written(tiny, tmp_path, site):
    model = tiny("llama")
    plan = Plan(Intervention(Add(vector()), site))
    plan.save(tmp_path / "plan")
    manifest = json.loads((tmp_path / "plan" / "manifest.json").read_text())
    assert manifest["interventions"][0]["site"] == site
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.interventions[0].site == plan.interventions[0].site
    assert loaded.interventions[0].name == plan.interventions[0].name
    assert torch.equal(steered(model, loaded), steered(model, plan))


def test_the_plan_of_now_keeps_the_pattern(tiny):
    attachment = everywhere().attach(tiny("llama"))
    attachment.set_strength(0.5)
    now = attachment.as_plan()
    assert [(str(entry.site), entry.strength) for entry in now.interventions] == [("layers.*.output", (0.5,))]


def test_an_expanded_plan_has_an_intervention_for_each_site(tiny):
    model = tiny("llama")
    plan = Plan(Intervention(Add(vector()).train(), "layers.*.output", name="add"), step=3)
    expanded = plan.expanded(model)
    assert [(entry.name, str(entry.site)) for entry in expanded.interventions] == [
        (f"add@layers.{n}.output", f"layers.{n}.output") for n in range(3)
    ]
    assert expanded.step == 3
    assert expanded.parameters() == plan.parameters()
    assert torch.equal(steered(model, expanded), steered(model, plan))


def test_what_a_plan_leaves_alone_is_known_of_patterns(tiny):
    anatomy = Anatomy.find(tiny("llama"))
    assert unchanged_blocks(anatomy, Plan(Intervention(Add(vector()), "layers.1-2.output"))) == 2
    assert unchanged_blocks(anatomy, Plan(Intervention(Add(vector()), ["layers.2.mlp.output", "layers.1.input"]))) == 1
    assert reads_logits(anatomy, Plan(Intervention(Add(vector(96)), ["logits", "layers.*.output"])))
    assert not reads_logits(anatomy, everywhere())


# ---- in the weights and in files of other programs


def test_an_ablation_at_every_writer_is_baked(tiny):
    model = tiny("llama")
    plan = Plan(Intervention(Ablate(vector()), WRITERS))
    expected = steered(model, plan)
    before = logits(model)
    with steer.bake(plan, model) as baked:
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        assert baked.error < 1e-4
    assert torch.equal(logits(model), before)


def test_adapters_and_files_of_other_programs_hold_every_site(tiny, tmp_path):
    import peft

    model = tiny("llama")
    plan = Plan(Intervention(Ablate(vector()), WRITERS[1:]))
    expected = steered(model, plan)
    steer.to_adapter(plan, model, tmp_path / "adapter")
    steer.to_lm_eval(plan, model, tmp_path / "steer.pt")
    entries = torch.load(tmp_path / "steer.pt", weights_only=True)
    assert sorted(entries) == sorted(f"layers.{n}.{part}" for n in range(3) for part in ("mlp", "self_attn"))
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(model, tmp_path / "adapter")), expected, rtol=1e-4, atol=1e-4)


def test_a_control_vector_holds_every_block_of_a_pattern(tiny, tmp_path):
    pytest.importorskip("gguf")
    fingerprint = Anatomy.find(tiny("llama")).fingerprint()
    late = Intervention(Add(vector()), "layers.1-2.output", strength=2.0)
    path = steer.to_gguf(Plan(late, fingerprint=fingerprint), tmp_path / "late.gguf")
    vectors = {str(entry.site): entry.vector for entry in steer.import_directions(path).entries.values()}
    assert vectors.keys() == {"layers.1.output", "layers.2.output"}
    for found in vectors.values():
        torch.testing.assert_close(found, 2 * vector())
    with pytest.raises(DeployError, match=r"unknown depth[\s\S]*plan.expanded\(model\)"):
        steer.to_gguf(Plan(late), tmp_path / "unknown.gguf", model_hint="llama")
    with pytest.raises(DeployError, match=r"layers.0.output[\s\S]*steer a later block"):
        steer.to_gguf(Plan(Intervention(Add(vector()), "layers.*.output"), fingerprint=fingerprint), tmp_path / "first.gguf")


# ---- what is refused


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ("layers.*.outptu", r"unknown sites 'layers.\*.outptu'[\s\S]*did you mean 'layers.\*.output'"),
        ("layers.1-2.attn", r"unknown sites 'layers.1-2.attn'"),
        (["layers.*.output", "layer.3.output"], "unknown site 'layer.3.output'"),
        ([], "without a site acts nowhere"),
        ([3], "a site cannot be of type int"),
        ({"layers.*.output"}, "a site cannot be of type set"),
    ],
)
def test_what_names_no_site_is_refused(site, says):
    with pytest.raises(SiteError, match=says):
        Intervention(Add(vector()), site)


def test_operators_refuse_patterns_of_sites_that_they_do_not_fit():
    with pytest.raises(SiteError, match="no heads to shift"):
        Intervention(HeadShift(vector(8)[None], [0], 4), ["layers.*.attn.z", "layers.*.output"])


def test_a_pattern_outside_the_model_is_refused_before_a_hook_is_installed(tiny):
    model = tiny("llama")
    for check in (Plan.validate, Plan.attach, Plan.expanded):
        with pytest.raises(SiteError, match="0 to 2"):
            check(Plan(Intervention(Add(vector()), "layers.1-7.output")), model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_pattern_that_no_layer_fits_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(Anatomy, "sites", lambda self, *patterns: [])
    with pytest.raises(SiteError, match=r"no layer of this LlamaForCausalLM has 'layers.\*.output'"):
        everywhere().attach(tiny("llama"))


def test_several_sites_are_not_taken_for_one():
    with pytest.raises(ConfigError, match=r"acts at several sites[\s\S]*plan.expanded\(model\)"):
        _ = everywhere().interventions[0].single_site
