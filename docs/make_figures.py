"""Makes the picture and the numbers of the README from a finished run of the demo; nothing there is written by hand.

    make demo
    python docs/make_figures.py --run outputs/tone/<date> [the same with other seeds ...]

Writes docs/images/drift.svg, docs/demo.json (what is quoted of metrics.json) and the section `demo` of README.md. A test fails
when the section does not follow from docs/demo.json, or when that was measured with another experiment than the one that ships.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from make_tables import ROOT, between, markdown

from steer.commands.generate import read_run
from steer.experiment.result import drift_records
from steer.report import drift_figure
from steer.report.curves import natural
from steer.report.numbers import common_digits, duration, interval, number
from steer.report.schema1 import OUTCOMES

PICTURE, QUOTED, README = ROOT / "docs" / "images" / "drift.svg", ROOT / "docs" / "demo.json", ROOT / "README.md"
NAMES = {"behaviour_gap": "behaviour gap", "task_logprob": "task log-probability", "neutral_loss": "neutral text loss"}
VERDICT = ("specific", "trait_minus_plain", "trait_minus_random")
NOTES = {"train": "steered here in training", "inference": "steered here at inference"}


def quoted(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Selects what the section shows: the first run without texts, single items and paths, and only the verdict of the remaining runs."""
    metrics = runs[0]
    facts = {key: metrics[key] for key in ("schema", "experiment", "started", "wall_seconds", "seed", "specificity")}
    versions = {name: metrics["versions"][name] for name in ("torchsteer", "torch", "transformers") if name in metrics["versions"]}
    trait = {key: value for key, value in metrics["trait"].items() if key != "auc_by_site"}
    arms = [
        {
            "name": arm["name"],
            "label": arm["label"],
            "metrics": {name: {k: v for k, v in values.items() if k != "per_item"} for name, values in arm["metrics"].items()},
        }
        for arm in metrics["arms"]
    ]
    seeds = [{"seed": run["seed"], **{key: run["specificity"].get(key) for key in VERDICT}} for run in runs]
    experiment = metrics["config"]["experiment"]
    return {
        **facts,
        "model": metrics["model"]["name"],
        "versions": versions,
        "trait": trait,
        "arms": arms,
        "seeds": seeds,
        "config": experiment,
    }


def section(demo: dict[str, Any]) -> str:
    """The demo's findings in markdown."""
    trait, arms = demo["trait"], demo["arms"]
    measured = [key for key in OUTCOMES if any(key in arm["metrics"] for arm in arms)]
    head = ["arm", *(f"{NAMES[key]}, {OUTCOMES[key]['unit']} ({OUTCOMES[key]['reading']})" for key in measured)]
    digits = {key: common_digits([(arm["metrics"][key]["change"], arm["metrics"][key]["ci"]) for arm in arms]) for key in measured}
    rows = [[arm["label"], *(_change(arm["metrics"][key], digits[key]) for key in measured)] for arm in arms]
    items = " and ".join(sorted({str(values["n"]) for arm in arms for values in arm["metrics"].values()}, key=int))
    versions = ", ".join(f"{name} {version}" for name, version in demo["versions"].items())
    auc, norm, dose = number(trait["auc_heldout"], digits=2), number(trait["vector_norm"]), number(trait["relative_dose"])
    return "\n\n".join(
        [
            f"`{demo['model']}`, trait *{trait['name']}* ({trait['description']}), direction by `{trait['method']}` at `{trait['site']}`: "
            f"held-out AUC {auc}, length {norm}, relative dose {dose}. Seed {demo['seed']}, {items} held-out items, "
            f"{duration(demo['wall_seconds'])} in all ({versions}). Change by fine-tuning, with 95 % confidence intervals over items:",
            markdown(head, rows),
            f"> {demo['specificity']['statement']}",
            *([_other_seeds(demo["seeds"])] if len(demo["seeds"]) > 1 else []),
        ]
    )


def _change(values: dict[str, Any], digits: int | None) -> str:
    return f"{number(values['change'], signed=True, digits=digits)} {interval(values['ci'], signed=True, digits=digits)}"


def _other_seeds(seeds: list[dict[str, Any]]) -> str:
    def listed(key: str) -> str:
        return ", ".join(number(seed[key], signed=True, digits=2) for seed in seeds)

    count = sum(seed["specific"] is True for seed in seeds)
    numbers = ", ".join(str(seed["seed"]) for seed in seeds)
    return (
        f"With the seeds {numbers} the behaviour gap of the arm steered along the trait differed from "
        f"that of plain fine-tuning by {listed('trait_minus_plain')}, and from that of the random direction by "
        f"{listed('trait_minus_random')} nat/token; {count} of the {len(seeds)} runs call it specific."
    )


def repeated(config: dict[str, Any]) -> dict[str, Any]:
    """Settings that runs must share to count as one experiment: everything that changes a number, except the seed."""
    plain = copy.deepcopy(config)
    plain["seed"] = plain.get("trainer", {})["progress"] = None
    for arm in plain.get("experiment", {}).get("arms", {}).values():
        if arm is not None:
            arm["label"] = None
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="output folder of steer train; further ones with other seeds")
    parser.add_argument("--site", help="the tracked site to draw (default: the last one that is not steered)")
    options = parser.parse_args()
    runs = [read_run(folder) for folder in options.run]
    metrics = runs[0]
    if any(repeated(run["config"]) != repeated(metrics["config"]) for run in runs):
        raise SystemExit("these runs differ in more than their seed")
    trait = metrics["trait"]
    drift = drift_records(options.run[0], metrics)
    tracked = sorted({record.site for records in drift.values() for record in records}, key=natural)
    site = options.site or next((site for site in reversed(tracked) if site != trait["site"]), tracked[-1])
    labels = {arm["name"]: arm["label"] for arm in metrics["arms"]}
    steered = {arm["name"]: NOTES.get(arm["steer"]["when"], "") for arm in metrics["arms"] if arm["steer"].get("site") == site}
    drift_figure(drift, PICTURE, direction=trait["name"], site=site, labels=labels, notes=steered)
    demo = quoted(runs)
    QUOTED.write_text(json.dumps(demo, indent=1) + "\n", encoding="utf-8")
    README.write_text(between(README.read_text(encoding="utf-8"), "demo", section(demo)), encoding="utf-8")
    for path in (PICTURE, QUOTED, README):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
