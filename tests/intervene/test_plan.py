"""A plan's life: attach, change strengths, explain, save; and everything that must be refused."""

import json

import pytest
import torch
from hand import attachment_of, edited, hook_count, ids, padded, vector

from steer.errors import (
    AttachError,
    ConfigError,
    DamagedFileError,
    NonFiniteError,
    SiteError,
    UnsafeFileError,
    WidthError,
    WrongKindError,
    WrongModelError,
)
from steer.intervene import Ablate, Add, Intervention, Linear, Plan, ProbeGate, WarmupDecay
from steer.intervene.attachment import Attachment
from steer.model.anatomy import Anatomy
from steer.model.context import PHASES, ROLES


def steered(**options) -> Plan:
    return Plan(Intervention(Add(vector()), "layers.1.output", **options))


def logits(model):
    with torch.no_grad():
        return model(ids(), use_cache=False).logits


# ---- attaching


def test_attaching_twice_is_an_error_and_leaves_the_first_attach_alone(tiny):
    model = tiny("llama")
    plan = steered()
    with plan.attached(model) as attachment:
        expected = logits(model)
        with pytest.raises(AttachError, match="a plan is attached to this model already"):
            plan.attach(model)
        with pytest.raises(AttachError, match=r"a plan is attached to this model already[\s\S]*stack=True"):
            steered().attach(model)
        with pytest.raises(AttachError, match="a plan is attached"):
            steered().attach(torch.nn.ModuleList([model]))  # through a wrapper
        assert torch.equal(logits(model), expected)
    with pytest.raises(AttachError, match="not attached"):
        attachment.detach()


def test_stacked_plans_act_in_the_order_of_their_attach(tiny):
    model = tiny("llama")
    count = hook_count(model)
    add, ablate = steered(), Plan(Intervention(Ablate(vector()), "layers.1.output"))
    with edited(model.model.layers[1], lambda h: h - (h @ vector())[..., None] * vector() / vector().square().sum()):
        removed = logits(model)
    with add.attached(model), ablate.attached(model, stack=True):
        assert torch.allclose(logits(model), removed, atol=1e-5)
    with ablate.attached(model), add.attached(model, stack=True):
        assert not torch.allclose(logits(model), removed, atol=1e-3)
    assert hook_count(model) == count


def test_stacked_plans_may_leave_in_any_order(tiny):
    model = tiny("llama")
    plain = logits(model)
    first, second = steered().attach(model), steered(strength=-1.0)
    attachment = second.attach(model, stack=True)
    assert torch.allclose(logits(model), plain, atol=1e-5)
    first.detach()
    steered_once = logits(model)
    attachment.detach()
    with edited(model.model.layers[1], lambda h: h - vector()):
        assert torch.allclose(logits(model), steered_once, atol=1e-6)
    assert torch.equal(logits(model), plain) and hook_count(model) == 0


@pytest.mark.parametrize("where", ["embed_tokens", "layers.0", "layers.2", "norm"])
def test_an_exception_leaves_no_hook(where, tiny):
    """The exception comes from a block before or after the site, or from the caller's own code."""
    model = tiny("llama")
    plain = logits(model)
    boom = model.model.get_submodule(where).register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), steered().attached(model):
        model(ids())
    boom.remove()
    with pytest.raises(KeyError), steered().attached(model):
        raise KeyError("mine")
    with pytest.raises(KeyboardInterrupt), steered().attached(model):
        raise KeyboardInterrupt
    assert hook_count(model) == 0 and torch.equal(logits(model), plain)


def test_a_block_may_detach_early(tiny):
    model = tiny("llama")
    with steered().attached(model) as attachment:
        logits(model)
        attachment.detach()
        logits(model)
    assert not attachment.is_attached and attachment.fired() == {"add@layers.1.output": 14} and hook_count(model) == 0


def test_an_attach_that_fails_leaves_nothing_behind(tiny):
    model = tiny("llama")
    plan = Plan([Intervention(Add(vector()), "layers.1.output"), Intervention(Add(vector()), "layers.9.output")])
    with pytest.raises(SiteError, match="out of range"):
        plan.attach(model)
    assert hook_count(model) == 0
    steered().attach(model).detach()  # nothing says that another plan is attached


def test_a_plan_that_nothing_ran_through_says_so(tiny):
    model = tiny("llama")
    with pytest.warns(UserWarning, match="nothing was steered"), steered().attached(model):
        pass


