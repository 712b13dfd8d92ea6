"""Plans as text: what is read is written back, and what cannot be read is shown."""

from __future__ import annotations

import re
import time

import pytest
import torch
from hand import ids, vector
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.directions.direction import Direction, Directions
from steer.directions.text import plan_from_text, plan_to_text
from steer.errors import ConfigError, WrongModelError
from steer.intervene import OPERATORS, Ablate, Add, CallGate, CosineGate, Intervention, Linear, Mirror, Plan, ProbeGate
from steer.model.anatomy import Anatomy
from steer.model.site import Site


def read_at(layer: int, seed: int, **metrics: float) -> Direction:
    return Direction(Site.parse(f"layers.{layer}.output"), vector(seed=seed), "mean_difference", "response", metrics)


LAYERS = [read_at(layer, layer, auc=auc, dprime=1.0) for layer, auc in enumerate((0.7, 0.9, 0.8))]
NAMES = {
    "warm": Directions(LAYERS, "warm", {"model": {"width": 32, "embedding_digest": "a"}}),
    "verbose": read_at(0, 10),
    "Überlang_2": Directions([read_at(2, 11)], "imported", {}),
    "ablate": read_at(1, 12),
}
GATES = {
    "harmful": ProbeGate(vector(seed=20)),
    "late": ~CosineGate(vector(seed=21), site="layers.0.input"),
    "mine": CallGate(lambda h, ctx: h[..., 0], 32) & ProbeGate(vector(seed=20)),
}


def described(plan: Plan) -> list[object]:
    description: list[object] = [plan.fingerprint]
    for intervention in plan.interventions:
        settings = {name: getattr(intervention, name) for name in ("name", "site", "scope", "enabled", "phases", "roles", "preserve_norm")}
        gate = intervention.gate
        numbers = None if gate is None else (str(gate), [site_gate.number for site_gate in gate.site_gates()])
        operator = intervention.operator
        tensors = {name: tensor.tolist() for name, tensor in operator.tensors.items()}
        description.append((settings, list(intervention.strength), operator.name, operator.options(), tensors, numbers))
    return description


# ---- reading


def test_a_text_is_the_plan_that_it_says():
    plan = plan_from_text("0.4 warm@response - 0.2 verbose:layers.2.mlp.output@generated[:32] ?harmful + ablate warm ^", NAMES, GATES)
    written_out = [
        Intervention(Add(LAYERS[1].vector), "layers.1.output", "response", 0.4, name="warm"),
        Intervention(Add(vector(seed=10)), "layers.2.mlp.output", "generated[:32]", -0.2, name="verbose", gate=GATES["harmful"]),
        Intervention(Ablate(LAYERS[1].vector), "layers.1.output", name="warm", preserve_norm=True),
    ]
    expected = Plan(written_out, fingerprint={"width": 32, "embedding_digest": "a"})
    assert described(plan) == described(expected)
    assert [intervention.name for intervention in plan.interventions] == ["warm", "verbose", "warm#2"]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("warm", "1 warm:layers.1.output@all"),
        ("-warm", "-1 warm:layers.1.output@all"),
        ("+ .5 warm:layers.0.output", "0.5 warm:layers.0.output@all"),
        ("1e-3 verbose", "0.001 verbose:layers.0.output@all"),
        ("2. ablate", "2 ablate:layers.1.output@all"),
        ("2 ablate ablate:layers.-1.output", "2 ablate ablate:layers.-1.output@all"),
        ("Überlang_2 @ prompt[-4:] | last ! tokens[ 5, 7 ] ~ 32.50", "1 Überlang_2:layers.2.output@prompt[-4:]|last!tokens[5,7]~32.5"),
        ("verbose:module:a.b-c:output-warm", "1 verbose:module:a.b-c:output@all - 1 warm:layers.1.output@all"),
        ("verbose:module:model.norm:input?late^", "1 verbose:module:model.norm:input@all ?late ^"),
        ("warm-verbose+warm@generated~8-3 verbose", "1 warm:layers.1.output@all - 1 verbose:layers.0.output@all "
         "+ 1 warm:layers.1.output@generated~8 - 3 verbose:layers.0.output@all"),
        ("0.1 warm\n  - 0.30000001 warm", "0.1 warm:layers.1.output@all - 0.3 warm:layers.1.output@all"),
    ],
)  # fmt: skip
def test_the_canonical_text(text, canonical):
    plan = plan_from_text(text, NAMES, GATES)
    assert plan_to_text(plan, NAMES, GATES) == canonical
    assert described(plan_from_text(canonical, NAMES, GATES)) == described(plan)


