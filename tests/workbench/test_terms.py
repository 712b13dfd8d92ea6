"""What the page moves comes back as the text of a plan."""

from __future__ import annotations

import pytest
from workbench.workbench_helpers import METRICS, names

from steer.errors import ConfigError
from steer.workbench.terms import bound_of, described, moved, spelt_out

NAMES = names()
PLAN = "0.4 warm@response ^ - 2 ablate cold:layers.1.output + 0.5 clamp(sae, feature=3, to=2)@generated"


def after(*changes: dict[str, object]) -> str:
    text = spelt_out(PLAN, NAMES, {})[1]
    return spelt_out(moved(text, changes, NAMES, {}), NAMES, {})[1]


def test_nothing_moved_is_the_same_plan() -> None:
    assert after() == spelt_out(PLAN, NAMES, {})[1]


def test_strength_scope_and_site_of_one_term_move_and_nothing_else() -> None:
    before = spelt_out(PLAN, NAMES, {})[1]
    assert before.startswith("0.4 warm:layers.0.output@response ^ - 2 ablate cold")
    assert after({"term": 0, "strength": -1.25}) == before.replace("0.4 warm", "-1.25 warm")
    assert after({"term": 0, "scope": "prompt[-4:] | last"}) == before.replace("@response", "@prompt[-4:]|last")
    assert after({"term": 0, "site": "layers.1.output"}) == before.replace("warm:layers.0", "warm:layers.1")
    assert after({"term": 1, "strength": 0}) == before.replace("- 2 ablate", "+ 0 ablate")
    assert after({"term": 2, "strength": 1e-7}) == before.replace("+ 0.5 clamp", "+ 0.0000001 clamp")


def test_a_direction_that_moves_takes_the_vector_of_its_new_layer() -> None:
    text = spelt_out("warm", NAMES, {})[1]
    plan, _ = spelt_out(moved(text, [{"term": 0, "site": "layers.1.output"}], NAMES, {}), NAMES, {})
    (intervention,) = plan.interventions
    assert str(intervention.site) == "layers.1.output"
    assert intervention.operator.tensors["vector"].flatten().equal(NAMES["warm"]["layers.1.output"].vector)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"term": 3, "strength": 1}, "no such term"),
        ({"term": True, "strength": 1}, "no such term"),
        ({"term": 0, "strength": float("nan")}, "strength of 'warm'"),
        ({"term": 0, "strength": 10**400}, "strength of 'warm'"),
        ({"term": 0, "strength": "1 warm + 1"}, "strength of 'warm'"),
        ({"term": 0, "scope": "respons"}, "respons"),
        ({"term": 0, "scope": "all + 3 cold"}, "all + 3 cold"),
        ({"term": 0, "site": "layers.2.output"}, "site of 'warm'"),
        ({"term": 2, "site": "layers.0.output"}, "site of 'sae'"),
        ({"term": 0, "operator": "ablate"}, "what changes of 'warm'"),
        ("strength", "a change of a plan"),
    ],
)
def test_what_no_plan_can_have_is_refused(change: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace("+", r"\+")):
        after(change)


def test_the_page_is_told_ranges_sites_and_doses() -> None:
    plan, text = spelt_out(PLAN, NAMES, {})
    warm, cold, sae = described(plan, text, NAMES)
    assert (warm["what"], cold["what"], sae["what"]) == ("warm", "ablate cold", sae["what"])
    assert sae["what"].startswith("clamp_features(sae, feature") and sae["features"] == [3]
    assert warm["sites"] == cold["sites"] == ["layers.0.output", "layers.1.output"] and len(sae["sites"]) == 1
    assert warm["dose"] == pytest.approx(8 / METRICS["activation_norm"]) and cold["dose"] is None and sae["dose"] is None
    assert "AUC 0.9" in warm["about"] and sae["features"] == [3]
    assert [bound_of(strength) for strength in (0, 0.4, -0.6, 3, 20)] == [1, 1, 2, 10, 50]
