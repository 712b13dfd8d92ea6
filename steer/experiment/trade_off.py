"""What effects cost in an experiment: every arm by effect and damage, and the primary arm against the others at equal damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from steer.experiment.arms import Arm
from steer.experiment.metric import HIGHER
from steer.experiment.outcome import GUARDRAIL, Outcome
from steer.experiment.pareto import at_equal_damage, pareto
from steer.experiment.scores import Scores
from steer.experiment.stats import Table
from steer.experiment.treatment import NEVER


class TradeOffs(NamedTuple):
    """Effect on the primary outcome and damage in the first guardrail, of every arm against the one that nothing is done to.

    Attributes:
        effects, damages: by arm, [items, seeds] and [items', seeds]; larger is better, and worse.
    """

    outcome: Outcome
    guardrail: Outcome
    effects: Mapping[str, Table]
    damages: Mapping[str, Table]


def all_trade_offs(scores: Scores, arms: Sequence[Arm], outcome: Outcome, outcomes: Sequence[Outcome]) -> list[TradeOffs]:
    """In each guardrail; none in an experiment without an untreated arm."""
    untreated = next((arm.name for arm in arms if arm.when == NEVER), None)
    guardrails = [each for each in outcomes if each.role == GUARDRAIL]
    return [] if untreated is None else [_trade_offs(scores, arms, outcome, guardrail, untreated) for guardrail in guardrails]


def _trade_offs(scores: Scores, arms: Sequence[Arm], outcome: Outcome, guardrail: Outcome, untreated: str) -> TradeOffs:
    better = 1 if outcome.better == HIGHER else -1
    worse = -1 if guardrail.better == HIGHER else 1
    others = [arm.name for arm in arms if arm.name != untreated]
    effects = {name: better * scores.difference(outcome.name, name, untreated).values for name in others}
    damages = {name: worse * scores.difference(guardrail.name, name, untreated).values for name in others}
    return TradeOffs(outcome, guardrail, effects, damages)


def undominated(costs: TradeOffs | None) -> list[dict[str, Any]]:
    """Every arm's place, and how surely no other has more effect for less damage."""
    if costs is None:
        return []
    names = {"outcome": costs.outcome.name, "guardrail": costs.guardrail.name}
    return [asdict(each) | names for each in pareto(costs.effects, costs.damages)]


def compared_at_equal_damage(costs: TradeOffs | None, arms: Sequence[Arm], primary: str) -> list[dict[str, Any]]:
    """The method of the primary arm against every other one where both do the same damage; the doses of a sweep are one method.

    Returns:
        an entry for each other method; `difference` is None where one of the two does no damage at any dose: there is no such place.
    """
    if costs is None:
        return []
    methods: dict[str, list[str]] = {}
    for arm in arms:
        if arm.name in costs.effects:
            methods.setdefault(arm.sweep or arm.name, []).append(arm.name)
    first = next((method for method, of_method in methods.items() if primary in of_method), None)
    if first is None:  # the primary contrast is about the untreated arm
        return []
    runs = {method: [(costs.effects[name], costs.damages[name]) for name in of_method] for method, of_method in methods.items()}
    most = {method: max(float(damage.mean()) for _, damage in of_method) for method, of_method in runs.items()}  # type: ignore[union-attr]
    compared = []
    for other in methods:
        if other == first:
            continue
        entry: dict[str, Any] = {"a": first, "b": other, "outcome": costs.outcome.name, "guardrail": costs.guardrail.name}
        if min(most[first], most[other]) > 0:
            entry |= asdict(at_equal_damage(first, other, {first: runs[first], other: runs[other]}))
        else:
            entry |= {"difference": None, "most_damage": [most[first], most[other]]}
        compared.append(entry)
    return compared
