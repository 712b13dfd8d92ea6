"""`steer train`: the arms of an experiment, from one direction, one seed and the same batches, to one report."""

from __future__ import annotations

import logging
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, get_peft_model
from pytorch_lightning.loggers import CSVLogger
from rich.console import Console
from torch import Tensor, nn

from steer.callbacks import DriftCallback, SteeringCallback
from steer.commands.config import dtype_named
from steer.commands.info import versions
from steer.directions import EXTRACTORS, ContrastSet, Direction, Directions, extract
from steer.drift.tracker import DriftTracker
from steer.experiment import results
from steer.experiment.arms import Arm, read_arms
from steer.experiment.complete import complete
from steer.experiment.data import load_dataset
from steer.experiment.overhead import Overhead, step_overhead
from steer.experiment.score import Suite, measure
from steer.experiment.sft import SFTModule, loader
from steer.files import atomic_write
from steer.intervene import Plan, Scope
from steer.model.anatomy import Anatomy
from steer.model.load import load
from steer.model.tokens import collate, encode, pad_id, plain
from steer.report import summary_table, write_report

# Said by libraries about one another; a reader of our output can do nothing about them.
NOISE = ("`isinstance\\(treespec", "`is_gradient_checkpointing` is deprecated", "The 'train_dataloader' does not have many workers")


class Run:
    """One experiment: what all arms share, and one method per step of it."""

    def __init__(self, config: DictConfig, out: Path) -> None:
        self.config, self.out, self.experiment = config, out, config.experiment
        self.console = Console()
        self.arms = read_arms(OmegaConf.to_container(self.experiment.arms))
        Scope.parse(self.experiment.scope)  # what is misspelt is said now, not minutes later
        self.module(nn.Identity())
        method = self.experiment.trait.method
        EXTRACTORS.get(method).check(method, paired=True)
        self.say("model", f"loading {config.model.name}")
        self.model, self.tokenizer = load(config.model.name, dtype=dtype_named(config.model.dtype))
        self.pad = pad_id(self.tokenizer)
        self.fingerprint = Anatomy.find(self.model).fingerprint()
        data = load_dataset(self.experiment.data)
        self.train_rows = [encode(self.tokenizer, row["prompt"], row["answer"]) for row in data["train"]]
        self.suite = Suite(
            styled=[encode(self.tokenizer, row["prompt"], row["trait"]) for row in data["heldout"]],
            neutral=[encode(self.tokenizer, row["prompt"], row["neutral"]) for row in data["heldout"]],
            texts=[plain(self.tokenizer, row["text"]) for row in data["neutral_text"]],
        )
        self.contrast = ContrastSet.from_pairs(self.tokenizer, data["contrast"])
        self.probe = [encode(self.tokenizer, row["prompt"]) for row in data["probe"]]
        self.prompts = list(self.experiment.completions.prompts)

    def module(self, model: nn.Module) -> SFTModule:
        spec = self.experiment.train
        return SFTModule(model, learning_rate=spec.learning_rate, warmup_steps=spec.warmup_steps, steps=spec.steps, schedule=spec.schedule)

    def say(self, step: str, text: str) -> None:
        self.console.print(f"[bold]{step:>10}[/]  {text}")

    def completions(self, model: nn.Module) -> list[dict[str, str]]:
        texts = complete(model, self.tokenizer, self.prompts, max_new_tokens=self.experiment.completions.max_new_tokens)
        return [{"prompt": prompt, "text": text} for prompt, text in zip(self.prompts, texts, strict=True)]

    def extract(self) -> tuple[Directions, Direction]:
        """The trait direction at every layer, and the one that is used."""
        trait = self.experiment.trait
        directions = extract(
            self.model, self.contrast, list(trait.sites), name=trait.name, method=trait.method, span=trait.span, holdout=trait.holdout
        )
        directions.save(self.out / "directions")
        chosen = directions[trait.site] if trait.site else directions.best()
        auc, gap = chosen.metrics["auc"], chosen.metrics["gap"]
        self.say(
            "direction", f"{trait.name} at {chosen.site}: held-out AUC {auc:.3f}, |v| {gap:.2f}, relative dose {chosen.relative_dose():.2f}"
        )
        return directions, chosen

    def tracker(self, directions: Directions, store: Path | None) -> DriftTracker:
        drift = self.experiment.drift
        watched = {directions.name: [directions[site] for site in drift.sites]}
        return DriftTracker(watched, probe=self.probe, controls=drift.controls, stream=drift.stream, store=store, seed=self.config.seed)

    def train_arm(self, arm: Arm, plan: Plan | None, directions: Directions) -> tuple[nn.Module, dict[str, Any]]:
        """Trains one arm from the base weights; returns the adapted model and what there is to say about the training."""
        spec = self.experiment.train
        pl.seed_everything(self.config.seed, verbose=False)
        peft = self.config.peft
        adapted = get_peft_model(
            self.model,
            LoraConfig(
                r=peft.r,
                lora_alpha=peft.alpha,
                lora_dropout=peft.dropout,
                target_modules=list(peft.targets),
                layers_to_transform=None if peft.layers is None else list(peft.layers),
                task_type="CAUSAL_LM",
            ),
        )
        batches = loader(self.train_rows, batch_size=spec.batch_size, pad=self.pad, seed=self.config.seed, max_length=spec.max_length)
        module = self.module(adapted)
        tracker = self.tracker(directions, self.out / "drift" / f"{arm.name}.sqlite")
        callbacks: list[pl.Callback] = [DriftCallback(tracker, every_n_steps=self.experiment.drift.every_n_steps)]
        if plan is not None:
            callbacks.insert(0, SteeringCallback(plan, phases=("train",)))
        adapted.train()  # models are loaded in evaluation mode
        trainer = pl.Trainer(
            max_steps=spec.steps,
            max_epochs=-1,
            accelerator=self.config.trainer.accelerator,
            devices=self.config.trainer.devices,
            precision=self.config.trainer.precision,
            enable_progress_bar=self.config.trainer.progress,
            enable_model_summary=False,
            enable_checkpointing=False,
            gradient_clip_val=spec.gradient_clip,
            logger=CSVLogger(self.out / "logs", name=arm.name, version=""),
            log_every_n_steps=1,
            callbacks=callbacks,
        )
        started = time.perf_counter()
        trainer.fit(module, batches)
        seconds = time.perf_counter() - started
        adapted.save_pretrained(self.out / "adapters" / arm.name, save_embedding_layers=False)  # or PEFT asks the hub about the base
        losses = [float(loss) for loss in module.losses]
        return adapted, {
            "steps": trainer.global_step,
            "seconds": seconds,
            "probe_seconds": tracker.probe_seconds,
            "loss": losses,
            "callback_overhead": None,
            "callback_overhead_range": None,
        }

    def overhead(self, adapted: nn.Module, plan: Plan, directions: Directions) -> Overhead:
        """What the hooks of a plan and of the tracker add to one training step, as a fraction of the bare step."""
        spec = self.experiment.train
        batch = collate(self.train_rows[: spec.batch_size], self.pad, max_length=spec.max_length)

        @contextmanager
        def attached() -> Iterator[None]:
            with plan.attached(adapted), self.tracker(directions, None).attached(adapted):
                yield

        return step_overhead(adapted, batch, attached)


