"""`steer train`: the arms of an experiment, from one direction, one seed and the same batches, to one report."""

from __future__ import annotations

import copy
import logging
import shlex
import signal
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
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from steer.callbacks import DriftCallback, SteeringCallback
from steer.commands.config import dtype_named
from steer.commands.info import versions
from steer.directions import EXTRACTORS, ContrastSet, Direction, Directions, extract
from steer.directions.sweep import check_scope
from steer.drift.tracker import DriftTracker
from steer.errors import ConfigError, SiteError, did_you_mean
from steer.experiment import results
from steer.experiment.arms import Arm, read_arms
from steer.experiment.complete import check_completions, complete
from steer.experiment.data import load_dataset
from steer.experiment.overhead import Overhead, step_overhead
from steer.experiment.score import Suite, measure
from steer.experiment.sft import SFTModule, check_batch, loader
from steer.files import atomic_write, contents
from steer.intervene import Plan
from steer.model.anatomy import Anatomy
from steer.model.load import load
from steer.model.site import Site
from steer.model.tokens import collate, encode, pad_id, plain
from steer.report import summary_table, write_report

# Said by libraries about one another; a reader of our output can do nothing about them.
NOISE = ("`isinstance\\(treespec", "`is_gradient_checkpointing` is deprecated", "The 'train_dataloader' does not have many workers")
COMPLETIONS = "experiment.completions."
WRITTEN = ("metrics.json", "report.html", "directions", "plans", "adapters", "drift", "logs")


class Run:
    """One experiment: what all arms share, and one method per step of it."""

    def __init__(self, config: DictConfig, out: Path) -> None:
        self.config, self.out, self.experiment = config, out, config.experiment
        self.console = Console()
        self.arms = read_arms(OmegaConf.to_container(self.experiment.arms))
        check_scope(self.experiment.scope)  # what is misspelt is said now, not minutes later
        self.module(nn.Identity())
        check_completions(listed(self.experiment.completions.prompts), self.experiment.completions.max_new_tokens, of=COMPLETIONS)
        data = load_dataset(self.experiment.data)
        check_batch(len(data["train"]), self.experiment.train.batch_size)
        method = self.experiment.trait.method
        EXTRACTORS.get(method).check(method, paired=True)
        self.say("model", f"loading {config.model.name}")
        self.model, self.tokenizer = load(config.model.name, dtype=dtype_named(config.model.dtype))
        self.pad = pad_id(self.tokenizer)
        anatomy = Anatomy.find(self.model)
        self.fingerprint = anatomy.fingerprint()
        self.tracked = tracked_sites(anatomy, self.experiment)
        self.lora = lora(anatomy, config.peft)
        self.train_rows = [encode(self.tokenizer, row["prompt"], row["answer"]) for row in data["train"]]
        self.suite = Suite(
            styled=[encode(self.tokenizer, row["prompt"], row["trait"]) for row in data["heldout"]],
            neutral=[encode(self.tokenizer, row["prompt"], row["neutral"]) for row in data["heldout"]],
            texts=[plain(self.tokenizer, row["text"]) for row in data["neutral_text"]],
        )
        self.contrast = ContrastSet.from_pairs(self.tokenizer, data["contrast"])
        self.probe = [encode(self.tokenizer, row["prompt"]) for row in data["probe"]]
        self.prompts = listed(self.experiment.completions.prompts)
        self.batches()

    def module(self, model: nn.Module) -> SFTModule:
        spec = self.experiment.train
        return SFTModule(model, learning_rate=spec.learning_rate, warmup_steps=spec.warmup_steps, steps=spec.steps, schedule=spec.schedule)

    def batches(self) -> DataLoader[Any]:
        """The same batches for every arm."""
        spec = self.experiment.train
        return loader(self.train_rows, batch_size=spec.batch_size, pad=self.pad, seed=self.config.seed, max_length=spec.max_length)

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
        watched = {directions.name: [directions[site] for site in self.tracked]}
        return DriftTracker(watched, probe=self.probe, controls=drift.controls, stream=drift.stream, store=store, seed=self.config.seed)

    def train_arm(self, arm: Arm, plan: Plan | None, directions: Directions) -> tuple[nn.Module, dict[str, Any]]:
        """Trains one arm from the base weights; returns the adapted model and what there is to say about the training."""
        spec = self.experiment.train
        pl.seed_everything(self.config.seed, verbose=False)
        adapted = get_peft_model(self.model, copy.deepcopy(self.lora))  # PEFT writes into the one it is given
        batches = self.batches()
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
        try:
            trainer.fit(module, batches)
        except SystemExit:  # so Lightning ends after Ctrl-C, and it goes on ignoring the key
            if trainer.interrupted:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt from None
            raise
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


def listed(value: Any) -> list[str]:
    """A list of texts out of the configuration; null is an empty one."""
    return [str(one) for one in value or ()]


