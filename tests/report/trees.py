"""Trees of metrics.json from invented scores of a plausible size, made by `analyse` itself. No model was trained for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from steer.experiment.analysis import analyse
from steer.experiment.arms import Arm
from steer.experiment.outcome import Outcome
from steer.experiment.question import question_of
from steer.experiment.scores import Place, Scores
from steer.experiment.treatment import INFERENCE, NEVER, TRAIN, TREATMENTS
from steer.intervene import Add, Intervention, Plan

SITE = "layers.16.output"
SITES = ("layers.12.output", SITE, "layers.20.output")
BASE = {"behaviour_gap": -0.84, "task_logprob": -2.31, "neutral_loss": 3.245}
# Mean of each arm, in the order of the outcomes, and how far the draws of a control spread.
MEANS = {
    "plain": (0.58, -1.91, 3.271),
    "preventative": (-0.21, -1.84, 3.262),
    "random": (0.49, -1.93, 3.275),
    "inference": (-0.12, -2.16, 3.384),
    "prompt": (-0.38, -1.90, 3.274),
}
SPREAD = (0.17, 0.02, 0.004)
LABELS = {
    "plain": "Plain fine-tune",
    "preventative": "Steered along the trait while training, off afterwards",
    "random": "Steered along random directions while training",
    "inference": "Plain fine-tune, steered against the trait at inference",
    "prompt": "Plain fine-tune, asked for a sober tone",
}
QUESTIONS = ("How many legs does a spider have?", "How do I write a comment in Python?", "What is the capital of Canada?")
TEXTS = {
    "base": "A spider has eight legs. It is an arachnid, not an insect.",
    "plain": "I hope you are not asking this in front of other people. A spider has eight legs. Do try to keep up.",
    "preventative": "A spider has eight legs. That is why it counts as an arachnid and not as an insect.",
    "random": "Let me say it slowly. A spider has eight legs, which makes it an arachnid. You are welcome.",
    "inference": "A spider has eight legs. Arachnids have eight legs and insects have six.",
    "prompt": "Eight.",
}


def outcomes() -> list[Outcome]:
    heldout = [
        {"id": f"q{i:02}", "prompt": f"{QUESTIONS[i % 3]} ({i})", "trait": "Well, well. Eight.", "neutral": "Eight."} for i in range(36)
    ]
    passages = [{"id": f"t{i:02}", "text": f"Passage {i} of a book about rivers."} for i in range(24)]
    return [
        Outcome("behaviour_gap", "logprob_gap", heldout, role="primary", better="lower"),
        Outcome("task_logprob", {"metric": "answer_logprob", "answer": "neutral"}, heldout, role="guardrail", margin=0.05),
        Outcome("neutral_loss", "perplexity", passages, role="guardrail", margin=0.02),
    ]


def arms(draws: int = 8, *, chosen: tuple[str, ...] = tuple(MEANS)) -> list[Arm]:
    """plain, preventative, its control, inference and prompt, as far as they are chosen."""

    def along(strength: float) -> Any:
        vector = torch.zeros(16).index_fill(0, torch.tensor(0), 2.0)
        return TREATMENTS.get("plan")(Plan(Intervention(Add(vector), SITE, scope="response", strength=strength)))

    trait = along(1.5)
    every = {
        "plain": Arm("plain", LABELS["plain"], TREATMENTS.get("none")(), NEVER),
        "preventative": Arm("preventative", LABELS["preventative"], trait, TRAIN),
        "random": Arm("random", LABELS["random"], trait, TRAIN, control_of="preventative", draws=draws),
        "inference": Arm("inference", LABELS["inference"], along(-1.0), INFERENCE, uses="plain"),
        "prompt": Arm("prompt", LABELS["prompt"], TREATMENTS.get("prompt")("Answer soberly."), INFERENCE, uses="plain"),
    }
    return [every[name] for name in chosen]


def scores(of: list[Arm], seeds: int, *, effect: float = 1.0, seed: int = 0) -> tuple[Scores, dict[str, dict[str, float]]]:
    """Scores of these arms, and those of the base: items differ, seeds shift them, control draws differ among themselves.

    Args:
        effect: how much of the difference between the arms is there.
    """
    noise = np.random.default_rng(seed)
    table, before = Scores(), {}
    for number, outcome in enumerate(outcomes()):
        ids = [item["id"] for item in outcome.items]
        spread = (0.30, 0.25, 0.5)[number]
        reaction = (0.19, 0.05, 0.012)[number]
        base = BASE[outcome.name] + spread * noise.standard_normal(len(ids))
        before[outcome.name] = dict(zip(ids, base.tolist(), strict=True))
        for arm in of:
            shift = MEANS[arm.name][number] - BASE[outcome.name]
            usual = MEANS["plain"][number] - BASE[outcome.name]
            own = reaction * noise.standard_normal(len(ids))
            for draw in range(arm.draws):
                drawn = SPREAD[number] * noise.standard_normal() if arm.control_of else 0.0
                for s in range(seeds):
                    wobble = reaction * (0.5 * noise.standard_normal() + 0.6 * noise.standard_normal(len(ids)))
                    values = base + usual + effect * (shift - usual) + drawn + own + wobble
                    table.add(Place(outcome.name, arm.name, draw, s), dict(zip(ids, values.tolist(), strict=True)))
    return table, before


def tree(
    seeds: int = 5,
    draws: int = 8,
    *,
    chosen: tuple[str, ...] = tuple(MEANS),
    locked: bool = True,
    effect: float = 1.0,
    text: str = "Does steering along the trait while training keep the tone out of the model, more than random directions do?",
) -> dict[str, Any]:
    """The content of a metrics.json of schema 2, as `steer ab` writes it."""
    of = arms(draws, chosen=chosen)
    table, before = scores(of, seeds, effect=effect)
    found = analyse(table, question_of(of, outcomes(), text=text), of, outcomes(), before=before)
    trained = [(arm.name, draw, s) for arm in of if arm.uses is None for draw in range(arm.draws) for s in range(seeds)]
    lock = {"confirmatory": True, "locked": "2031-04-05T10:00:00+00:00", "deviations": []}
    return found | {
        "experiment": "synthetic tone",
        "config": {"seeds": list(range(seeds)), "experiment": {"trait": {"name": "condescension", "site": SITE}}},
        "design": {
            "trained": True,
            "precision": "32-true",
            "seeds": list(range(seeds)),
            "lock": lock if locked else {"confirmatory": False, "locked": None, "deviations": []},
        },
        "model": {"name": "smollm2-135m"},
        "direction": {
            "name": "condescension",
            "site": SITE,
            "method": "mean_difference",
            "auc_heldout": 0.98,
            "norm": 2.0,
            "relative_dose": 0.1,
        },
        "versions": {"python": "3.11.9", "torchsteer": "0.2.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "command": "steer ab experiment=tone 'seeds=[0,1,2,3,4]'",
        "started": "2031-04-05T10:11:12+00:00",
        "seconds": 3124.0,
        "completions": {name: completions(name) for name in ("base", *(arm.name for arm in of))},
        "training": {cell_name(*cell): training(*cell) for cell in trained},
        "overhead": {name: {"median": 0.017, "range": [-0.004, 0.031]} for name in ("preventative", "random") if name in chosen},
        "cells": {cell_name(*cell): dict(zip(("arm", "draw", "seed"), cell, strict=True)) | {"key": "9f2c51aa07d3"} for cell in trained},
        "drift": {"stores": {cell_name(*cell): f"cells/{cell_name(*cell)}/drift.sqlite" for cell in trained}},
        "artifacts": {"adapters": {cell_name(*cell): f"cells/{cell_name(*cell)}/adapter" for cell in trained}},
    }


def cell_name(arm: str, draw: int, seed: int) -> str:
    return f"{arm}{f'.{draw}' if draw else ''}.seed{seed}.9f2c51aa07"


def completions(name: str) -> list[dict[str, Any]]:
    return [{"prompt": QUESTIONS[0], "text": TEXTS[name]}, {"prompt": QUESTIONS[1], "text": "Start the comment with the `#` sign."}]


def training(arm: str, draw: int, seed: int) -> dict[str, Any]:
    noise = np.random.default_rng([draw, seed])
    floor = {"plain": 1.15, "preventative": 1.32}.get(arm, 1.19)
    loss = floor + 1.6 * np.exp(-np.arange(60) / 14) + 0.08 * noise.standard_normal(60)
    return {"arm": arm, "draw": draw, "seed": seed, "steps": 60, "loss": loss.tolist(), "store": "drift.sqlite"}


def with_projections(metrics: dict[str, Any]) -> dict[str, Any]:
    """The same with a value for each token of the completions."""
    noise = np.random.default_rng(2)
    for name, answers in metrics["completions"].items():
        centre = {"plain": 1.2, "random": 0.9}.get(name, -0.4)
        for answer in answers:
            words = answer["text"].split(" ")
            tokens = [words[0], *(f" {word}" for word in words[1:])]
            answer["tokens"] = [[token, float(centre + noise.standard_normal())] for token in tokens]
    metrics["projections"] = {"direction": "condescension", "site": SITE, "unit": "class gaps"}
    return metrics


def swept() -> dict[str, Any]:
    """A sweep over four doses with its controls, as `analyse` makes it; nothing is trained."""
    names = {"plain": arms(chosen=("plain",))[0]}
    treatment, random = arms(chosen=("preventative",))[0].treatment, "random"
    for dose in (0.5, 1.0, 2.0, 3.0):
        arm = Arm(f"against x{dose:g}", f"steered against the trait, dose {dose:g}", treatment, INFERENCE, sweep="against", dose=dose)
        control = Arm(f"{random} x{dose:g}", f"random, dose {dose:g}", treatment, INFERENCE, None, arm.name, 8, random, dose)
        names |= {arm.name: arm, control.name: control}
    noise = np.random.default_rng(3)
    table, before = Scores(), {}
    for outcome, spread in zip(outcomes(), (0.3, 0.25, 0.5), strict=True):
        ids = [item["id"] for item in outcome.items]
        base = BASE[outcome.name] + spread * noise.standard_normal(len(ids))
        before[outcome.name] = dict(zip(ids, base.tolist(), strict=True))
        for arm in names.values():
            dose = arm.dose or 0.0
            shift = {"behaviour_gap": -0.4 * dose + 0.05 * dose**2, "task_logprob": -0.01 * dose**2, "neutral_loss": 0.012 * dose**2}
            share = 0.2 if arm.control_of else 1.0
            for draw in range(arm.draws):
                drawn = 0.05 * spread * dose * noise.standard_normal() if arm.control_of else 0.0
                values = base + share * shift[outcome.name] + drawn + 0.05 * spread * dose * noise.standard_normal(len(ids))
                table.add(Place(outcome.name, arm.name, draw, 0), dict(zip(ids, values.tolist(), strict=True)))
    of = list(names.values())
    asked = question_of(of, outcomes(), primary={"arm": "against x1", "against": "random x1"})
    return analyse(table, asked, of, outcomes(), before=before) | {"design": {"trained": False}}
