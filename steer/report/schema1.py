"""metrics.json of schema 1, which `steer train` of 0.1 wrote, as a tree of schema 2: what it did not hold is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steer.report.numbers import measured, number

KEPT = ("experiment", "command", "started", "config", "versions", "model", "trait", "artifacts", "drift")
OUTCOMES: dict[str, dict[str, Any]] = {
    "behaviour_gap": {
        "unit": "nat/token",
        "better": "lower",
        "role": "primary",
        "meaning": "Mean log-probability per token of answers with the trait, minus that of answers with the same content without it, on "
        "held-out prompts. Texts are given and scored, so no judge is involved.",
        "reading": "higher: more of the trait",
    },
    "task_logprob": {
        "unit": "nat/token",
        "better": "higher",
        "role": "exploratory",
        "meaning": "Mean log-probability per token of the plain, correct answers to held-out prompts.",
        "reading": "higher: better at the task",
    },
    "neutral_loss": {
        "unit": "nat/token",
        "better": "lower",
        "role": "exploratory",
        "meaning": "Mean negative log-probability per token of unrelated running text.",
        "reading": "higher: collateral damage",
    },
}
QUESTION = "Does steering along the trait direction during training lower the behaviour gap more than a random direction does?"
VERDICTS = {
    True: "Yes: '{trait}' has a lower behaviour gap than '{plain}' and '{random}'",
    False: "Not shown: '{trait}' does not have a lower behaviour gap than both '{plain}' and '{random}'",
    None: "Not tested: the arms that a statement on the direction takes are missing",
}


def renewed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of schema 2 with what a tree of schema 1 says."""
    arms = metrics.get("arms") or []
    specificity = metrics.get("specificity") or {}
    compared = specificity.get("arms") or {}
    seeds = [metrics["seed"]] if "seed" in metrics else []
    contrasts = _contrasts(metrics.get("comparisons") or [], compared)
    return {
        **{key: metrics[key] for key in KEPT if key in metrics},
        "schema": 2,
        "written_as": 1,
        "question": {"text": QUESTION if arms else "", "seeds": seeds, "items": contrasts[0].get("n") if contrasts else None},
        "verdict": VERDICTS[specificity.get("specific") if compared else None].format(**compared),
        "outcomes": _outcomes(arms),
        "arms": [_arm(arm, seeds, compared) for arm in arms],
        "contrasts": contrasts,
        "guardrails": [],
        "specificity": {"verdict": specificity["statement"]} if specificity.get("statement") else None,
        "design": {"trained": True, "seeds": seeds},
        "seconds": metrics.get("wall_seconds"),
        "completions": _completions(metrics, arms),
        "training": {arm["name"]: {"arm": arm["name"], "draw": 0, "seed": metrics.get("seed"), **arm["train"]} for arm in _trained(arms)},
        "overhead": {arm["name"]: _overhead(arm["train"]) for arm in arms if arm.get("train")},
    }


def _outcomes(arms: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The known ones first; one that is not known here goes by its name and the unit it came with."""
    units = {key: (values or {}).get("unit") or "" for arm in arms for key, values in (arm.get("metrics") or {}).items()}
    known = {key: OUTCOMES[key] for key in OUTCOMES if key in units}
    return known | {key: {"unit": unit, "better": None, "role": "exploratory"} for key, unit in units.items() if key not in OUTCOMES}


def _arm(arm: Mapping[str, Any], seeds: Sequence[Any], compared: Mapping[str, Any]) -> dict[str, Any]:
    steer = arm.get("steer") or {}
    is_control = arm["name"] == compared.get("random")
    return {
        "name": arm["name"],
        "label": arm.get("label") or arm["name"],
        "when": steer.get("when", "never"),
        "treatment": {"kind": "none" if steer.get("when", "never") == "never" else "plan", "what": _what(steer)},
        "control_of": compared.get("trait") if is_control else None,
        "draws": 1,
        "outcomes": {key: _values(values, seeds) for key, values in (arm.get("metrics") or {}).items() if values},
    }


def _values(values: Mapping[str, Any], seeds: Sequence[Any]) -> dict[str, Any]:
    return {
        "mean": values.get("after"),
        "ci": None,
        "by_seed": {str(seed): values.get("after") for seed in seeds},
        "before": values.get("before"),
        "change": values.get("change"),
        "change_ci": values.get("ci"),
        "n": values.get("n"),
    }


def _what(steer: Mapping[str, Any]) -> str:
    """What was added, in words."""
    if steer.get("when", "never") == "never":
        return "nothing"
    strength = steer.get("strength")
    sense = "against" if measured(strength) and strength < 0 else "along"
    what = {"trait": f"{sense} the trait direction", "random": "along a random direction"}.get(steer.get("direction", ""), "steered")
    details = [str(steer["site"])] if steer.get("site") else []
    details += [f"strength {number(strength).rstrip('0').rstrip('.')}"] if measured(strength) else []
    details += [f"relative dose {number(steer['relative_dose'], digits=2)}"] if measured(steer.get("relative_dose")) else []
    details += [f"{steer['scope']} tokens"] if steer.get("scope") else []
    return ", ".join([what, *details])


def _contrasts(comparisons: Sequence[Mapping[str, Any]], compared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All pairs in all metrics, as they were tested; the one that decided comes first."""
    wanted = {compared.get("trait"), compared.get("random")}
    contrasts = [
        {
            **comparison,
            "role": "secondary",
            "correction": "Holm",
            "seeds": 1,
            "shown": measured(p := comparison.get("p_adjusted", comparison.get("p"))) and p <= 0.05,
            "better": (OUTCOMES.get(str(comparison.get("metric"))) or {}).get("better"),
        }
        for comparison in comparisons
    ]
    first = next((each for each in contrasts if each.get("metric") == "behaviour_gap" and {each.get("a"), each.get("b")} == wanted), None)
    if first is None:
        return contrasts
    return [{**first, "role": "primary"}, *(each for each in contrasts if each is not first)]


def _completions(metrics: Mapping[str, Any], arms: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    of_base = {"base": metrics["base_completions"]} if metrics.get("base_completions") else {}
    return of_base | {arm["name"]: arm["completions"] for arm in arms if arm.get("completions")}


def _overhead(train: Mapping[str, Any]) -> dict[str, Any]:
    return {"median": train.get("callback_overhead"), "range": train.get("callback_overhead_range")}


def _trained(arms: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Arms with a training of their own: one that is steered at inference repeats that of the arm it uses."""
    kept: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for arm in arms:
        if (arm.get("train") or {}).get("loss"):
            kept.setdefault(tuple(arm["train"]["loss"]), arm)
    return list(kept.values())