def run(config: DictConfig) -> None:
    """Runs every arm and writes metrics.json, report.html, the plans, the adapters and the drift records."""
    started, clock = datetime.now(UTC), time.perf_counter()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    out = Path(HydraConfig.get().runtime.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    job = Run(config, out)
    directions, direction = job.extract()
    job.say("baseline", "scoring the model as it is")
    before = measure(job.model, job.suite, pad=job.pad)
    base_completions = job.completions(job.model)
    arms: dict[str, dict[str, Any]] = {}
    after: dict[str, dict[str, Tensor]] = {}
    for arm in (arm for arm in job.arms if arm.when != "inference"):
        plan = arm.plan(direction, scope=config.experiment.scope, seed=config.seed + 1, fingerprint=job.fingerprint)
        job.say("arm", f"[cyan]{arm.name}[/]: {arm.label}")
        adapted, trained = job.train_arm(arm, plan, directions)
        if plan is not None:
            cost = job.overhead(adapted, plan, directions)
            trained |= {"callback_overhead": cost.median, "callback_overhead_range": [cost.low, cost.high]}
        followers = [other for other in job.arms if other.uses == arm.name]
        for measured in (arm, *followers):
            own = measured.plan(direction, scope=config.experiment.scope, seed=config.seed + 1, fingerprint=job.fingerprint)
            with ExitStack() as stack:
                if own is not None:
                    own.save(out / "plans" / measured.name)
                    if measured.when == "inference":
                        stack.enter_context(own.attached(adapted))
                after[measured.name] = measure(adapted, job.suite, pad=job.pad)
                arms[measured.name] = {"train": trained, "completions": job.completions(adapted)}
        adapted.unload()  # type: ignore[operator]
    metrics = results.collect(
        config=cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)),
        arms=[(arm, arms[arm.name], after[arm.name]) for arm in job.arms],
        before=before,
        direction=direction,
        directions=directions,
    )
    metrics |= {
        "command": shlex.join([Path(sys.argv[0].split()[0]).name, *sys.argv[0].split()[1:], *sys.argv[1:]]),
        "started": started.isoformat(timespec="seconds"),
        "versions": versions(),
        "model": {"name": config.model.name, "fingerprint": job.fingerprint},
        "base_completions": base_completions,
        "drift": {"stores": {arm.name: f"drift/{arm.name}.sqlite" for arm in job.arms if arm.when != "inference"}},
        "artifacts": {
            "directions": "directions",
            "adapters": {arm.name: f"adapters/{arm.uses or arm.name}" for arm in job.arms},
            "plans": {arm.name: f"plans/{arm.name}" for arm in job.arms if arm.when != "never"},
        },
        "wall_seconds": time.perf_counter() - clock,
    }
    atomic_write(out / "metrics.json", results.to_json(metrics))
    report = write_report(out / "report.html", metrics, results.drift_records(out, metrics))
    job.console.print(summary_table(metrics))
    job.say("report", str(report))
