"""What the cells of an experiment share: configuration, model, adapters, tokenised texts, treatments and their random partners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from steer.checks import whole_number
from steer.commands import cell_ranks
from steer.commands.config import dtype_named
from steer.commands.trackers import check_tracker
from steer.commands.train_checks import check_seeds, lora_config, texts, tracked_sites
from steer.directions import ContrastSet, Direction, Directions, extract
from steer.directions.extractor import extractor_of
from steer.directions.sweep import check_scope
from steer.drift.tracker import DriftTracker
from steer.errors import ConfigError
from steer.experiment.arms import Arm, check_training, read_arms
from steer.experiment.cells import Cell
from steer.experiment.complete import check_completions, complete
from steer.experiment.data import DataSet
from steer.experiment.metric import metric_of
from steer.experiment.outcome import Outcome, check_outcomes, prepare_all, texts_of
from steer.experiment.projections import mean_projection, token_projections
from steer.experiment.sft import SFTModule, check_batch, loader
from steer.experiment.treatment import BAKED, INFERENCE, NEVER, Bench, Treatment
from steer.model.anatomy import Anatomy
from steer.model.load import load
from steer.model.tokens import Row, encode, pad_id

BASE = "base"  # name of the cell of the model as it is
COMPLETIONS = "experiment.completions."
_OPTIONAL = ("question", "trait", "scope", "primary", "secondary", "train", "drift")  # of an experiment, null where left out
_JUDGED = ("role", "better", "margin")  # keys of an outcome that say what its values mean, and change none of them
_OUTCOME_KEYS = ("data", *_JUDGED)


class ExperimentRun:
    """An experiment as its configuration has it.

    What needs no model is checked at once, and the rest when `model` or `treatments` is first asked for: a mistake is named before minutes
    of work, not after them.

    Args:
        config: of `steer ab` or `steer train`.
        root: the folder of the experiment; cells lie in `cells`.

    Raises:
        SteerError: of the kind that the faulty part raises.
    """

    def __init__(self, config: DictConfig, root: Path) -> None:
        with open_dict(config):
            for key in _OPTIONAL:
                config.experiment.setdefault(key, None)
        self.config = config
        self.experiment = config.experiment
        self.root = root
        self.console = Console(quiet=not cell_ranks.is_first())
        self.seeds = check_seeds(config.seeds)
        self.settings = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
        spec = self.settings["experiment"]
        arms = read_arms(spec["arms"], trait=spec.get("trait"), scope=spec.get("scope") or "all")
        arms = _with_weights(arms) if self.trains else arms
        most = config.draws
        if most is not None:
            whole_number(most, "draws", least=1)
        if BASE in (arm.name for arm in arms):
            raise _name_of_the_base()
        self.arms = [arm if most is None else replace(arm, draws=min(arm.draws, most)) for arm in arms]
        self.data = DataSet(self.experiment.data)
        self.outcomes = self._read_outcomes(spec["outcomes"])
        self.prompts = texts(self.experiment.completions.prompts)
        self._check()

    def _read_outcomes(self, specs: Mapping[str, Any]) -> list[Outcome]:
        outcomes = []
        for name, spec in (specs or {}).items():
            if spec is None:
                continue
            own = {key: value for key, value in spec.items() if key not in _OUTCOME_KEYS}
            metric = metric_of(own)
            rows = self.data.split(spec["data"], tuple(metric.keys)) if "data" in spec else []
            options = {key: spec[key] for key in ("role", "better", "margin") if key in spec}
            outcomes.append(Outcome(name, metric, rows, **options))
        check_outcomes(outcomes)
        return outcomes

    def _check(self) -> None:
        if self.experiment.scope is not None:
            check_scope(self.experiment.scope)
        check_tracker(self.settings.get("tracker"))
        check_completions(self.prompts, self.experiment.completions.max_new_tokens, section=COMPLETIONS)
        check_training(self.arms, self.trains)
        if not self.trains and len(self.seeds) > 1:
            raise _nothing_random(self.seeds)
        if self.trains:
            self.module(nn.Identity(), 0)
            check_batch(len(self.data.split("train")), self.experiment.train.batch_size)
        if self.experiment.trait is not None:
            method = self.experiment.trait.method
            extractor_of(method).check(method, paired=True)
            self.data.split("contrast")

    @property
    def trains(self) -> bool:
        """Its arms are fine-tuned; otherwise they act on the base model."""
        return self.experiment.train is not None

    def say(self, step: str, text: str) -> None:
        """Prints what is being done."""
        self.console.print(f"[bold]{step:>10}[/]  {text}")

    # ---- the model and what is made of it

    @cached_property
    def loaded(self) -> tuple[nn.Module, Any]:
        self.say("model", f"loading {self.config.model.name}")
        return load(self.config.model.name, dtype=dtype_named(self.config.model.dtype))

    @property
    def model(self) -> nn.Module:
        return self.loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self.loaded[1]

    @cached_property
    def anatomy(self) -> Anatomy:
        return Anatomy.find(self.model)

    @cached_property
    def pad(self) -> int:
        return pad_id(self.tokenizer)

    @cached_property
    def directions(self) -> Directions | None:
        """The trait direction at every site where it is read; None for an experiment without a trait."""
        trait = self.experiment.trait
        if trait is None:
            return None
        contrast = ContrastSet.from_pairs(self.tokenizer, self.data.split("contrast"))
        directions = extract(
            self.model, contrast, list(trait.sites), name=trait.name, method=trait.method, span=trait.span, holdout=trait.holdout
        )
        chosen = self.chosen_of(directions)
        quality = f"held-out AUC {chosen.metrics['auc']:.3f}, |v| {chosen.metrics['gap']:.2f}, relative dose {chosen.relative_dose():.2f}"
        self.say("direction", f"{trait.name} at {chosen.site}: {quality}")
        return directions

    def chosen_of(self, directions: Directions) -> Direction:
        """The direction that is used where a plan names no site."""
        site = self.experiment.trait.site
        return directions[site] if site else directions.best()

    def direction_quality(self) -> dict[str, Any] | None:
        """What is known of the direction that is used; None without a trait."""
        if self.directions is None:
            return None
        chosen = self.chosen_of(self.directions)
        return {
            "name": self.directions.name,
            "site": str(chosen.site),
            "method": chosen.method,
            "auc_heldout": chosen.metrics["auc"],
            "norm": chosen.metrics["gap"],
            "relative_dose": chosen.relative_dose(),
        }

    @cached_property
    def bench(self) -> Bench:
        """What treatments are made from."""
        directions: dict[str, Directions] = {}
        if self.directions is not None:
            directions[self.directions.name] = _Placed(self.directions, self.chosen_of(self.directions))
        return Bench(self.model, self.tokenizer, self.measured_rows, directions, self.anatomy.fingerprint())

    @cached_property
    def measured_rows(self) -> list[Row]:
        """Texts of the outcomes, on which the sizes of edits are measured."""
        return texts_of(self.outcomes, self.tokenizer)

    @cached_property
    def treatments(self) -> dict[str, list[Treatment]]:
        """Of every arm, one for each draw of a control; matched to what it controls."""
        return {arm.name: arm.treatments(self.bench) for arm in self.arms}

    def prepare(self) -> None:
        """Makes all that the cells need, so that faults are found before the first of them runs."""
        if self.trains:
            self.lora = lora_config(self.anatomy, self.config.peft)
            self.batches(self.training_rows(None), self.seeds[0])  # raises for a prompt that is too long
        self.tracked = [] if self.experiment.drift is None else tracked_sites(self.anatomy, self.experiment)
        _ = self.treatments  # matched to what they control
        if self.directions is not None:
            _ = self.neutral_projection  # of the base, before an arm acts
        prepare_all(self.outcomes, self.model, self.tokenizer)

    # ---- training

    def module(self, model: nn.Module, seed: int) -> SFTModule:
        """The training of a model, as experiment.train has it."""
        spec = self.experiment.train
        return SFTModule(
            model,
            learning_rate=spec.learning_rate,
            warmup_steps=spec.warmup_steps,
            steps=spec.steps,
            schedule=spec.schedule,
            seed=seed,
        )

    def training_rows(self, treatment: Treatment | None) -> list[Row]:
        """The rows that an arm is trained on."""
        rows: Sequence[Mapping[str, Any]] = self.data.split("train")
        if treatment is not None:
            rows = treatment.training_rows(rows)
        return [encode(self.tokenizer, row["prompt"], row["answer"], system=row.get("system")) for row in rows]

    def batches(self, rows: list[Row], seed: int, first: int = 0) -> DataLoader[Any]:
        """The batches of a seed, the same for every arm."""
        spec = self.experiment.train
        return loader(rows, batch_size=spec.batch_size, pad=self.pad, seed=seed, max_length=spec.max_length, steps=spec.steps, first=first)

    def tracker(self, store: Path | None, seed: int) -> DriftTracker | None:
        """A tracker of the trait direction at the sites of experiment.drift."""
        if self.directions is None or not self.tracked:
            return None
        drift = self.experiment.drift
        watched = {self.directions.name: [self.directions[site] for site in self.tracked]}
        probe = [encode(self.tokenizer, row["prompt"]) for row in self.data.split("probe")]
        return DriftTracker(watched, probe=probe, controls=drift.controls, stream=drift.stream, store=store, seed=seed)

    @cached_property
    def neutral_projection(self) -> float:
        """Mean projection of the experiment's texts on the trait direction, on the base model."""
        assert self.directions is not None
        return mean_projection(self.model, self.chosen_of(self.directions), self.measured_rows)

    def completions(self, model: nn.Module, system: str | None) -> list[dict[str, Any]]:
        """What a model says to the prompts of the experiment, and where in it the trait is."""
        asked: list[Any] = [{"prompt": prompt, "system": system} for prompt in self.prompts]
        answers = complete(model, self.tokenizer, asked, max_new_tokens=self.experiment.completions.max_new_tokens)
        said: list[dict[str, Any]] = [{"prompt": prompt, "text": text} for prompt, text in zip(self.prompts, answers, strict=True)]
        if self.directions is not None:
            chosen = self.chosen_of(self.directions)
            tokens = token_projections(model, self.tokenizer, chosen, self.neutral_projection, asked, answers)
            said = [{**answer, "tokens": of_answer} for answer, of_answer in zip(said, tokens, strict=True)]
        return said

    # ---- cells

    def cells(self, more_seeds: Sequence[int] = ()) -> list[Cell]:
        """Every cell: the model as it is, and each arm, draw and seed."""
        cells = [Cell(BASE, 0, 0, self._shared_spec())]
        seeds = sorted({*self.seeds, *more_seeds})
        for seed in seeds if self.trains else self.seeds:
            trained: dict[str, Cell] = {}
            for arm in sorted(self.arms, key=lambda arm: arm.uses is not None):
                needs = trained[arm.uses] if self.trains and arm.uses is not None else None
                made = [Cell(arm.name, draw, seed, self._spec_of(arm), needs) for draw in range(arm.draws)]
                trained[arm.name] = made[0]
                cells += made
        return cells

    def _shared_spec(self) -> dict[str, Any]:
        """What the result of every cell depends on."""
        experiment = self.settings["experiment"]
        outcomes = {name: spec for name, spec in experiment["outcomes"].items() if spec}
        splits = {spec["data"] for spec in outcomes.values() if "data" in spec}
        splits |= {"train"} if self.trains else set()
        splits |= {"contrast"} if experiment["trait"] else set()
        splits |= {"probe"} if experiment["drift"] else set()
        read = {key: experiment[key] for key in ("train", "trait", "drift", "completions")}
        for key, idle in (("train", "checkpoint_every"), ("trait", "description")):
            read[key] = {name: value for name, value in read[key].items() if name != idle} if read[key] else None
        return {
            "model": self.settings["model"],
            "peft": self.settings["peft"] if self.trains else None,
            "precision": self.settings["trainer"]["precision"] if self.trains else None,
            "data": self.data.digest(*sorted(splits)),
            "outcomes": {name: {key: value for key, value in spec.items() if key not in _JUDGED} for name, spec in outcomes.items()},
            **read,
        }

    def _spec_of(self, arm: Arm) -> dict[str, Any]:
        treatment = {"kind": arm.treatment.name, **arm.treatment.spec()}
        return {**self._shared_spec(), "treatment": treatment, "when": arm.when, "control": arm.control_of is not None}


