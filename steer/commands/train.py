"""`steer train`: the arms of an experiment, from one direction, one seed and the same batches, to one report."""

from __future__ import annotations

import logging
import shlex
import sys
import time
import warnings
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from steer.commands.config import dtype_named
from steer.commands.info import versions
from steer.commands.train_arm import train_arm
from steer.commands.train_checks import check_seed, check_unused, lora_config, texts, tracked_sites
from steer.directions import ContrastSet, Direction, Directions, extract
from steer.directions.extractor import extractor_of
from steer.directions.sweep import check_scope
from steer.drift.tracker import DriftTracker
from steer.experiment import results
from steer.experiment.arms import Arm, read_arms
from steer.experiment.complete import check_completions, complete
from steer.experiment.data import load_dataset
from steer.experiment.score import Suite, measure
from steer.experiment.sft import SFTModule, check_batch, loader
from steer.files import atomic_write, contents, sealed
from steer.intervene import Plan
from steer.model.anatomy import Anatomy
from steer.model.load import load
from steer.model.tokens import encode, pad_id, plain
from steer.report import summary_table, write_report

# Said by libraries about one another; a reader of our output can do nothing about them.
NOISE = ("`isinstance\\(treespec", "`is_gradient_checkpointing` is deprecated", "The 'train_dataloader' does not have many workers")
COMPLETIONS = "experiment.completions."


def run(config: DictConfig) -> None:
    """Runs every arm and writes metrics.json, report.html, the plans, the adapters and the drift records."""
    started = datetime.now(UTC)
    clock = time.perf_counter()
    _quieten_libraries()
    out = Path(HydraConfig.get().runtime.output_dir)
    check_unused(out)  # before anything is written into it, hence Hydra's own copy of the configuration is switched off
    check_seed(config.seed)
    _write_config(config, out)
    job = Run(config, out)
    directions, direction = job.extract()
    job.say("baseline", "scoring the model as it is")
    before = measure(job.model, job.suite, pad=job.pad)
    base_completions = job.completions(job.model)
    outcomes = _run_arms(job, directions, direction)
    metrics = results.collect(
        config=cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)),
        arms=[(arm, *outcomes[arm.name]) for arm in job.arms],
        before=before,
        direction=direction,
        directions=directions,
    )
    metrics |= _facts(job, started) | {"base_completions": base_completions, "wall_seconds": time.perf_counter() - clock}
    atomic_write(out / "metrics.json", results.to_json(sealed(metrics)))
    report = write_report(out / "report.html", metrics, results.drift_records(out, metrics))
    job.console.print(summary_table(metrics))
    job.say("report", str(report))


def what_is_left(out: Path) -> str:
    """What an interrupted run leaves in its folder, in a line."""
    parts = [
        f"{folder}/{part.name}" for folder in ("adapters", "drift") for part in sorted(out.glob(f"{folder}/*")) if part.suffix != ".lock"
    ]
    return (
        f"interrupted: '{out}' keeps what was written ({', '.join(parts) or contents(out)}) and has no report; "
        "a run cannot be resumed, start it again in a new folder"
    )