SELECTORS = ["all", "prompt", "generated[:32]", "response[2:-1]", "positions[0,-1]", "tokens[5,7]", "role[user,tool]", "last"]
SCOPES = st.builds(
    lambda parts, out, fade, space: f"{space}{'|'.join(parts)}{space}" + "".join(f"!{name}" for name in out) + fade + space,
    st.lists(st.sampled_from([*SELECTORS, "last&prompt", "all & role[user]"]), min_size=1, max_size=3),
    st.lists(st.sampled_from(SELECTORS), max_size=2),
    st.sampled_from(["", "~8", "~ 0.25"]),
    st.sampled_from(["", " "]),
)
TEXTS = st.lists(
    st.builds(
        lambda number, operator, name, site, scope, gate, norm: f"{number}{operator}{name}{site}{scope}{gate}{norm}",
        st.just("") | st.floats(0, 1e6, width=32).map(lambda number: f"{number} "),
        st.sampled_from(["", "add ", "ablate ", "mirror "]),
        st.sampled_from(list(NAMES)),
        st.sampled_from(["", ":layers.2.output"]),
        st.just("") | SCOPES.map("@{}".format),
        st.sampled_from(["", "?harmful", " ? late "]),
        st.sampled_from(["", "^", " ^ "]),
    ).filter(lambda term: not re.search(r"(verbose|ablate):", term)),
    min_size=1,
    max_size=4,
).flatmap(lambda terms: st.lists(st.sampled_from(["+", "-", " + ", " - "]), min_size=len(terms), max_size=len(terms)).map(
    lambda signs: "".join(sign + term for sign, term in zip(signs, terms, strict=True))
))  # fmt: skip


@given(TEXTS)
@settings(max_examples=50)
def test_reading_and_writing_come_back_to_the_same_plan(text):
    plan = plan_from_text(text, NAMES, GATES)
    canonical = plan_to_text(plan, NAMES, GATES)
    again = plan_from_text(canonical, NAMES, GATES)
    assert described(again) == described(plan) and plan_to_text(again, NAMES, GATES) == canonical


