"""Manifests and states with a part missing, wrong, or too many: typed errors, and nothing changed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hand import attachment_of, vector

from steer import files
from steer.errors import ConfigError, DamagedFileError, NonFiniteError, SteerError
from steer.intervene import GATES, Add, CosineGate, Intervention, Linear, Plan, ProbeGate
from steer.intervene.gate import SiteGate

SITE = "layers.1.output"

# an intervention as version 0.1.0 wrote it
OLD = {
    "name": "add@layers.1.output",
    "operator": "add",
    "options": {},
    "site": SITE,
    "scope": "generated[:4]",
    "strength": [1.0, 2.0],
    "phases": ["train", "validate", "generate"],
    "roles": ["policy"],
    "schedule": {"name": "linear", "steps": 5, "start": 0.0, "end": 1.0},
    "enabled": True,
    "gate": {"and": [{"gate": "probe", "options": {"site": None, "per": "token", "over": "prompt", "pool": "mean"}}, {"not": [
        {"gate": "cosine", "options": {"site": "layers.0.output", "per": "row", "over": "prompt", "pool": "max"}}]}]},
    "preserve_norm": False,
    "learned": ["gate0.bias", "gate0.vector"],
    "frozen": ["gate0.bias"],
}  # fmt: skip
OLD_TENSORS = {
    "0.vector": torch.ones(2, 32),
    "0.gate0.vector": torch.ones(1, 32),
    "0.gate0.bias": torch.zeros(1),
    "0.gate0.sharpness": torch.ones(1),
    "0.gate1.vector": torch.ones(1, 32),
    "0.gate1.threshold": torch.full((1,), 0.1),
}


def saved(path: Path, manifest: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> Path:
    whole = {"fingerprint": None, "step": 2, "interventions": [OLD], "shared": {}}
    return files.save_artifact(path, "plan", OLD_TENSORS if tensors is None else tensors, manifest or whole)


def test_a_plan_of_the_first_version(tmp_path):
    plan = Plan.load(saved(tmp_path / "plan"))
    [intervention] = plan.interventions
    assert intervention.to_dict() == OLD and plan.step == 2
    assert intervention.tensors.keys() == {name.removeprefix("0.") for name in OLD_TENSORS}


def changed(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["interventions"][0].update({name: value})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda manifest: manifest.update(extra=1), "a plan has no 'extra'"),
        (changed("unknown", 3), "an intervention has no 'unknown'"),
        (changed("options", {"a": 1}), "'add' has no setting 'a'"),
        (changed("options", []), "holds a part that does not fit"),
        (changed("learned", ["gate0.bias", "nope"]), "lacks a part(.|\n)*'nope', which is said to be learned"),
        (changed("gate", None), "tensors of 'gate0', which the intervention does not have"),
        (changed("gate", {"and": []}), "gate 'and' of \\[\\], which takes 2 gates"),
        (changed("gate", {"not": [OLD["gate"], OLD["gate"]]}), "which takes 1 gates"),
        (changed("gate", {}), "holds a part that does not fit"),
        (changed("gate", "probe"), "holds a part that does not fit"),
        (changed("gate", {**OLD["gate"]["and"][0], "extra": 1}), "a gate has no 'extra'"),
        (changed("gate", {"gate": "probe", "options": {"pol": "max"}}), "pol"),
        (lambda manifest: manifest.update(interventions=["add"]), "holds a part that does not fit"),
        (lambda manifest: manifest.update(interventions=[]), "tensors of an intervention 0, which the plan does not have"),
        (lambda manifest: manifest.update(shared={"0.vector": "1.vector"}), "lacks a part"),
    ],
)
def test_manifests_with_a_wrong_part(change, match, tmp_path):
    manifest = copy.deepcopy({"fingerprint": None, "step": 2, "interventions": [OLD], "shared": {}})
    change(manifest)
    with pytest.raises(DamagedFileError, match=match):
        Plan.load(saved(tmp_path / "plan", manifest))


def test_tensors_that_are_missing_or_too_many(tmp_path):
    for tensors in (OLD_TENSORS | {"1.vector": torch.ones(1, 32)}, OLD_TENSORS | {"0.gate2.vector": torch.ones(1, 32)}):
        with pytest.raises(DamagedFileError, match="holds a part that does not fit"):
            Plan.load(saved(tmp_path / "plan", tensors=tensors))
    for name in ("0.vector", "0.gate1.vector"):
        with pytest.raises(DamagedFileError):
            Plan.load(saved(tmp_path / "plan", tensors={key: tensor for key, tensor in OLD_TENSORS.items() if key != name}))


@pytest.mark.parametrize("schema", [0, -1])
def test_a_schema_that_there_never_was(schema, tmp_path):
    path = saved(tmp_path / "plan")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"schema": schema}))
    with pytest.raises(DamagedFileError, match=f"a schema from 1(.|\n)*schema {schema}"):
        Plan.load(path)


def test_a_gate_without_tensors(tmp_path, monkeypatch):
    class Long(SiteGate):
        def __init__(self, **options: Any) -> None:
            super().__init__({}, 32, **options)

        def margin(self, h, ctx):
            return h.norm(dim=-1) - 1

    GATES.load()
    monkeypatch.setattr(GATES, "_entries", dict(GATES._entries))
    gate = GATES.register("long")(Long)() & CosineGate(vector())
    loaded = Plan.load(Plan(Intervention(Add(vector()), SITE, gate=gate)).save(tmp_path / "plan"))
    assert str(loaded.interventions[0].gate) == str(gate)


# ---- states


def plan() -> Plan:
    gate = ProbeGate(vector(), sharpness=1.0).train()
    return Plan(Intervention(Add(vector()), SITE, "generated[:8]", schedule=Linear(10), gate=gate, name="own"))


def of_own(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, "interventions": {"own": {**state["interventions"]["own"], **values}}}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {},
        lambda state: None,
        lambda state: [state],
        lambda state: {"step": 1},
        lambda state: {**state, "extra": 1},
        lambda state: {**state, "step": "x"},
        lambda state: {**state, "step": -1},
        lambda state: {**state, "step": 1.5},
        lambda state: {**state, "interventions": None},
        lambda state: {**state, "interventions": {}},
        lambda state: {**state, "interventions": {"own": None}},
        lambda state: {**state, "interventions": {"own": {}}},
        of_own(extra=1),
        of_own(base=[3.0]),
        of_own(base=torch.tensor(3.0)),
        of_own(base=torch.ones(2)),
        of_own(base=torch.full((1,), math.nan)),
        of_own(enabled="no"),
        of_own(window=3),
        of_own(window=(0, "x")),
        of_own(window=(0, 1, 2)),
        of_own(window=None),
        of_own(learned=None),
        of_own(learned={}),
        of_own(learned={"gate0.vector": [1.0], "gate0.bias": [1.0]}),
    ],
)
def test_states_that_are_none(spoil):
    attachment, saved_from = attachment_of(plan()), attachment_of(plan())
    saved_from.set_strength(3.0)
    saved_from.set_window(1, 2)
    saved_from.step(4)
    before = repr(attachment.state_dict())
    with pytest.raises(SteerError):
        attachment.load_state_dict(spoil(saved_from.state_dict()))
    assert repr(attachment.state_dict()) == before
    attachment.load_state_dict(saved_from.state_dict())
    assert repr(attachment.state_dict()) == repr(saved_from.state_dict()) != before


def test_what_is_wrong_with_a_state_is_said():
    attachment = attachment_of(plan())
    with pytest.raises(ConfigError, match="the state of a plan is not what an attachment saves(.|\n)*step, interventions"):
        attachment.load_state_dict({})
    with pytest.raises(ConfigError, match="`enabled` in the state of 'own'(.|\n)*True or False(.|\n)*no"):
        attachment.load_state_dict(of_own(enabled="no")(attachment.state_dict()))


def test_a_state_at_a_step_where_a_schedule_is_not_finite():
    own = Intervention(Add(vector()), SITE, schedule=lambda step: 1.0 if step < 2 else math.nan)
    attachment = attachment_of(Plan(own))
    state = attachment.state_dict() | {"step": 2}
    state["interventions"][own.name]["base"] = torch.full((1,), 3.0)
    with pytest.raises(NonFiniteError, match="nan at step 2"):
        attachment.load_state_dict(state)
    assert attachment.current_step == 0 and attachment.interventions[0].base == (1.0,)