class Run:
    """What all arms of an experiment share: configuration, model, adapters and tokenised texts.

    Everything that can be checked is checked here, and what needs no model before one is loaded: a mistake is named now, not minutes later.

    Raises:
        SteerError: of the kind that the faulty part raises.
    """

    def __init__(self, config: DictConfig, out: Path) -> None:
        self.config = config
        self.experiment = config.experiment
        self.out = out
        self.console = Console()
        self.arms = read_arms(OmegaConf.to_container(self.experiment.arms))
        self.prompts = texts(self.experiment.completions.prompts)
        data = self._checked_data()
        self.say("model", f"loading {config.model.name}")
        self.model, self.tokenizer = load(config.model.name, dtype=dtype_named(config.model.dtype))
        self.pad = pad_id(self.tokenizer)
        anatomy = Anatomy.find(self.model)
        self.fingerprint = anatomy.fingerprint()
        self.tracked = tracked_sites(anatomy, self.experiment)
        self.lora = lora_config(anatomy, config.peft)
        self.train_rows = [encode(self.tokenizer, row["prompt"], row["answer"]) for row in data["train"]]
        self.suite = Suite(
            styled=[encode(self.tokenizer, row["prompt"], row["trait"]) for row in data["heldout"]],
            neutral=[encode(self.tokenizer, row["prompt"], row["neutral"]) for row in data["heldout"]],
            texts=[plain(self.tokenizer, row["text"]) for row in data["neutral_text"]],
        )
        self.contrast = ContrastSet.from_pairs(self.tokenizer, data["contrast"])
        self.probe = [encode(self.tokenizer, row["prompt"]) for row in data["probe"]]
        self.batches()  # raises for a prompt that is too long

    def _checked_data(self) -> dict[str, list[dict[str, str]]]:
        check_scope(self.experiment.scope)
        self.module(nn.Identity())
        check_completions(self.prompts, self.experiment.completions.max_new_tokens, section=COMPLETIONS)
        data = load_dataset(self.experiment.data)
        check_batch(len(data["train"]), self.experiment.train.batch_size)
        method = self.experiment.trait.method
        extractor_of(method).check(method, paired=True)
        return data

    def say(self, step: str, text: str) -> None:
        """Prints what is being done."""
        self.console.print(f"[bold]{step:>10}[/]  {text}")

    def module(self, model: nn.Module) -> SFTModule:
        """The training of a model, as experiment.train has it."""
        spec = self.experiment.train
        return SFTModule(model, learning_rate=spec.learning_rate, warmup_steps=spec.warmup_steps, steps=spec.steps, schedule=spec.schedule)

    def batches(self) -> DataLoader[Any]:
        """The same batches for every arm."""
        spec = self.experiment.train
        return loader(self.train_rows, batch_size=spec.batch_size, pad=self.pad, seed=self.config.seed, max_length=spec.max_length)

    def tracker(self, directions: Directions, store: Path | None) -> DriftTracker:
        """A tracker of the trait direction at the sites of experiment.drift."""
        drift = self.experiment.drift
        watched = {directions.name: [directions[site] for site in self.tracked]}
        return DriftTracker(watched, probe=self.probe, controls=drift.controls, stream=drift.stream, store=store, seed=self.config.seed)

    def plan(self, arm: Arm, direction: Direction) -> Plan | None:
        """The plan of an arm, None for one that is never steered."""
        return arm.plan(direction, scope=self.experiment.scope, seed=self.config.seed + 1, fingerprint=self.fingerprint)

    def completions(self, model: nn.Module) -> list[dict[str, str]]:
        """What a model says to the prompts of the experiment."""
        answers = complete(model, self.tokenizer, self.prompts, max_new_tokens=self.experiment.completions.max_new_tokens)
        return [{"prompt": prompt, "text": text} for prompt, text in zip(self.prompts, answers, strict=True)]

    def extract(self) -> tuple[Directions, Direction]:
        """The trait direction at every site where it is read, and the one that is used."""
        trait = self.experiment.trait
        directions = extract(
            self.model, self.contrast, list(trait.sites), name=trait.name, method=trait.method, span=trait.span, holdout=trait.holdout
        )
        directions.save(self.out / "directions")
        chosen = directions[trait.site] if trait.site else directions.best()
        quality = f"held-out AUC {chosen.metrics['auc']:.3f}, |v| {chosen.metrics['gap']:.2f}, relative dose {chosen.relative_dose():.2f}"
        self.say("direction", f"{trait.name} at {chosen.site}: {quality}")
        return directions, chosen


def _run_arms(job: Run, directions: Directions, direction: Direction) -> dict[str, tuple[dict[str, Any], results.Measures]]:
    """Trains each arm that has weights of its own, and measures it and the inference arms that use these weights.

    Returns:
        Name of the arm -> what metrics.json holds of it (training, completions), and its measures.
    """
    outcomes = {}
    for arm in job.arms:
        if arm.when == "inference":
            continue
        job.say("arm", f"[cyan]{arm.name}[/]: {arm.label}")
        adapted, training = train_arm(job, arm, job.plan(arm, direction), directions)
        users = [user for user in job.arms if user.uses == arm.name]
        for measured in (arm, *users):
            outcomes[measured.name] = _measure_arm(job, measured, adapted, direction, training)
        adapted.unload()  # type: ignore[operator]
    return outcomes


def _measure_arm(
    job: Run, arm: Arm, adapted: nn.Module, direction: Direction, training: dict[str, Any]
) -> tuple[dict[str, Any], results.Measures]:
    plan = job.plan(arm, direction)
    if plan is not None:
        plan.save(job.out / "plans" / arm.name)
    with plan.attached(adapted) if plan is not None and arm.when == "inference" else nullcontext():
        measures = measure(adapted, job.suite, pad=job.pad)
        return {"train": training, "completions": job.completions(adapted)}, measures


def _facts(job: Run, started: datetime) -> dict[str, Any]:
    """How a run came about, and where its files are, for metrics.json."""
    program, *arguments = sys.argv[0].split()
    return {
        "command": shlex.join([Path(program).name, *arguments, *sys.argv[1:]]),
        "started": started.isoformat(timespec="seconds"),
        "versions": versions(),
        "model": {"name": job.config.model.name, "fingerprint": job.fingerprint},
        "drift": {"stores": {arm.name: f"drift/{arm.name}.sqlite" for arm in job.arms if arm.when != "inference"}},
        "artifacts": {
            "directions": "directions",
            "adapters": {arm.name: f"adapters/{arm.uses or arm.name}" for arm in job.arms},
            "plans": {arm.name: f"plans/{arm.name}" for arm in job.arms if arm.when != "never"},
        },
    }


def _write_config(config: DictConfig, out: Path) -> None:
    (out / "config").mkdir(parents=True, exist_ok=True)
    atomic_write(out / "config" / "config.yaml", OmegaConf.to_yaml(config))
    atomic_write(out / "config" / "overrides.yaml", OmegaConf.to_yaml(HydraConfig.get().overrides.task))


def _quieten_libraries() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