def test_a_plan_may_move_to_another_model_and_touches_only_its_own(tiny):
    plan, llama, gpt2 = steered(), tiny("llama"), tiny("gpt2")
    plain = logits(gpt2)
    with plan.attached(llama) as attachment:
        logits(llama)
        assert torch.equal(logits(gpt2), plain)
    with plan.attached(gpt2) as attachment:
        assert not torch.allclose(logits(gpt2), plain, atol=1e-3)
        logits(llama)
        assert attachment.fired() == {"add@layers.1.output": 14}


def test_one_plan_lives_on_two_models_at_once(tiny):
    plan, llama, gpt2 = steered(strength=2.0), tiny("llama"), tiny("gpt2")
    with edited(llama.model.layers[1], lambda h: h + 0.5 * vector()):
        expected = logits(llama)
    with edited(gpt2.transformer.h[1], lambda h: h + 2 * vector()):
        expected_gpt2 = logits(gpt2)
    said = plan.explain()
    with plan.attached(llama) as first, plan.attached(gpt2) as second:
        first.set_strength(0.5)
        first.step(3)
        assert torch.allclose(logits(llama), expected, atol=1e-5) and torch.allclose(logits(gpt2), expected_gpt2, atol=1e-5)
        logits(gpt2)
        assert first.fired() == {"add@layers.1.output": 14} and second.fired() == {"add@layers.1.output": 28}
        assert (first.current_step, second.current_step) == (3, 0)
        assert plan.explain() == said and plan["add@layers.1.output"].strength == (2.0,) and plan.step == 0
    assert hook_count(llama) == hook_count(gpt2) == 0


def test_a_plan_made_in_inference_mode_can_be_trained_with(tiny):
    """Users often try a method in generation first and train with it later."""
    model = tiny("llama")
    with torch.inference_mode():
        gate = ProbeGate(vector(seed=3), sharpness=1.0)
        add = Intervention(Add(vector()), "layers.1.output", "response[:2]~4", gate=gate)
        plan = Plan([add, Intervention(Ablate(vector(seed=2)), "layers.1.output", "positions[1:]")])
        with plan.attached(model) as attachment:
            model(ids(), use_cache=True)
    with plan.attached(model) as attachment:
        attachment.set_strength(0.5)
        attachment.set_window(0, 3)
        model(ids(), labels=ids()).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters()) and all(attachment.fired().values())


# ---- what does not fit


def test_widths_are_checked_before_anything_is_hooked(tiny):
    model = tiny("llama")
    plan = Plan(Intervention(Add(vector(16)), "layers.1.output", name="mine"))
    with pytest.raises(WidthError, match=r"'mine' do not fit[\s\S]*width 32[\s\S]*width 16"):
        plan.attach(model)
    with Plan(Intervention(Add(vector(16)), "module:model.layers.1:output")).attached(model), pytest.raises(WidthError, match="width 32"):
        model(ids())
    assert hook_count(model) == 0


def test_a_plan_for_another_model_is_refused(tiny):
    model = tiny("llama")
    plan = Plan(Intervention(Add(vector()), "layers.1.output"), fingerprint=Anatomy.find(model).fingerprint())
    with pytest.raises(WrongModelError, match=r"'model_type': 'llama'[\s\S]*'model_type': 'gpt2'"):
        plan.attach(tiny("gpt2"))
    with torch.no_grad():
        shifted = tiny("llama")
        shifted.get_input_embeddings().weight.mul_(1.1)
    with pytest.warns(UserWarning, match="embeddings differ"):
        attachment = plan.attach(shifted)
    attachment.detach()
    plan.attach(tiny("llama")).detach()
    with pytest.warns(UserWarning, match="this model is a bfloat16 copy") as told:
        plan.attach(tiny("llama").bfloat16()).detach()
    assert len(told) == 1 and told[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "respnse"}, "did you mean 'response'"),
        ({"phases": ("training",)}, "unknown or missing phase"),
        ({"phases": ()}, "unknown or missing phase"),
        ({"roles": "judge"}, "unknown or missing role"),
        ({"schedule": "linnear"}, "did you mean 'linear'"),
        ({"strength": []}, "wrong number of strengths"),
        ({"strength": float("inf")}, "not finite"),
    ],
)
def test_typos_are_named(options, message):
    with pytest.raises((ConfigError, NonFiniteError), match=message):
        steered(**options)


