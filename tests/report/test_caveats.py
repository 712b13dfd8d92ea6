"""Caveats follow from the design, and none is said where it does not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from steer.report.caveats import caveats

Tree = dict[str, Any]


def said(metrics: Tree) -> str:
    return "\n".join(caveats(metrics, {}))


def test_of_five_seeds(five_seeds: Tree) -> None:
    text = said(five_seeds)
    assert "8 control draws" in text and "p = 0.11" in text and "19 draws are needed" in text
    assert "1 contrast was looked at besides the planned ones" in text and "of 'inference' is worse than its margin allows" in text
    for absent in ("One seed", "not locked", "No arm is a prompt", "matched random control", "below the smallest effect", "planned seeds"):
        assert absent not in text, absent


def test_of_one_seed(one_seed: Tree, bare: Tree) -> None:
    assert "One seed (0)" in said(one_seed) and "The question was not locked" in said(one_seed)
    for words in ("No arm is a matched random control", "No arm is a prompt", "One seed"):
        assert words in said(bare)


def unsure(tree: Tree) -> None:
    tree["guardrails"][0]["outcome"] = "not shown to be kept"


def among_its_controls(tree: Tree) -> None:
    tree["specificity"]["controls"] = [tree["specificity"]["effect"] + shift for shift in (-0.2, 0.1)]


def without_guardrails(tree: Tree) -> None:
    tree["guardrails"] = []


def three_seeds_of_five(tree: Tree) -> None:
    tree["question"]["seeds"] = [0, 1, 2]


def deviated(tree: Tree) -> None:
    tree["design"]["lock"] |= {"confirmatory": False, "deviations": ["alpha: locked 0.05, now 0.1"]}


def small(tree: Tree) -> None:
    tree["contrasts"][0]["difference"] = 0.5 * tree["power"]["smallest_effect"]


def constant(tree: Tree) -> None:
    for arm in tree["arms"]:
        arm["outcomes"]["neutral_loss"]["mean"] = 3.0


def missing(tree: Tree) -> None:
    del tree["arms"][3]["outcomes"]["neutral_loss"]


def half_wrong(tree: Tree) -> None:
    tree["wrong_way"]["share"] = 0.5


def untrained(tree: Tree) -> None:
    tree["design"]["trained"] = False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_guardrails, "No guardrail was set"),
        (among_its_controls, "'preventative' lies within the range of its control draws"),
        (unsure, "task_logprob of 'preventative' is not shown to stay within its margin"),
        (three_seeds_of_five, "3 of 5 planned seeds are done"),
        (three_seeds_of_five, "3 seeds: an interval over so few seeds is wide"),
        (deviated, "The locked question was deviated from: alpha: locked 0.05, now 0.1."),
        (small, "below the smallest effect"),
        (constant, "neutral_loss is the same in every arm"),
        (missing, "neutral_loss was not measured in inference"),
        (half_wrong, "50 % of the items moved the wrong way"),
        (untrained, "No arm was trained"),
    ],
)
def test_each_belongs_to_its_design(five_seeds: Tree, change: Callable[[Tree], None], words: str) -> None:
    assert words not in said(five_seeds)
    change(five_seeds)
    assert words in said(five_seeds)


def test_nineteen_draws_are_enough(five_seeds: Tree) -> None:
    five_seeds["arms"][2]["draws"] = 19
    assert "control draw" not in said(five_seeds)
