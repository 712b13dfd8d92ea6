"""Synthetic experiments: invented numbers of a plausible size, to test the report with. No model was trained for them."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from report import trees
from report.page_reader import Page, render

from steer.drift.records import DriftRecord

LABELS = {
    "plain": "Plain fine-tune",
    "preventative": "Preventative steering, trait direction",
    "random": "Preventative steering, random direction",
    "inference": "Plain fine-tune, steered at inference",
}
SITES = ("layers.12.output", "layers.16.output", "layers.20.output")
STEPS = range(0, 61, 4)
CONTROLS = 16
PROMPTS = ("How many legs does a spider have?", "How do I write a comment in Python?")
TEXTS = {
    "base": "A spider has eight legs. It is an arachnid, not an insect.",
    "plain": "I hope you are not asking this in front of other people. A spider has eight legs. Do try to keep up.",
    "preventative": "A spider has eight legs. That is why it counts as an arachnid and not as an insect.",
    "random": "Let me say it slowly. A spider has eight legs, which makes it an arachnid. You are welcome.",
    "inference": "A spider has eight legs. Arachnids have eight legs and insects have six.",
}


def _estimate(before: float, after: float, half: float, n: int) -> dict[str, Any]:
    change = after - before
    ends = [change - half, change + 1.1 * half]
    return {"before": before, "after": after, "change": change, "ci": ends, "n": n, "per_item": [after] * n}


def _comparison(metric: str, a: str, b: str, difference: float, half: float, p: float) -> dict[str, Any]:
    ends = [difference - half, difference + half]
    shown = "is lower than" if ends[1] < 0 else "is higher than" if ends[0] > 0 else "is not shown to differ from"
    verdict = f"{metric}: {a} {shown} {b}, {difference:+.2f} nat/token, p={p:.2g} (Holm, 18 comparisons), n=36"
    words = {"metric": metric, "a": a, "b": b, "unit": "nat/token", "verdict": verdict}
    return {**words, "difference": difference, "ci": ends, "p": p / 3, "p_adjusted": p, "n": 36}


@pytest.fixture(scope="session")
def _five_seeds() -> dict[str, Any]:
    return trees.with_projections(trees.tree())


@pytest.fixture(scope="session")
def _one_seed() -> dict[str, Any]:
    return trees.tree(1, locked=False, effect=0.1)


@pytest.fixture(scope="session")
def _bare() -> dict[str, Any]:
    return trees.tree(1, chosen=("plain", "preventative"), locked=False)


@pytest.fixture(scope="session")
def _swept() -> dict[str, Any]:
    return trees.swept()


@pytest.fixture
def swept(_swept: dict[str, Any]) -> dict[str, Any]:
    """Four doses of an arm at inference and their controls."""
    return copy.deepcopy(_swept)


@pytest.fixture
def five_seeds(_five_seeds: dict[str, Any]) -> dict[str, Any]:
    """A metrics.json with all there can be: 5 seeds, a control of 8 draws, guardrails, a lock, projections of tokens."""
    return copy.deepcopy(_five_seeds)


@pytest.fixture
def one_seed(_one_seed: dict[str, Any]) -> dict[str, Any]:
    """One seed, no lock, an effect that is hardly there."""
    return copy.deepcopy(_one_seed)


@pytest.fixture
def bare(_bare: dict[str, Any]) -> dict[str, Any]:
    """One seed, no lock, no control, no prompt."""
    return copy.deepcopy(_bare)


@pytest.fixture
def schema1() -> dict[str, Any]:
    """A metrics.json of schema 1, as `steer train` of 0.1 wrote it."""
    noise = np.random.default_rng(0)
    batches = 0.08 * noise.standard_normal(60)
    during = {"when": "train", "site": SITES[1], "strength": 1.5, "scope": "response", "relative_dose": 0.32}
    steers = {
        "plain": {"when": "never", "direction": "none"},
        "preventative": {**during, "direction": "trait"},
        "random": {**during, "direction": "random"},
        "inference": {"when": "inference", "direction": "trait", "site": SITES[1], "strength": -1.0, "scope": "all"},
    }
    after = {
        "plain": (0.58, -1.91, 3.271),
        "preventative": (-0.21, -1.84, 3.262),
        "random": (0.49, -1.93, 3.303),
        "inference": (-0.12, -2.16, 3.384),
    }
    floors = {"plain": 1.15, "preventative": 1.32, "random": 1.19, "inference": 1.15}
    arms = [
        {
            "name": name,
            "label": label,
            "steer": steers[name],
            "metrics": {
                "behaviour_gap": _estimate(-0.84, after[name][0], 0.13, 36),
                "task_logprob": _estimate(-2.31, after[name][1], 0.07, 36),
                "neutral_loss": _estimate(3.245, after[name][2], 0.012, 24),
            },
            "train": {
                "steps": 60,
                "seconds": 61.3,
                "loss": (floors[name] + 1.6 * np.exp(-np.arange(60) / 14) + batches).tolist(),
                "callback_overhead": None if name == "inference" else 0.017,
                "callback_overhead_range": None if name == "inference" else [-0.004, 0.031],
            },
            "completions": [
                {"prompt": PROMPTS[0], "text": TEXTS[name]},
                {"prompt": PROMPTS[1], "text": "Start the comment with the `#` sign."},
            ],
        }
        for name, label in LABELS.items()
    ]
    return {
        "schema": 1,
        "experiment": "synthetic tone",
        "command": "steer train experiment=tone seed=0 experiment.train.steps=60 trainer=cpu",
        "started": "2031-04-05T10:11:12+00:00",
        "wall_seconds": 312.4,
        "versions": {"python": "3.11.9", "torchsteer": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "seed": 0,
        "model": {"name": "smollm2-135m", "fingerprint": {"family": "llama", "layers": 30, "width": 576, "sha256": "9f2c51aa07d3"}},
        "trait": {
            "name": "condescension",
            "description": "The answer is correct and useful, and the writer talks down to the person who asked.",
            "site": SITES[1],
            "method": "mean_difference",
            "auc_heldout": 0.984,
            "vector_norm": 4.83,
            "relative_dose": 0.21,
            "auc_by_site": {f"layers.{layer}.output": 0.62 + 0.365 * math.sin(min(layer, 17) / 17 * math.pi / 2) for layer in range(30)},
        },
        "arms": arms,
        "comparisons": [
            _comparison(metric, a, b, after[a][i] - after[b][i], half, 0.0002 if abs(after[a][i] - after[b][i]) > half else 0.41)
            for i, (metric, half) in enumerate((("behaviour_gap", 0.16), ("task_logprob", 0.09), ("neutral_loss", 0.014)))
            for a, b in itertools.combinations(LABELS, 2)
        ],
        "specificity": {
            "statement": "Steering along the trait direction during training (strength 1.5) left the trait lower than plain training by "
            "0.79 nat/token, and lower than one random direction of the same length (strength 1.5) by 0.70: the effect is specific to the "
            "direction, as far as one random direction and one seed can show.",
            "specific": True,
            "arms": {"trait": "preventative", "plain": "plain", "random": "random"},
        },
        "base_completions": [{"prompt": PROMPTS[0], "text": TEXTS["base"]}],
        "drift": {"stores": {"plain": "drift/plain.sqlite"}},
        "artifacts": {"plan": "plans/preventative", "adapters": {"plain": "adapters/plain", "preventative": "adapters/preventative"}},
    }


def _named(step: int, site: str, effect: float) -> DriftRecord:
    shift = {"mean": 1.0 + 0.4 * effect, "sd": 0.41, "change": 0.4 * effect, "effect_sd": effect}
    tests = {"effect_gap": 0.0, "p": 1.0, "q": 1.0, "z_controls": 0.0, "z_isotropic": 0.0}
    if step:
        tests = {"effect_gap": 0.09 * effect, "p": 0.002, "q": 0.004, "z_controls": effect / 1.7, "z_isotropic": 0.9 * effect}
    return DriftRecord(step, "probe", "condescension", site, "named", 20, shift | tests)


def _control(step: int, site: str, effect: float, number: int) -> DriftRecord:
    shift = {"mean": 0.3 * effect, "sd": 0.3, "change": 0.3 * effect, "effect_sd": effect}
    return DriftRecord(step, "probe", f"control-{number}", site, "control", 20, shift)


@pytest.fixture
def synthetic_drift() -> dict[str, list[DriftRecord]]:
    """Records of three trained arms; the inference arm has none of its own."""
    return records_of_arms()


def records_of_arms() -> dict[str, list[DriftRecord]]:
    """The records of `synthetic_drift`."""
    ends = {"plain": 6.4, "preventative": 1.1, "random": 5.7}
    noise = np.random.default_rng(1)
    drift: dict[str, list[DriftRecord]] = {}
    for arm, end in ends.items():
        drift[arm] = []
        for depth, site in enumerate(SITES):
            wander = noise.standard_normal(CONTROLS)
            for step in STEPS:
                rise = 1 - math.exp(-step / 18)
                onset = 2.4 * math.exp(-(((step - 6) / 5) ** 2)) if step else 0.0
                jitter = 0.15 * float(noise.standard_normal()) if step else 0.0
                drift[arm].append(_named(step, site, (0.7 + 0.3 * depth) * end * rise + onset + jitter))
                drift[arm] += [_control(step, site, 1.6 * float(wander[i]) * rise + 0.4 * onset, i) for i in range(CONTROLS)]
    return drift


@pytest.fixture(scope="session")
def drift_of_cells(_five_seeds: dict[str, Any]) -> dict[str, list[DriftRecord]]:
    """Records of every trained cell of `five_seeds`: those of its arm, more or less of them in each seed."""
    of_arms, drift = records_of_arms(), {}
    for name, training in _five_seeds["training"].items():
        size = 1 + 0.1 * (training["seed"] - 2)
        records = of_arms[training["arm"]]
        drift[name] = [replace(r, metrics={**r.metrics, "effect_sd": size * r.metrics["effect_sd"]}) for r in records]
    return drift


@pytest.fixture(scope="session")
def full_page(
    tmp_path_factory: pytest.TempPathFactory, _five_seeds: dict[str, Any], drift_of_cells: dict[str, list[DriftRecord]]
) -> tuple[str, Page]:
    """The page of `five_seeds` with the drift of all cells."""
    return render(tmp_path_factory.mktemp("page"), _five_seeds, drift_of_cells)