def test_an_empty_plan_and_unknown_names():
    with pytest.raises(ConfigError, match="steers nothing"):
        Plan([])
    with pytest.raises(ConfigError, match=r"no intervention is called 'x'[\s\S]*add@layers.1.output"):
        attachment_of(steered()).set_strength(2.0, "x")


def test_repeated_names_are_numbered_and_chosen_names_stay():
    repeated = [Intervention(Add(vector()), "layers.1.output") for _ in range(3)]
    names = [intervention.name for intervention in Plan([*repeated, Intervention(Add(vector()), "embed", name="mine")]).interventions]
    assert names == ["add@layers.1.output", "add@layers.1.output#2", "add@layers.1.output#3", "mine"]


# ---- driving


def test_strength_switch_and_schedule_drive_one_buffer(tiny):
    model = tiny("llama")
    plan = steered(strength=2.0, schedule=Linear(10, 0.0, 1.0))

    def by_hand(strength):
        with edited(model.model.layers[1], lambda h: h + strength * vector()):
            return logits(model)

    expected = {strength: by_hand(strength) for strength in (0.0, 0.5, 1.0, 2.0, 4.0)}
    with plan.attached(model) as attachment:
        buffer = attachment.interventions[0].strength
        for change, strength in [
            (lambda: None, 0.0),
            (lambda: attachment.step(5), 1.0),
            (lambda: attachment.set_strength(4.0), 2.0),
            (lambda: attachment.enable(False), 0.0),
            (lambda: attachment.step(10), 0.0),
            (lambda: attachment.enable(), 4.0),
            (lambda: attachment.set_strength(0.5, "add@layers.1.output"), 0.5),
        ]:
            change()
            assert buffer.tolist() == [[[strength]]] and attachment.interventions[0].strength is buffer
            assert torch.allclose(logits(model), expected[strength], atol=1e-5)


def test_one_of_two_interventions_can_be_set_alone(tiny):
    model = tiny("llama")
    plan = Plan([Intervention(Add(vector()), "layers.0.output", name="a"), Intervention(Add(vector()), "layers.1.output", name="b")])
    with edited(model.model.layers[1], lambda h: h + 3 * vector()):
        expected = logits(model)
    with plan.attached(model) as attachment:
        attachment.enable(False, "a")
        attachment.set_strength(3.0, "b")
        assert torch.allclose(logits(model), expected, atol=1e-5)
        assert attachment.fired() == {"a": 0, "b": 14}
        with pytest.raises(NonFiniteError):
            attachment.set_strength(float("nan"))
    assert attachment.interventions[1].strength.item() == attachment["b"].strength.item() == 3.0


def test_phases_choose_passes(tiny):
    model = tiny("llama")
    counts = {}
    for phase in ("train", "validate", "generate"):
        with steered(phases=phase).attached(model) as attachment:
            model(ids(), labels=ids())
            logits(model)
            model.generate(ids(), attention_mask=torch.ones(2, 7), max_new_tokens=3, min_new_tokens=3)
        counts[phase] = attachment.fired()["add@layers.1.output"]
    assert counts == {"train": 14, "validate": 14, "generate": 14 + 2 + 2}


# ---- looking


def test_fired_counts_tokens_exactly(tiny):
    model = tiny("llama")
    batch = padded("left")
    scopes = {"all": 17, "prompt": 6, "response": 11, "last": 3, "positions[0,-1]": 6, "generated": 0}
    plan = Plan([Intervention(Add(vector()), "layers.1.output", scope, name=scope) for scope in scopes])
    with plan.attached(model) as attachment:
        for _ in range(3):
            model(**batch)
        assert attachment.fired() == {scope: 3 * count for scope, count in scopes.items()} and attachment.passes == 3
        attachment.set_strength(0.0, "all")
        model(**batch)
        assert attachment.fired()["all"] == 51 and attachment.fired()["prompt"] == 24
    assert attachment.fired()["prompt"] == 24  # readable after the detach
    attachment = plan.attach(model)
    assert set(attachment.fired().values()) == {0}  # counted anew
    attachment.detach()


def test_fired_counts_under_inference_mode_and_training_alike(tiny):
    model = tiny("llama")
    plan = steered()
    with torch.inference_mode():
        attachment = plan.attach(model)
        attachment.step(3)
        model(ids())
    model(ids(), labels=ids()).loss.backward()
    attachment.step(4)
    assert attachment.fired() == {"add@layers.1.output": 28}
    attachment.detach()


