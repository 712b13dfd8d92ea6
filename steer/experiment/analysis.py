"""Analysis of an experiment: from scores and a question to contrasts, guardrails, specificity, trade-offs and a verdict, as one JSON tree.

The tree is what `metrics.json` holds (schema 2, docs/metrics.md), what the page shows and what `Result` prints: nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from steer.experiment.arms import Arm
from steer.experiment.contrasts import Answer, Contrast, answer, contrast
from steer.experiment.crossed import crossed
from steer.experiment.guardrails import Guardrail, guardrail
from steer.experiment.outcome import Outcome, check_informative
from steer.experiment.power import smallest_effect
from steer.experiment.question import Pair, Question
from steer.experiment.scores import Scores
from steer.experiment.specificity import rank_among_controls, wrong_way
from steer.experiment.stats import ROUNDING
from steer.experiment.trade_off import all_trade_offs, compared_at_equal_damage, undominated
from steer.experiment.treatment import NEVER

SCHEMA = 2
_WORDS = 20  # of a verdict


def analyse(
    scores: Scores,
    question: Question,
    arms: Sequence[Arm],
    outcomes: Sequence[Outcome],
    *,
    before: Mapping[str, Mapping[str, float]] | None = None,
    sizes: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
) -> dict[str, Any]:
    """All that is said of an experiment, JSON-able.

    Args:
        before: values of the model before training, by outcome and item.
        sizes: of each arm's draws, the quantity in which controls are matched.

    Raises:
        ConfigError: scores that are missing, or a primary outcome that tells nothing.
    """
    of_name = {outcome.name: outcome for outcome in outcomes}
    primary = of_name[question.primary.outcome]
    check_informative(primary, _by_arm(scores, primary.name))
    answered = answer(
        _contrast(scores, question.primary, of_name, question.alpha),
        [_contrast(scores, pair, of_name, question.alpha) for pair in question.secondary],
        [_contrast(scores, pair, of_name, question.alpha) for pair in question.exploratory],
    )
    guards = [_guardrail(scores, pair, of_name[pair.outcome], question.alpha) for pair in question.guardrails]
    specific = _specificity(scores, question, arms, primary)
    of_guardrails = all_trade_offs(scores, arms, primary, outcomes)
    first = of_guardrails[0] if of_guardrails else None
    return {
        "schema": SCHEMA,
        "question": {**question.to_dict(), "seeds": scores.seeds(question.primary.arm), "items": answered.primary.estimate.items},
        "verdict": verdict(answered.primary, primary, guards, specific),
        "outcomes": {outcome.name: _outcome(outcome) for outcome in outcomes},
        "arms": [_arm(arm, scores, outcomes, before or {}, (sizes or {}).get(arm.name, ())) for arm in arms],
        "contrasts": [_with_wanted(each, of_name) for each in answered.contrasts],
        "guardrails": [each.to_dict() for each in guards],
        "specificity": specific,
        "items": _items(scores, question.primary, primary),
        "wrong_way": _wrong_way(scores, question.primary, primary),
        "trade_off": undominated(first),
        "trade_off_others": [undominated(costs) for costs in of_guardrails[1:]],
        "equal_damage": compared_at_equal_damage(first, arms, question.primary.arm),
        "power": _power(answered),
        "sweep": _sweep(arms, scores, outcomes),
    }


def verdict(primary: Contrast, outcome: Outcome, guards: Sequence[Guardrail], specific: Mapping[str, Any] | None) -> str:
    """At most 20 words: what the primary contrast shows, and whether a guardrail was broken. Long names are shortened, never the claim."""
    of_arm = [each for each in guards if each.arm == primary.a]
    broken = [each.metric for each in of_arm if each.outcome == "exceeded"]
    unsure = [each.metric for each in of_arm if each.outcome != "kept"]
    wanted = primary.difference > 0 if outcome.better == "higher" else primary.difference < 0
    side = "higher" if primary.difference > 0 else "lower"
    # the contrast is with the mean of these draws; that another random edit would not have done as much only the rank can say
    among_draws = specific if primary.shown and wanted and specific is not None and specific["control"] == primary.b else None
    for words in range(_WORDS, 0, -1):
        arm, other, measured = (_short(name, words) for name in (primary.a, primary.b, primary.metric))
        if not primary.shown:
            said = f"No effect shown: {measured} of {arm} against {other}"
        else:
            said = f"{'Yes' if wanted else 'The wrong way'}: {arm} has {side} {measured} than {other}"
        if broken:
            said += f", but {_short(broken[0], words)} exceeds its margin"
        elif among_draws and among_draws["rank"] > 1:
            said += f", but {among_draws['rank'] - 1} of {len(among_draws['controls'])} control draws do as much"
        elif unsure and primary.shown:
            said += f"; {_short(unsure[0], words)} is not shown to keep its margin"
        elif among_draws and among_draws["p"] > primary.alpha * (1 + ROUNDING):
            draws = len(among_draws["controls"])
            said += f"; {draws} control {'draw is' if draws == 1 else 'draws are'} too few to call it specific"
        if len(said.split()) <= _WORDS:
            break
    return said


def _short(name: str, words: int) -> str:
    """The first words of a name."""
    parts = name.split()
    return name if len(parts) <= words else f"{' '.join(parts[:words])}\N{HORIZONTAL ELLIPSIS}"


# ---- parts


def _by_arm(scores: Scores, outcome: str) -> dict[str, dict[str, float]]:
    return {f"{place.arm}.{place.draw}.{place.seed}": scores[place] for place in scores if place.outcome == outcome}


def _tables(scores: Scores, pair: Pair) -> tuple[Tensor, Tensor]:
    """[items, seeds] of both arms."""
    of_arm = scores.matrix(pair.outcome, pair.arm).values
    return of_arm, of_arm - scores.difference(pair.outcome, pair.arm, pair.against).values


def _contrast(scores: Scores, pair: Pair, outcomes: Mapping[str, Outcome], alpha: float) -> Contrast:
    of_arm, of_other = _tables(scores, pair)
    return contrast(pair.outcome, pair.arm, pair.against, of_arm, of_other, unit=outcomes[pair.outcome].metric.unit, alpha=alpha)


def _with_wanted(each: Contrast, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    by_seed = each.differences.mean(0).tolist()
    return {**each.to_dict(), "shown": each.shown, "better": outcomes[each.metric].better, "by_seed": by_seed}


def _guardrail(scores: Scores, pair: Pair, outcome: Outcome, alpha: float) -> Guardrail:
    of_arm, of_other = _tables(scores, pair)
    return guardrail(
        pair.outcome,
        pair.arm,
        pair.against,
        of_arm,
        of_other,
        margin=outcome.margin,
        better=outcome.better,  # type: ignore[arg-type]
        unit=outcome.metric.unit,
        alpha=alpha,
    )


def _specificity(scores: Scores, question: Question, arms: Sequence[Arm], outcome: Outcome) -> dict[str, Any] | None:
    """Where the arm of the primary contrast stands among the draws of its control; None without one."""
    controls = [arm for arm in arms if arm.control_of == question.primary.arm]
    if not controls:
        return None
    control = next((arm for arm in controls if arm.name == question.primary.against), controls[0])
    untreated = next((arm.name for arm in arms if arm.when == NEVER), None)
    reference = 0.0 if untreated is None else float(scores.matrix(outcome.name, untreated).values.mean())
    mean = float(scores.matrix(outcome.name, question.primary.arm).values.mean()) - reference
    draws = [float(scores.matrix(outcome.name, control.name, draw).values.mean()) - reference for draw in scores.draws(control.name)]
    rank = rank_among_controls(mean, draws, wanted=outcome.better or "higher")
    return {"arm": question.primary.arm, "control": control.name, **asdict(rank), "verdict": rank.verdict}


def _items(scores: Scores, pair: Pair, outcome: Outcome) -> list[dict[str, Any]]:
    """The primary contrast in each item, averaged over seeds, with the text that the item asks or holds."""
    difference = scores.difference(pair.outcome, pair.arm, pair.against)
    texts = {str(item["id"]): item.get("prompt") or item.get("text") or "" for item in outcome.items}
    means = difference.values.mean(1).tolist()
    return [{"id": item, "text": texts.get(item, ""), "difference": mean} for item, mean in zip(difference.items, means, strict=True)]


def _wrong_way(scores: Scores, pair: Pair, outcome: Outcome) -> dict[str, Any] | None:
    if outcome.better is None:
        return None
    return asdict(wrong_way(scores.difference(pair.outcome, pair.arm, pair.against).values, wanted=outcome.better))


def _sweep(arms: Sequence[Arm], scores: Scores, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Dose-response: every outcome at every dose of each arm that is swept, with its interval, and of its controls by draw."""
    curves: dict[tuple[str, str], dict[str, Any]] = {}
    for outcome in outcomes:
        for arm in arms:
            if arm.sweep is None:
                continue
            estimate = crossed(scores.matrix(outcome.name, arm.name).values, what=f"{outcome.name} of {arm.name}")
            draws = [float(scores.matrix(outcome.name, arm.name, draw).values.mean()) for draw in scores.draws(arm.name)]
            point = {"dose": arm.dose, "arm": arm.name, "mean": estimate.mean, "ci": _bounds(estimate), "draws": draws}
            curve = {"name": arm.sweep, "outcome": outcome.name, "is_control": arm.control_of is not None, "points": []}
            curves.setdefault((arm.sweep, outcome.name), curve)["points"].append(point)
    return list(curves.values())