class _Placed(Directions):
    """Directions of which a plan that names no site means that of experiment.trait.site."""

    def __init__(self, directions: Directions, chosen: Direction) -> None:
        super().__init__(list(directions.entries.values()), directions.name, directions.provenance)
        self.chosen = chosen

    def best(self) -> Direction:
        return self.chosen


def _with_weights(arms: Sequence[Arm]) -> list[Arm]:
    """Arms that do nothing in training, and do not say whose weights they use, use those of the first that does nothing at all."""
    untreated = next((arm.name for arm in arms if arm.when == NEVER), None)
    return [replace(arm, uses=untreated) if arm.when in (INFERENCE, BAKED) and arm.uses is None else arm for arm in arms]


# ---- errors


def _nothing_random(seeds: list[int]) -> ConfigError:
    return ConfigError(
        "an experiment that trains nothing has no seeds",
        expected="one seed: every other one would give the same numbers, and claim to have tried again",
        found=seeds,
        remedy="set seeds=[0], raise the draws of its controls, or train: experiment.train",
    )


def _name_of_the_base() -> ConfigError:
    return ConfigError(
        f"an arm cannot be called '{BASE}'",
        expected="another name",
        found=f"experiment.arms.{BASE}",
        remedy=f"rename it; the model before training is measured as '{BASE}' in any case",
    )
