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
from steer.experiment.stats import Comparison, compare, holm, interval

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
    """Everything that is computed from the measurements; run data (command, versions, wall time) is added by the caller.

    Args:
        config: the resolved configuration.
        arms: arm, its training record and completions, and its measures (see `steer.experiment.score.measure`).
        before: measures of the base model.
        direction: the one that was steered along, out of `directions`.
    """
    experiment = config["experiment"]
    comparisons = holm(
        [
            compare(metric, a.name, b.name, of_a[metric], of_b[metric], unit=UNITS[metric], seed=config["seed"])
            for (a, _, of_a), (b, _, of_b) in combinations(arms, 2)
            for metric in UNITS
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
        "comparisons": [one.to_dict() for one in comparisons],
        "specificity": specificity([arm for arm, *_ in arms], comparisons),
    }


def _arm(
    arm: Arm, record: dict[str, Any], after: Measures, before: Measures, direction: Direction, config: dict[str, Any]
) -> dict[str, Any]:
    measured = {}
    for metric, unit in UNITS.items():
        change = interval(after[metric] - before[metric], what=f"{metric} of {arm.name}", seed=config["seed"])
        measured[metric] = {
            "unit": unit,
            "before": float(before[metric].mean()),
            "after": float(after[metric].mean()),
            "change": change.mean,
            "ci": [change.low, change.high],
            "n": change.n,
            "per_item": after[metric].tolist(),
        }
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
        "metrics": measured,
        "train": record["train"],
        "completions": record["completions"],
    }


def specificity(arms: Sequence[Arm], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Did the trait direction do more than a random one of the same length? Only the paired tests are allowed to say so.

    Compared are the first arm trained with the trait direction that has a partner, that partner (the first arm trained with a
    random direction at the same |strength|; site and scope are those of the experiment), and the first plain arm. It counts as specific
    when its arm ends with a lower behaviour gap than both, after the correction for all comparisons. Another random vector might do more.
    """
    plain = next((arm for arm in arms if arm.when == "never"), None)
    trained = {kind: [arm for arm in arms if (arm.when, arm.direction) == ("train", kind)] for kind in ("trait", "random")}
    pairs = [
        (one, other) for one in trained["trait"] for other in trained["random"] if math.isclose(abs(one.strength), abs(other.strength))
    ]
    if plain is None or not pairs:
        there = [f"{kind} at {', '.join(f'{arm.strength:g}' for arm in found)}" for kind, found in trained.items() if found]
        there += ["plain"] if plain else []
        statement = (
            "Not tested: that takes a plain arm, and a trait and a random arm that are steered in training with strengths of the same "
            f"size; trained here: {'; '.join(there) or 'none of them'}."
        )
        return {"specific": None, "statement": statement}
    trait, random = pairs[0]
    found = {frozenset((one.a, one.b)): one for one in comparisons if one.metric == "behaviour_gap"}

    def change(other: Arm) -> tuple[float, Comparison]:
        one = found[frozenset((trait.name, other.name))]
        return (one.difference if one.a == trait.name else -one.difference), one

    (of_plain, against_plain), (of_random, against_random) = change(plain), change(random)
    specific = all(value < 0 and test.shown for value, test in ((of_plain, against_plain), (of_random, against_random)))
    way = f"{'against' if trait.strength < 0 else 'along'} the trait direction during training (strength {trait.strength:g})"
    other = f"one random direction of the same length (strength {random.strength:g})"
    if specific:
        statement = (
            f"Steering {way} left the trait lower than plain training by {-of_plain:.2f} nat/token, and lower than {other} by "
            f"{-of_random:.2f}: the effect is specific to the direction, as far as one random direction and one seed can show."
        )
    else:
        statement = (
            f"Not shown to be specific: steering {way} changed the gap by {of_plain:+.2f} nat/token against plain training, and by "
            f"{of_random:+.2f} against {other}; not both are below zero after the correction."
        )
    return {
        "specific": specific,
        "statement": statement,
        "arms": {"trait": trait.name, "plain": plain.name, "random": random.name},
        "trait_minus_plain": of_plain,
        "trait_minus_random": of_random,
        "tests": [against_plain.verdict, against_random.verdict],
    }


def to_json(metrics: dict[str, Any]) -> str:
    """Strict JSON. Raises NonFiniteError naming a NaN or infinity: it is an error here, not something for the reader of the file."""
    try:
        return json.dumps(metrics, indent=1, allow_nan=False)
    except ValueError:
        name, value = next(_non_finite(metrics, ""))
        remedy = "the training diverged: lower experiment.train.learning_rate or the strength"
        raise NonFiniteError(f"metric '{name}' is not finite", expected="a finite number", found=value, remedy=remedy) from None


def _non_finite(node: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(node, dict | list | tuple):
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _non_finite(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(node, float) and not math.isfinite(node):
        yield name, node


def drift_records(folder: Path, metrics: dict[str, Any]) -> dict[str, list[DriftRecord]]:
    """Drift records of each arm, read from the stores that metrics.json names."""
    records = {}
    for arm, name in metrics["drift"]["stores"].items():
        with DriftStore(folder / name) as store:
            records[arm] = list(store.records())
    return records