def _power(answered: Answer) -> dict[str, Any]:
    """The smallest effect that a design of this size shows in four of five runs."""
    estimate = answered.primary.estimate
    return {"smallest_effect": smallest_effect(estimate.variances, estimate.items, estimate.seeds), "power": 0.8}


def _outcome(outcome: Outcome) -> dict[str, Any]:
    doc = (type(outcome.metric).__doc__ or "").strip().partition("\n\n")[0]
    return {
        "unit": outcome.metric.unit,
        "better": outcome.better,
        "role": outcome.role,
        "margin": outcome.margin,
        "meaning": " ".join(doc.split()),
        "needs": outcome.metric.needs,
    }


def _arm(
    arm: Arm,
    scores: Scores,
    outcomes: Sequence[Outcome],
    before: Mapping[str, Mapping[str, float]],
    sizes: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    what = arm.treatment.describe()
    return {
        "name": arm.name,
        "label": arm.label,
        "when": arm.when,
        "treatment": {"kind": arm.treatment.name, "what": what if arm.control_of is None else f"a random partner of {what}"},
        "control_of": arm.control_of,
        "uses": arm.uses,
        "draws": arm.draws,
        "matched_in": {"unit": arm.treatment.unit, "draws": [dict(size) for size in sizes]},
        "outcomes": {outcome.name: _values(scores, outcome.name, arm, before.get(outcome.name)) for outcome in outcomes},
    }


def _values(scores: Scores, outcome: str, arm: Arm, before: Mapping[str, float] | None) -> dict[str, Any]:
    """The mean of an arm with its interval, by seed and by draw, and its change against the base."""
    matrix = scores.matrix(outcome, arm.name)
    estimate = crossed(matrix.values, what=f"{outcome} of {arm.name}")
    values: dict[str, Any] = {
        "mean": estimate.mean,
        "ci": _bounds(estimate),
        "by_seed": dict(zip(map(str, matrix.seeds), matrix.values.mean(0).tolist(), strict=True)),
    }
    if arm.control_of is not None:
        values["by_draw"] = [float(scores.matrix(outcome, arm.name, draw).values.mean()) for draw in scores.draws(arm.name)]
    if before is not None:
        base = matrix.values.new_tensor([before[item] for item in matrix.items])[:, None]
        change = crossed(matrix.values - base, what=f"change of {outcome} in {arm.name}")
        values |= {"before": float(base.mean()), "change": change.mean, "change_ci": _bounds(change)}
    return values


def _bounds(estimate: Any) -> list[float | None]:
    return [bound if abs(bound) != float("inf") else None for bound in (estimate.low, estimate.high)]
