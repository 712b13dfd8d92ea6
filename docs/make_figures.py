"""Makes the picture of the README and the page docs/results/demo.md from a finished run of the demo; nothing there is written by hand.

    make demo
    python docs/make_figures.py --run outputs/tone/<date>

Writes docs/images/drift.svg, docs/demo.json (what is quoted of metrics.json) and the section `demo` of docs/results/demo.md. A test fails
when the section does not follow from docs/demo.json, or when that was measured with another experiment than the one that ships.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from make_tables import ROOT, between, markdown

from steer.commands.generate import read_run
from steer.experiment.result import drift_records
from steer.report import drift_figure
from steer.report.curves import natural
from steer.report.numbers import common_digits, duration, interval, number

PICTURE, QUOTED, PAGE = ROOT / "docs" / "images" / "drift.svg", ROOT / "docs" / "demo.json", ROOT / "docs" / "results" / "demo.md"
FACTS = ("schema", "experiment", "started", "seconds", "verdict", "direction", "outcomes")
OF_CONTRAST = ("metric", "a", "b", "role", "shown", "verdict")
NOTES = {"train": "steered here in training", "inference": "steered here at inference"}


def quoted(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the section shows: no texts, no single items, no paths."""
    versions = {name: metrics["versions"][name] for name in ("torchsteer", "torch", "transformers") if name in metrics["versions"]}
    return {
        **{key: metrics[key] for key in FACTS},
        "question": metrics["question"]["text"],
        "items": metrics["question"]["items"],
        "seeds": metrics["design"]["seeds"],
        "model": metrics["model"]["name"],
        "versions": versions,
        "arms": [{key: arm[key] for key in ("name", "label", "draws", "outcomes")} for arm in metrics["arms"]],
        "contrasts": [{key: contrast[key] for key in OF_CONTRAST} for contrast in metrics["contrasts"]],
        "guardrails": [{key: guardrail[key] for key in ("metric", "arm", "outcome", "verdict")} for guardrail in metrics["guardrails"]],
        "config": metrics["config"]["experiment"],
    }


def section(demo: dict[str, Any]) -> str:
    """The demo's findings in markdown."""
    direction, arms, outcomes = demo["direction"], demo["arms"], demo["outcomes"]
    head = ["arm", *(f"{name.replace('_', ' ')}, {outcome['unit']} ({outcome['better']} is better)" for name, outcome in outcomes.items())]
    changes = {name: [(arm["outcomes"][name]["change"], arm["outcomes"][name]["change_ci"]) for arm in arms] for name in outcomes}
    digits = {name: common_digits(changes[name]) for name in outcomes}
    rows = [[arm["label"], *(_change(*changes[name][i], digits[name]) for name in outcomes)] for i, arm in enumerate(arms)]
    versions = ", ".join(f"{name} {version}" for name, version in demo["versions"].items())
    seeds = ", ".join(map(str, demo["seeds"]))
    primary = demo["contrasts"][0]
    return "\n\n".join(
        [
            f"*{demo['question']}* One seed ({seeds}), {demo['items']} items: **{demo['verdict']}**",
            f"`{demo['model']}`, direction *{direction['name']}* by `{direction['method']}` at `{direction['site']}`: "
            f"held-out AUC {number(direction['auc_heldout'], digits=2)}, length {number(direction['norm'])}, relative dose "
            f"{number(direction['relative_dose'])}; {duration(demo['seconds'])} in all ({versions}). Change against the model before "
            "training, with 95 % confidence intervals over items:",
            markdown(head, rows),
            f"> {primary['verdict']}",
        ]
    )


def _change(change: float, ci: list[float], digits: int | None) -> str:
    return f"{number(change, signed=True, digits=digits)} {interval(ci, signed=True, digits=digits)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of steer train")
    parser.add_argument("--site", help="the tracked site to draw (default: the last one that is not steered)")
    options = parser.parse_args()
    metrics = read_run(options.run)
    direction = metrics["direction"]
    drift = {metrics["cells"][cell]["arm"]: records for cell, records in drift_records(options.run, metrics).items()}
    tracked = sorted({record.site for records in drift.values() for record in records}, key=natural)
    site = options.site or next((site for site in reversed(tracked) if site != direction["site"]), tracked[-1])
    labels = {arm["name"]: arm["label"] for arm in metrics["arms"]}
    steered = {arm["name"]: NOTES.get(arm["when"], "") for arm in metrics["arms"] if site == direction["site"]}
    drift_figure(drift, PICTURE, direction=direction["name"], site=site, labels=labels, notes=steered)
    demo = quoted(metrics)
    QUOTED.write_text(json.dumps(demo, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), "demo", section(demo)), encoding="utf-8")
    for path in (PICTURE, QUOTED, PAGE):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