def test_explain_says_what_acts_where_when_and_how(tiny):
    plan = Plan(
        [
            Intervention(Add(3 * torch.ones(32)), "layers.1.output", "response", 0.5, schedule=WarmupDecay(2, 2, 8), phases="train"),
            Intervention(Ablate(torch.eye(32)[:2]), "layers.-1.attn.output", "positions[0,-1]", roles=ROLES, enabled=False),
        ]
    )
    attachment = plan.attach(tiny("llama"))
    attachment.step(1)
    text = attachment.explain()
    attachment.detach()
    for words in (
        "plan of 2 intervention(s), attached, step 1",
        "1. add@layers.1.output: add v, |v| = 16.97 at layers.1.output (model.layers.1), width 32",
        "strength 0.25 now (WarmupDecay(warmup=2, decay=2, total=8))",
        "on response tokens, in train, for the policy pass",
        "2. ablate@layers.-1.attn.output: ablate a span of rank 2 at layers.-1.attn.output (model.layers.2.self_attn), width 32",
        "strength 0 now (Constant(value=1.0)), switched off",
        "on positions[0,-1] tokens, in train, validate, generate, for the policy and reference pass",
    ):
        assert words in text, text
    assert "not attached" in attachment.explain() and "not attached" in plan.explain()


def test_explain_has_the_phases_and_the_schedule_of_the_attach(tiny):
    """A training run may give a plan fewer phases, and another schedule."""
    plan = Plan(Intervention(Add(torch.ones(32)), "layers.1.output"))
    attachment = plan.attach(tiny("llama"), phases=("train",), schedule=WarmupDecay(2, 2, 8))
    attachment.detach()
    assert "in train, for the policy pass" in attachment.explain() and "(WarmupDecay(warmup=2, decay=2, total=8))" in attachment.explain()
    assert "in train, validate, generate" in plan.explain() and attachment.as_plan().interventions[0].phases == PHASES


# ---- keeping


def full_plan(model) -> Plan:
    return Plan(
        [
            Intervention(Add(torch.stack([vector(seed=1), vector(seed=2)])), "layers.1.output", "response", [0.5, -1.0]),
            Intervention(Ablate(torch.randn(3, 32)), "layers.0.attn.output", "positions[0,-1]", 0.3, phases="train", enabled=False),
            Intervention(Add(vector()), "module:model.layers.2.mlp:output", schedule=Linear(5), roles=ROLES, name="third"),
        ],
        fingerprint=Anatomy.find(model).fingerprint(),
    )


@pytest.mark.parametrize("name", ["plan", "plan.safetensors"])
def test_a_saved_plan_comes_back_to_the_bit(name, tmp_path, tiny):
    model = tiny("llama")
    plan = full_plan(model)
    loaded = Plan.load(plan.save(tmp_path / name))
    assert loaded.fingerprint == plan.fingerprint and loaded.explain() == plan.explain()
    outputs = []
    for saved in (plan, loaded):
        with saved.attached(model) as attachment:
            attachment.enable()
            attachment.step(3)
            attachment.set_rows([1, 0, 1])
            outputs.append(model(**padded("left")).logits)
    assert torch.equal(*outputs)
    for ours, theirs in zip(plan.interventions, loaded.interventions, strict=True):
        assert ours.to_dict() == theirs.to_dict()
        assert all(torch.equal(ours.operator.tensors[key], theirs.operator.tensors[key]) for key in ours.operator.tensors)


def test_the_manifest_can_be_read_by_a_person(tmp_path, tiny):
    full_plan(tiny("llama")).save(tmp_path / "plan")
    manifest = json.loads((tmp_path / "plan" / "manifest.json").read_text())
    assert manifest["kind"] == "plan" and manifest["fingerprint"]["model_type"] == "llama"
    assert manifest["interventions"][1] == {
        "name": "ablate@layers.0.attn.output",
        "operator": "ablate",
        "options": {},
        "site": "layers.0.attn.output",
        "scope": "positions[0,-1]",
        "strength": [pytest.approx(0.3)],
        "phases": ["train"],
        "roles": ["policy"],
        "schedule": {"name": "constant", "value": 1.0},
        "enabled": False,
        "gate": None,
        "preserve_norm": False,
        "learned": [],
        "frozen": [],
    }