@given(st.text("0.4 warm@response-ablate:layers.1output[:3]?harmful^~!|&+", max_size=40))
def test_any_text_is_a_plan_or_a_mistake_with_its_place(text):
    try:
        plan = plan_from_text(text, NAMES, GATES)
    except ConfigError as error:
        at = int(re.search(r"at character (\d+) of", str(error))[1])
        assert 1 <= at <= len(text) + 1
    else:
        assert described(plan_from_text(plan_to_text(plan, NAMES, GATES), NAMES, GATES)) == described(plan)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"no name of a direction, at character 1 of ''[\s\S]*the end of the text"),
        ("0.4warm", r"at character 1 of '0.4warm'[\s\S]*with a space after a number"),
        ("0.4 warn@response", r"no direction is called 'warn', at character 5[\s\S]*one of warm, verbose[\s\S]*did you mean 'warm'"),
        ("warm + ", "no name of a direction, at character 8"),
        ("warm - - verbose", "no name of a direction, at character 8"),
        ("warm verbose", r"'warm' and 'verbose' stand side by side, at character 6[\s\S]*put a \+ or -"),
        ("ablat warm", r"unknown operator 'ablat', at character 1[\s\S]*did you mean 'ablate'"),
        ("replace warm", r"operator 'replace' needs more than a direction, at character 1[\s\S]*target"),
        ("warm + clamp warm", r"'clamp' needs a value or a range, at character 8"),
        ("1e999 warm", r"not finite, at character 1 "),
        ("warm:layers.9.output", r"'warm' was not read at 'layers.9.output', at character 6[\s\S]*layers.0.output, layers.1.output"),
        ("warm:layers.1.outptu", r"unknown site 'layers.1.outptu', at character 6[\s\S]*did you mean 'layers.1.output'"),
        ("warm:", "no site, at character 6"),
        ("warm:layers.*.output", r"not clear which direction acts at 'layers.\*.output', at character 6[\s\S]*3 directions"),
        ("verbose:layers.*.outptu", r"unknown sites 'layers.\*.outptu', at character 9[\s\S]*did you mean 'layers.\*.output'"),
        ("verbose:layers.1.output,", "cannot be read, at character 24"),
        ("warm@", "no scope, at character 6"),
        ("warm@respons", r"unknown scope 'respons', at character 6[\s\S]*did you mean 'response'"),
        ("2 warm @ prompt[a]", r"'prompt\[a\]' has no window, at character 10"),
        ("warm@prompt[:3", r"cannot be read, at character 12[\s\S]*found: '\[:3'"),
        ("warm@prompt?", "no name of a gate, at character 13"),
        ("warm?harmfull", r"no gate is called 'harmfull', at character 6[\s\S]*did you mean 'harmful'"),
        ("warm^^", "cannot be read, at character 6"),
        ("warm^@prompt", "cannot be read, at character 6"),
        ("warm % 3", r"cannot be read, at character 6[\s\S]*put a \+ or - between terms"),
        ("warm three words", "cannot be read, at character 12"),
    ],
)
def test_mistakes_are_shown(text, says):
    with pytest.raises(ConfigError, match=says):
        plan_from_text(text, NAMES, GATES)


@pytest.mark.parametrize(
    ("site", "entries"),
    [
        ("layers.*.output", ["layers.*.output"]),
        ("layers.4-9.mlp.output", ["layers.4-9.mlp.output"]),
        ("layers.-1.output,layers.0-2.attn.output,embed", ["layers.-1.output", "layers.0-2.attn.output", "embed"]),
        ("module:a-b.0:output,module:c:input", ["module:a-b.0:output", "module:c:input"]),
    ],
)
def test_several_sites_are_read_and_written(site, entries):
    text = f"0.4 verbose:{site}@response - 2 Überlang_2:{site}@all"
    plan = plan_from_text(text, NAMES)
    assert [[str(entry) for entry in intervention.site.entries] for intervention in plan.interventions] == [entries, entries]
    assert [str(intervention.scope) for intervention in plan.interventions] == ["response", "all"]
    assert plan_to_text(plan, NAMES) == text


def test_thousands_of_terms_take_less_than_a_second():
    text = " + ".join(["0.4 verbose@response"] * 5000)
    seconds = []
    for _ in range(3):  # other work on the machine slows some of them
        start = time.process_time()
        plan = plan_from_text(text, NAMES)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0
    assert plan.interventions[-1].name == "verbose#5000"
    first, second = (intervention.operator.tensors["vector"] for intervention in plan.interventions[:2])
    assert first.data_ptr() != second.data_ptr()  # what one of them learns, or is given, stays its own


def test_nothing_is_known_without_names():
    with pytest.raises(ConfigError, match=r"no direction is called 'warm'[\s\S]*no direction was given"):
        plan_from_text("warm", {})
    with pytest.raises(ConfigError, match=r"no gate is called 'harmful'[\s\S]*no gate was given"):
        plan_from_text("warm?harmful", NAMES)


def test_directions_of_two_models_are_refused():
    second = Directions(LAYERS, "other", {"model": {"width": 64, "embedding_digest": "b"}})
    with pytest.raises(WrongModelError, match=r"'warm' and 'other' were read from different models[\s\S]*'width': 64"):
        plan_from_text("warm + other", {**NAMES, "other": second})
    tuned = Directions(LAYERS, "tuned", {"model": {"width": 32, "embedding_digest": "b"}})  # attaching compares the weights
    assert plan_from_text("tuned + warm", {**NAMES, "tuned": tuned}).fingerprint["embedding_digest"] == "b"


