"""What copies, pickles and files of a plan hold: the order of what is learned, what is frozen, the step, and no model."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hand import attachment_of, hook_count, ids, vector
from intervene.operator_cases import CASES

from steer.errors import ConfigError, DamagedFileError
from steer.files import load_artifact, save_artifact
from steer.intervene import Ablate, Add, CosineGate, FeatureGate, Intervention, LoReFT, Plan, ProbeGate, WarmupDecay

SITE = "layers.1.output"
LEARNED = [name for name, case in CASES.items() if case.make().learnable]


def steered(**options) -> Plan:
    return Plan(Intervention(Add(vector()), SITE, **options))


def loreft() -> Plan:
    return Plan(Intervention(LoReFT.initial(32, rank=2).train(), SITE))


def values(plan: Plan) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in plan.parameters()]


def same(ours: Plan, theirs: Plan) -> bool:
    return len(values(ours)) == len(values(theirs)) and all(map(torch.equal, values(ours), values(theirs)))


def without(path, key: str):
    """Rewrites the file without a key, as older versions wrote it."""
    manifest, tensors = load_artifact(path, "plan")
    for entry in [manifest, *manifest["interventions"]]:
        entry.pop(key, None)
    return save_artifact(path, "plan", tensors, manifest)


# ---- the order of what is learned


@pytest.mark.parametrize("name", LEARNED)
def test_parameters_have_one_order(name, tmp_path):
    probe, cosine = ProbeGate(vector(seed=3), 0.1, sharpness=1.0), CosineGate(vector(seed=4), 0.2, sharpness=1.0)
    gate = probe.train() & ~cosine.train() | FeatureGate(vector(seed=5), 0.3, 0.4, sharpness=1.0).train()
    interventions = [Intervention(CASES[operator].make().train(), "layers.1.attn.z", gate=gate) for operator in (name, "loreft")]
    plan = Plan(interventions)
    expected = list(plan.interventions[0].operator.learnable)
    assert list(plan.interventions[0].parameters)[: len(expected)] == expected
    once = Plan.load(plan.save(tmp_path / "plan"))
    assert same(plan, once) and same(plan, Plan.load(once.save(tmp_path / "plan.safetensors")))


def test_the_state_of_an_optimiser_goes_on_with_a_loaded_plan(tmp_path, tiny):
    """AdamW takes any state; with the moments of other tensors it raises, goes to NaN or, fused, kills the interpreter."""
    model = tiny("llama").requires_grad_(False)

    def train(plan: Plan, optimizer: torch.optim.Optimizer) -> None:
        with plan.attached(model):
            for _ in range(2):
                model(ids(), labels=ids()).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    plan = loreft()
    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01)
    train(plan, optimizer)
    resumed = Plan.load(plan.save(tmp_path / "plan"))
    again = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(plan, optimizer)
    train(resumed, again)
    assert same(plan, resumed)


# ---- frozen tensors


def test_what_is_frozen_stays_frozen(tmp_path):
    plan = Plan(Intervention(LoReFT.initial(32, rank=2).train(), SITE, gate=ProbeGate(vector(), sharpness=1.0).train()))
    for name in ("weight", "gate0.vector"):
        plan.interventions[0].parameters[name].requires_grad_(False)
    path = plan.save(tmp_path / "plan")
    flags = {name: parameter.requires_grad for name, parameter in Plan.load(path).interventions[0].parameters.items()}
    assert flags == {"rotation": True, "weight": False, "bias": True, "gate0.vector": False, "gate0.bias": True}
    assert all(parameter.requires_grad for parameter in Plan.load(without(path, "frozen")).parameters())


def test_what_is_frozen_and_stands_in_two_places(tmp_path):
    operator = Add(vector()).train()
    operator.tensors["vector"].requires_grad_(False)
    loaded = Plan.load(Plan([Intervention(operator, SITE), Intervention(operator, "embed")]).save(tmp_path / "plan"))
    assert [parameter.requires_grad for parameter in loaded.parameters()] == [False]


def test_a_frozen_tensor_that_is_not_there(tmp_path):
    path = loreft().save(tmp_path / "plan")
    manifest, tensors = load_artifact(path, "plan")
    manifest["interventions"][0]["frozen"] = ["bais"]
    with pytest.raises(DamagedFileError, match="lacks a part"):
        Plan.load(save_artifact(path, "plan", tensors, manifest))


# ---- the step


def test_the_step_is_saved(tmp_path):
    attachment = attachment_of(steered(strength=2.0, schedule=WarmupDecay(5, 1, 10)))
    attachment.step(4)
    path = attachment.as_plan().save(tmp_path / "plan")
    loaded = Plan.load(path)
    again = attachment_of(loaded)
    assert loaded.step == again.current_step == 4 and again.interventions[0].strength.item() == pytest.approx(1.6)
    assert loaded.interventions[0].strength_at(loaded.step).item() == pytest.approx(1.6)
    old = Plan.load(without(path, "step"))
    again = attachment_of(old)
    assert old.step == again.current_step == 0 and again.interventions[0].strength.item() == 0.0


@pytest.mark.parametrize("step", [np.int64(3), np.array(3), torch.tensor(3)])
def test_integers_of_other_libraries(step, tmp_path):
    attachment = attachment_of(steered(scope="generated[:8]"))
    attachment.step(step)
    attachment.set_window(step, None)
    window = attachment.interventions[0].scope_mask.scope.window
    assert (window.start, window.stop) == (3, None) and type(attachment.current_step) is int
    loaded = Plan.load(attachment.as_plan().save(tmp_path / "plan"))
    assert loaded.interventions[0].scope.window == window and loaded.step == 3
    stepped = Plan(loaded.interventions, step=step)
    assert stepped.step == 3 and type(stepped.step) is int


@pytest.mark.parametrize("wrong", [True, np.bool_(True), torch.tensor(True), 1.0, torch.tensor(1.0), "1", None, torch.tensor([1, 2])])
def test_what_is_no_integer(wrong):
    plan = steered(scope="generated[:8]")
    attachment = attachment_of(plan)
    with pytest.raises(ConfigError, match="optimiser step of a plan"):
        attachment.step(wrong)
    with pytest.raises(ConfigError, match="optimiser step of a plan"):
        Plan(plan.interventions, step=wrong)
    if wrong is not None:
        with pytest.raises(ConfigError, match="no such bound"):
            attachment.set_window(wrong, 4)


# ---- copies


def copied(plan: Plan, how: str) -> Plan:
    return copy.deepcopy(plan) if how == "copy" else pickle.loads(pickle.dumps(plan))


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_a_copy_of_an_attached_plan_is_on_no_model(how, tiny):
    model = tiny("llama")
    gate = ProbeGate(vector(seed=3), sharpness=1.0).train()
    plan = Plan([Intervention(Add(vector()).train(), SITE, "response[:2]~4", gate=gate), Intervention(Ablate(vector()), "embed")])
    with plan.attached(model) as attachment:
        model(ids(), labels=ids())
        count, fired = hook_count(model), attachment.fired()
        duplicate = copied(plan, how)
        assert "not attached" in duplicate.explain()
        attachment_of(duplicate).set_strength(0.0)  # on a model of its own
        assert hook_count(model) == count and attachment.is_attached and attachment.interventions[0].strength.item() == 1.0
        model(ids(), labels=ids())
        assert attachment.fired() == {name: 2 * number for name, number in fired.items()}
    assert hook_count(model) == 0 and attachment.fired() == {name: 2 * number for name, number in fired.items()}
    with duplicate.attached(model) as duplicate_attachment:
        model(ids(), labels=ids()).loss.backward()
        assert duplicate_attachment.fired() == fired
    assert all(parameter.grad is not None for parameter in duplicate.parameters()) and all(
        parameter.grad is None for parameter in plan.parameters()
    )


def test_copies_of_a_plan_that_was_never_attached(tiny):
    model = tiny("llama")
    for how in ("copy", "pickle"):
        duplicate = copied(steered(strength=0.5), how)
        with duplicate.attached(model) as attachment:
            model(ids())
        assert set(attachment.fired().values()) == {14}


# ---- wrong types


@pytest.mark.parametrize(
    "call",
    [
        lambda: attachment_of(steered()).enable("off"),
        lambda: attachment_of(steered()).enable(f"add@{SITE}"),
        lambda: steered(name=3),
        lambda: Plan(Intervention(Add(vector()), SITE), fingerprint="x"),
    ],
)
def test_the_call_names_the_wrong_type(call):
    with pytest.raises(ConfigError, match="wrong type"):
        call()


def test_a_refused_switch_leaves_the_plan_as_it_was(tmp_path):
    attachment = attachment_of(steered())
    with pytest.raises(ConfigError):
        attachment.enable("off")
    assert attachment.interventions[0].strength.item() == 1.0
    loaded = Plan.load(attachment.as_plan().save(tmp_path / "plan"))
    assert attachment_of(loaded).interventions[0].strength.item() == 1.0