def test_files_that_are_no_plan_are_refused(tmp_path, tiny):
    path = full_plan(tiny("llama")).save(tmp_path / "plan")
    torch.save({"vector": vector()}, tmp_path / "pickle.safetensors")
    with pytest.raises(UnsafeFileError):
        Plan.load(tmp_path / "pickle.safetensors")
    from steer import files

    files.save_artifact(tmp_path / "other", "directions", {"x": vector()}, {})
    with pytest.raises(WrongKindError):
        Plan.load(tmp_path / "other")
    files.save_artifact(tmp_path / "parts", "plan", {"0.vector": vector()}, {"interventions": [{"operator": "add"}]})
    with pytest.raises(DamagedFileError, match="lacks a part"):
        Plan.load(tmp_path / "parts")
    files.save_artifact(tmp_path / "new", "plan", {"0.x": vector()}, {"interventions": [{"operator": "addd", "options": {}}]})
    with pytest.raises(ConfigError, match="did you mean 'add'"):
        Plan.load(tmp_path / "new")
    data = bytearray((path / "tensors.safetensors").read_bytes())
    data[-3] ^= 0xFF
    (path / "tensors.safetensors").write_bytes(bytes(data))
    with pytest.raises(DamagedFileError):
        Plan.load(path)


def test_a_resumed_plan_goes_on_where_it_was():
    attachment, resumed = (attachment_of(steered(strength=2.0, schedule=Linear(10))) for _ in range(2))
    attachment.step(4)
    attachment.set_strength(3.0)
    attachment.enable(False)
    resumed.load_state_dict(attachment.state_dict())
    assert resumed.state_dict()["step"] == 4
    for state_holder in (attachment, resumed):
        state_holder.enable()
        assert state_holder.interventions[0].strength.item() == pytest.approx(1.2)
    attachment.set_strength(9.0)
    assert resumed.interventions[0].base == (3.0,)  # nothing shared
    with pytest.raises(ConfigError, match="another plan"):
        resumed.load_state_dict(attachment_of(Plan(Intervention(Add(vector()), "embed"))).state_dict())


@pytest.mark.parametrize(("scope", "strength"), [("generated[:8]", 2.0), ("all", [2.0, 3.0])])
def test_a_state_that_does_not_fit_changes_nothing(scope, strength):
    """Interventions before the misfit stay unchanged too."""

    def attached(scope, strength) -> Attachment:
        second = Intervention(Add(vector()), "layers.0.output", scope, strength=strength, name="b")
        return attachment_of(Plan([Intervention(Add(vector()), "embed", name="a"), second]))

    attachment, misfit = attached("all", 2.0), attached(scope, strength)
    misfit.set_strength(7.0, "a")
    with pytest.raises(ConfigError, match=r"the state of 'b' does not fit"):
        attachment.load_state_dict(misfit.state_dict())
    assert [intervention.base for intervention in attachment.interventions] == [(1.0,), (2.0,)]
    assert [intervention.strength.item() for intervention in attachment.interventions] == [1.0, 2.0]


def test_an_attachment_that_is_detached_takes_nothing(tiny):
    attachment = steered().attach(tiny("llama"))
    attachment.detach()
    before = attachment.state_dict(), attachment.explain(), attachment.fired(), attachment.as_plan().explain()
    changes = {
        "set_strength": lambda: attachment.set_strength(3.0),
        "step": lambda: attachment.step(3),
        "enable": lambda: attachment.enable(False),
        "set_rows": lambda: attachment.set_rows([0]),
        "set_window": lambda: attachment.set_window(0, 2),
        "detach": attachment.detach,
    }
    for change in changes.values():
        with pytest.raises(AttachError, match="this plan is not attached"):
            change()
    after = attachment.state_dict(), attachment.explain(), attachment.fired(), attachment.as_plan().explain()
    assert str(before) == str(after)
    attachment.load_state_dict(before[0])  # as a run does that begins again


def test_names_and_rows_are_typed(tiny):
    two = Plan(Intervention(Add(torch.stack([vector(), -vector()])), "layers.1.output", name="x"))
    with two.attached(tiny("llama")) as attachment:
        for rows in ([True, False], torch.tensor([True, False]), [[0, 1], [1, 0]], 1, [0.0]):
            with pytest.raises(ConfigError, match="row slots are no whole numbers"):
                attachment.set_rows(rows)
        for name in (["x"], 0):
            with pytest.raises(ConfigError, match="wrong type for the name of an intervention"):
                attachment.set_strength(1.0, name)
        attachment.set_rows([0, 1])
        assert attachment["x"].rows.tolist() == [0, 1]