def test_directions_without_a_measurement_need_a_site():
    both = Directions([read_at(0, 1), read_at(1, 2)], "imported", {})
    with pytest.raises(ConfigError, match=r"was not measured, at character 1[\s\S]*choose site"):
        plan_from_text("imported", {"imported": both})
    assert str(plan_from_text("imported:layers.1.output", {"imported": both}).interventions[0].site) == "layers.1.output"


# ---- operators


@pytest.mark.parametrize("name", list(OPERATORS))
def test_operators_that_need_nothing_but_a_vector_have_a_text(name):
    """Operators that need more say so; this test picks up a new operator by itself."""
    try:
        plan = plan_from_text(f"0.5 {name} warm@response", NAMES)
    except ConfigError as error:
        assert "at character 5" in str(error) or "at character 1" in str(error)
        return
    word = "" if name == "add" else f"{name} "
    assert plan_to_text(plan, NAMES) == f"0.5 {word}warm:layers.1.output@response"


# ---- writing


def test_gates_are_known_by_what_they_compare():
    plan = Plan(Intervention(Add(vector(seed=10)), "layers.0.output", gate=ProbeGate(vector(seed=20))))
    assert plan_to_text(plan, NAMES, GATES) == "1 verbose:layers.0.output@all ?harmful"
    mine = plan_from_text("verbose ?mine", NAMES, GATES)
    assert plan_to_text(mine, NAMES, GATES) == "1 verbose:layers.0.output@all ?mine"


def test_a_plan_from_a_file_or_made_by_hand(tmp_path, tiny):
    plan = plan_from_text("0.4 warm@generated[:8] - ablate verbose ^", NAMES)
    model = tiny("llama")
    plan.fingerprint = Anatomy.find(model).fingerprint()
    with plan.attached(model) as attachment, torch.no_grad():
        model(ids(), use_cache=True)
        attachment.set_window(2, 5, "warm")
        plan = attachment.as_plan()
    text = "0.4 warm:layers.1.output@generated[2:5] - 1 ablate verbose:layers.0.output@all ^"
    assert plan_to_text(plan, NAMES) == plan_to_text(Plan.load(plan.save(tmp_path / "plan")), NAMES) == text
    by_hand = Plan(Intervention(Add(vector(seed=10)), "layers.2.attn.output", "last"))
    assert plan_to_text(by_hand, NAMES) == "1 verbose:layers.2.attn.output@last"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schedule": Linear(3)}, "a schedule"),
        ({"phases": ("train",)}, "phases"),
        ({"roles": ("policy", "reference")}, "roles"),
        ({"strength": [1.0, 2.0]}, "row slots"),
        ({"enabled": False}, "a switch that is off"),
        ({"operator": Add(vector(seed=10)).train()}, "tensors that are learned"),
        ({"operator": Add(vector(seed=99))}, "what 'add' makes of one of warm, verbose"),
        ({"operator": Add(torch.ones(8))}, "other tensors or settings"),
        ({"operator": Mirror(vector(seed=10), boundary=3.0)}, "other tensors or settings"),
        ({"site": "layers.2.output", "operator": Add(LAYERS[1].vector)}, "at layers.2.output"),
        ({"gate": ProbeGate(vector(seed=21))}, "has no name"),
        ({"gate": ProbeGate(vector(seed=20), per="row")}, "has no name"),
        ({"gate": CallGate(lambda h, ctx: h[..., 0], 32)}, "has no name"),
    ],
)
def test_what_has_no_text_says_why(options, says):
    plan = Plan(Intervention(**{"operator": Add(vector(seed=10)), "site": "layers.0.output", **options}))
    with pytest.raises(ConfigError, match=says):
        plan_to_text(plan, NAMES, GATES)