def tracked_sites(anatomy: Anatomy, experiment: DictConfig) -> list[Site]:
    """Sites of experiment.drift.sites, which may be patterns.

    Raises:
        ConfigError: none. SiteError: one that cannot be read or is not in this model, or at which no direction will be read; the site where
            the arms are steered is checked too.
    """
    trait = experiment.trait
    read = anatomy.sites(*listed(trait.sites))
    if not (asked := listed(experiment.drift.sites)):  # of the anatomy, no site means all
        remedy = "set experiment.drift.sites=[layers.*.output], or to some of them"
        raise ConfigError("nothing is tracked", expected="a site or more in experiment.drift.sites", found="none", remedy=remedy)
    tracked, used = anatomy.sites(*asked), anatomy.sites(trait.site) if trait.site else []
    for key, sites in (("experiment.drift.sites", tracked), ("experiment.trait.site", used)):
        if missing := [str(site) for site in sites if site not in read]:
            raise SiteError(
                f"no direction is read at {', '.join(missing)}, which {key} names",
                expected=f"sites out of experiment.trait.sites, {', '.join(listed(trait.sites)) or 'which is empty'}",
                found=", ".join(missing),
                remedy=f"add it to experiment.trait.sites, or correct {key}",
            )
    return tracked


def lora(anatomy: Anatomy, peft: DictConfig) -> LoraConfig:
    """The adapters of every arm. Raises ConfigError when a target names no module of the model, a layer is none of its, or a number is out
    of range: PEFT looks at that when the first arm begins, and lets a target pass that fits nothing while another one fits."""
    targets, layers = listed(peft.targets), None if peft.layers is None else list(peft.layers)
    linear = {name.rpartition(".")[2] for name, module in anatomy.model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    names = [name for name, _ in anatomy.model.named_modules()]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unknown or not targets:
        remedy = "set peft.targets to some of these"
        if near := did_you_mean(unknown[0], linear) if unknown else None:
            remedy = near
        raise ConfigError(
            "peft.targets names no module", expected=f"some of {', '.join(sorted(linear))}", found=unknown or "none", remedy=remedy
        )
    if layers is not None and (not layers or not all(0 <= layer < anatomy.n_layers for layer in layers)):
        raise ConfigError(
            "peft.layers names no layer",
            expected=f"indices from 0 to {anatomy.n_layers - 1}, or null for all",
            found=layers,
            remedy="correct peft.layers",
        )
    if peft.r is None or peft.r < 1 or peft.alpha is None or peft.dropout is None or not 0 <= peft.dropout < 1:
        found = f"r={peft.r}, alpha={peft.alpha}, dropout={peft.dropout}"
        raise ConfigError("such adapters cannot be made", expected="r >= 1, 0 <= dropout < 1", found=found, remedy="set these keys of peft")
    return LoraConfig(
        r=peft.r,
        lora_alpha=peft.alpha,
        lora_dropout=peft.dropout,
        target_modules=targets,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )


def check_seed(seed: int | None) -> None:
    """Raises ConfigError for one that not every generator of random numbers takes."""
    if seed is None or not 0 <= seed < 2**32:
        raise ConfigError("this cannot be a seed", expected=f"a whole number from 0 to {2**32 - 1}", found=seed, remedy="set seed=0")


def check_unused(out: Path) -> None:
    """Raises ConfigError when a folder holds a run, finished or begun, which this one would mix with its own or overwrite."""
    if there := [name for name in WRITTEN if (out / name).exists()]:
        raise ConfigError(
            f"'{out}' holds a run already",
            expected="a folder without one",
            found=", ".join(there),
            remedy="leave hydra.run.dir out, which makes a new folder for each run, or name another; a run cannot be resumed",
        )


def what_is_left(out: Path) -> str:
    """What an interrupted run leaves, in a line."""
    there = [f"{name}/{part.name}" for name in ("adapters", "drift") for part in sorted(out.glob(f"{name}/*")) if part.suffix != ".lock"]
    return (
        f"interrupted: '{out}' keeps what was written ({', '.join(there) or contents(out)}) and has no report; "
        "a run cannot be resumed, start it again in a new folder"
    )


def run(config: DictConfig) -> None:
    """Runs every arm and writes metrics.json, report.html, the plans, the adapters and the drift records."""
    started, clock = datetime.now(UTC), time.perf_counter()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    check_unused(out)  # before anything is written into it, hence Hydra's own copy of the configuration is switched off
    check_seed(config.seed)
    (out / "config").mkdir(parents=True, exist_ok=True)
    atomic_write(out / "config" / "config.yaml", OmegaConf.to_yaml(config))
    atomic_write(out / "config" / "overrides.yaml", OmegaConf.to_yaml(hydra.overrides.task))
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
