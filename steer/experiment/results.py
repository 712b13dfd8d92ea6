"""metrics.json: what an experiment found, in stable keys (docs/metrics.md), with intervals, paired tests and a verdict on specificity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.directions.direction import Direction, Directions
from steer.drift.records import DriftRecord
from steer.drift.store import DriftStore
from steer.errors import NonFiniteError
from steer.experiment.arms import Arm
from steer.experiment.contrasts import Contrast, contrast, holm
from steer.experiment.stats import interval

UNITS = {"behaviour_gap": "nat/token", "task_logprob": "nat/token", "neutral_loss": "nat/token"}
SCHEMA = 1

Measures = dict[str, Tensor]


def collect(
    *,
    config: dict[str, Any],
    arms: Sequence[tuple[Arm, dict[str, Any], Measures]],
    before: Measures,
    direction: Direction,
    directions: Directions,
) -> dict[str, Any]:
    """Computes metrics.json from the measurements; the caller adds the facts of the run (command, versions, wall time).

    Args:
        config: the resolved configuration.
        arms: arm, its training record and completions, and its measures (see `steer.experiment.score.measure`).
        before: measures of the base model.
        direction: the one that was steered along, out of `directions`.
    """
    experiment = config["experiment"]
    comparisons = holm(
        [
            contrast(metric, a.name, b.name, measures_a[metric], measures_b[metric], unit=unit, seed=config["seed"])
            for (a, _, measures_a), (b, _, measures_b) in combinations(arms, 2)
            for metric, unit in UNITS.items()
        ]
    )
    return {
        "schema": SCHEMA,
        "experiment": experiment["name"],
        "seed": config["seed"],
        "config": config,
        "trait": {
            "name": directions.name,
            "description": experiment["trait"]["description"],
            "site": str(direction.site),
            "method": direction.method,
            "span": direction.span,
            "auc_heldout": direction.metrics["auc"],
            "vector_norm": direction.metrics["gap"],
            "relative_dose": direction.relative_dose(),
            "auc_by_site": {str(site): entry.metrics["auc"] for site, entry in directions.items()},
        },
        "arms": [_arm(arm, record, measures, before, direction, config) for arm, record, measures in arms],
        "comparisons": [comparison.to_dict() for comparison in comparisons],
        "specificity": specificity([arm for arm, *_ in arms], comparisons),
    }


def _arm(
    arm: Arm, record: dict[str, Any], after: Measures, before: Measures, direction: Direction, config: dict[str, Any]
) -> dict[str, Any]:
    steered = {"when": arm.when, "direction": arm.direction, "strength": arm.strength}
    if arm.when != "never":
        steered |= {
            "site": str(direction.site),
            "scope": config["experiment"]["scope"],
            "relative_dose": direction.relative_dose(arm.strength),
        }
    return {
        "name": arm.name,
        "label": arm.label,
        "steer": steered,
        "metrics": {metric: _change(metric, arm, before[metric], after[metric]) for metric in UNITS},
        "train": record["train"],
        "completions": record["completions"],
    }


def _change(metric: str, arm: Arm, before: Tensor, after: Tensor) -> dict[str, Any]:
    change = interval(after - before, what=f"{metric} of {arm.name}")
    return {
        "unit": UNITS[metric],
        "before": float(before.mean()),
        "after": float(after.mean()),
        "change": change.mean,
        "ci": [change.low, change.high],
        "n": change.n,
        "per_item": after.tolist(),
    }


def specificity(arms: Sequence[Arm], comparisons: Sequence[Contrast]) -> dict[str, Any]:
    """Did the trait direction do more than a random one of the same length? Only the paired tests are allowed to say so.

    Compared are the first arm trained with the trait direction that has a partner, that partner (the first arm trained with a
    random direction at the same |strength|; site and scope are those of the experiment), and the first plain arm. It counts as specific
    when its arm ends with a lower behaviour gap than both, after the correction for all comparisons. Another random vector might do more.
    """
    plain = next((arm for arm in arms if arm.when == "never"), None)
    trait_arms = _trained_along("trait", arms)
    random_arms = _trained_along("random", arms)
    pairs = [(trait, random) for trait in trait_arms for random in random_arms if math.isclose(abs(trait.strength), abs(random.strength))]
    if plain is None or not pairs:
        return {"specific": None, "statement": _not_tested(trait_arms, random_arms, plain)}
    trait, random = pairs[0]
    minus_plain, against_plain = _gap_difference(trait, plain, comparisons)
    minus_random, against_random = _gap_difference(trait, random, comparisons)
    specific = minus_plain < 0 and against_plain.shown and minus_random < 0 and against_random.shown
    return {
        "specific": specific,
        "statement": _statement(specific, trait, random, minus_plain, minus_random),
        "arms": {"trait": trait.name, "plain": plain.name, "random": random.name},
        "trait_minus_plain": minus_plain,
        "trait_minus_random": minus_random,
        "tests": [against_plain.verdict, against_random.verdict],
    }


def _trained_along(direction: str, arms: Sequence[Arm]) -> list[Arm]:
    return [arm for arm in arms if arm.when == "train" and arm.direction == direction]


def _gap_difference(arm: Arm, reference: Arm, comparisons: Sequence[Contrast]) -> tuple[float, Contrast]:
    """Behaviour gap of an arm minus that of another, and the test of it."""
    names = {arm.name, reference.name}
    test = next(test for test in comparisons if test.metric == "behaviour_gap" and {test.a, test.b} == names)
    return (test.difference if test.a == arm.name else -test.difference), test


def _statement(specific: bool, trait: Arm, random: Arm, minus_plain: float, minus_random: float) -> str:
    way = f"{'against' if trait.strength < 0 else 'along'} the trait direction during training (strength {trait.strength:g})"
    control = f"one random direction of the same length (strength {random.strength:g})"
    if specific:
        return (
            f"Steering {way} left the trait lower than plain training by {-minus_plain:.2f} nat/token, and lower than {control} by "
            f"{-minus_random:.2f}: the effect is specific to the direction, as far as one random direction and one seed can show."
        )
    return (
        f"Not shown to be specific: steering {way} changed the gap by {minus_plain:+.2f} nat/token against plain training, and by "
        f"{minus_random:+.2f} against {control}; not both are below zero after the correction."
    )


def _not_tested(trait_arms: Sequence[Arm], random_arms: Sequence[Arm], plain: Arm | None) -> str:
    trained = [
        f"{direction} at {', '.join(f'{arm.strength:g}' for arm in arms)}"
        for direction, arms in (("trait", trait_arms), ("random", random_arms))
        if arms
    ]
    trained += ["plain"] if plain else []
    return (
        "Not tested: that takes a plain arm, and a trait and a random arm that are steered in training with strengths of the same "
        f"size; trained here: {'; '.join(trained) or 'none of them'}."
    )


def to_json(metrics: dict[str, Any]) -> str:
    """Strict JSON. Raises NonFiniteError naming a NaN or infinity: it is an error here, not something for the reader of the file."""
    try:
        return json.dumps(metrics, indent=1, allow_nan=False)
    except ValueError:
        raise _diverged(metrics) from None


def drift_records(folder: Path, metrics: dict[str, Any]) -> dict[str, list[DriftRecord]]:
    """Drift records of each arm, read from the stores that metrics.json names."""
    records = {}
    for arm, name in metrics["drift"]["stores"].items():
        with DriftStore(folder / name) as store:
            records[arm] = list(store.records())
    return records


# ---- errors


def _diverged(metrics: dict[str, Any]) -> NonFiniteError:
    name, value = next(_non_finite(metrics, ""))
    remedy = "the training diverged: lower experiment.train.learning_rate or the strength"
    return NonFiniteError(f"metric '{name}' is not finite", expected="a finite number", found=value, remedy=remedy)


def _non_finite(node: Any, name: str) -> Iterator[tuple[str, float]]:
    """Place and value of every number that is not finite."""
    if isinstance(node, dict | list | tuple):
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _non_finite(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(node, float) and not math.isfinite(node):
        yield name, node
