"""An experiment as its configuration has it: arms, outcomes, data, seeds, and the cells that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from torch import nn

from steer.checks import one_of, whole_number
from steer.commands import cell_ranks
from steer.commands.config import dtype_named
from steer.commands.experiment_keys import complete_keys
from steer.commands.trackers import check_tracker
from steer.commands.train_checks import check_seeds, features_to_track, texts
from steer.directions.extractor import extractor_of
from steer.directions.sweep import check_scope
from steer.drift.feature_groups import TrackedFeatures
from steer.errors import ConfigError
from steer.experiment.arms import Arm, check_training, read_arms
from steer.experiment.cells import DONE, MEASURED_IN, Cell
from steer.experiment.complete import check_completions
from steer.experiment.data import DataSet
from steer.experiment.metric import metric_of
from steer.experiment.outcome import Outcome, check_outcomes
from steer.experiment.sft import SFTModule, ShardedSFTModule, check_batch
from steer.experiment.treatment import BAKED, INFERENCE, NEVER
from steer.features.dictionary import Dictionary
from steer.features.feature_edit import distinct
from steer.features.load import load_dictionary
from steer.files import atomic_write
from steer.model.files_digest import files_digest
from steer.model.precision import AUTO, BF16, FLOAT32, PRECISIONS, settled_precision
from steer.reading import read_json

BASE = "base"  # name of the cell of the model as it is
COMPLETIONS = "experiment.completions."
_SETTLED = Path("config") / "precision.txt"
_JUDGED = ("role", "better", "margin")  # keys of an outcome that say what its values mean, and change none of them
_OUTCOME_KEYS = ("data", *_JUDGED)


class ExperimentConfig:
    """An experiment as its configuration has it.

    What needs no model is checked here, before one is loaded.

    Args:
        values: the configuration of `steer ab` or `steer train`.

    Raises:
        SteerError: of the kind that the faulty part raises.
    """

    def __init__(self, values: DictConfig) -> None:
        complete_keys(values.experiment)
        self.values = values
        self.experiment = values.experiment
        self.seeds = check_seeds(values.seeds)
        self.settings = cast(dict[str, Any], OmegaConf.to_container(values, resolve=True))
        self.precision: str = one_of(self.experiment.precision, PRECISIONS, "experiment.precision")
        spec = self.settings["experiment"]
        arms = read_arms(spec["arms"], trait=spec.get("trait"), scope=spec.get("scope") or "all")
        arms = _with_weights(arms) if self.trains else arms
        most = values.draws
        if most is not None:
            whole_number(most, "draws", least=1)
        if BASE in (arm.name for arm in arms):
            raise _name_of_the_base()
        self.arms = [arm if most is None else replace(arm, draws=min(arm.draws, most)) for arm in arms]
        self.data = DataSet(self.experiment.data)
        self.outcomes = self._read_outcomes(spec["outcomes"])
        asked = self.experiment.completions
        self.prompts = [] if asked is None else texts(asked.prompts)
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
        if self.experiment.completions is not None:
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
        if self.experiment.features is not None:
            self._check_features()

        _ = self.tracked_features

    @cached_property
    def tracked_features(self) -> dict[str, TrackedFeatures]:
        """Features of experiment.drift.features, by name; none without it."""
        drift = self.experiment.drift
        return {} if drift is None else features_to_track(drift.features)

    def _check_features(self) -> None:
        spec = self.settings["experiment"]["features"]
        if bool(spec["chosen"]) == bool(spec["concepts"]):
            raise _chosen_or_found(spec)
        for split in self._development:
            self.data.split(split, ("text",))
        if spec["chosen"]:
            distinct(spec["chosen"], self.dictionary.width)

    @property
    def _development(self) -> list[str]:
        """Splits on which the features of a concept are found."""
        spec = self.settings["experiment"]["features"]
        return [spec["speaking"], spec["neutral"]] if spec and spec["concepts"] else []

    @cached_property
    def dictionary(self) -> Dictionary:
        """Of experiment.features."""
        return load_dictionary(self.experiment.features.dictionary)

    @property
    def trains(self) -> bool:
        """Its arms are fine-tuned; otherwise they act on the base model."""
        return self.experiment.train is not None

    def module(self, model: nn.Module, seed: int) -> SFTModule:
        """The training of a model, as experiment.train has it."""
        spec = self.experiment.train
        kind = ShardedSFTModule if cell_ranks.is_sharded(self.values.trainer) else SFTModule
        return kind(
            model,
            learning_rate=spec.learning_rate,
            warmup_steps=spec.warmup_steps,
            steps=spec.steps,
            schedule=spec.schedule,
            seed=seed,
        )

    # ---- cells

    def settle_precision(self, folders: Sequence[Path]) -> None:
        """Settles `experiment.precision: auto`: as it was in one of these folders, else as this machine is faster."""
        if self.precision != AUTO:
            return
        kept = [known for folder in folders if (known := _settled_in(folder)) is not None]
        if kept:
            self.precision = kept[0]
        elif cell_ranks.world_size() > 1:  # of which each would try for itself
            self.precision = FLOAT32
        else:
            self.precision = settled_precision(AUTO, dtype_named(self.values.model.dtype))

    def keep_precision(self, folder: Path) -> None:
        """Notes what `auto` was settled as, or takes over what another job has noted first; before any cell is named."""
        if self.experiment.precision != AUTO:
            return
        file = folder / _SETTLED
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                atomic_write(file, self.precision + "\n")
            self.precision = _settled_in(folder) or self.precision
        vars(self).pop("_shared_spec", None)

    def cells(self, more_seeds: Sequence[int] = ()) -> list[Cell]:
        """Every cell: the model as it is, and each arm, draw and seed."""
        cells = [Cell(BASE, 0, 0, self._shared_spec)]
        specs = {arm.name: self._spec_of(arm) for arm in self.arms}
        seeds = sorted({*self.seeds, *more_seeds})
        for seed in seeds if self.trains else self.seeds:
            trained: dict[str, Cell] = {}
            for arm in sorted(self.arms, key=lambda arm: arm.uses is not None):
                needs = trained[arm.uses] if self.trains and arm.uses is not None else None
                made = [Cell(arm.name, draw, seed, specs[arm.name], needs) for draw in range(arm.draws)]
                trained[arm.name] = made[0]
                cells += made
        return cells

    def arm_of(self, cell: Cell) -> Arm:
        """The arm of a cell."""
        return next(arm for arm in self.arms if arm.name == cell.arm)

    @cached_property
    def _shared_spec(self) -> dict[str, Any]:
        """What the result of every cell depends on."""
        experiment = self.settings["experiment"]
        outcomes = {name: spec for name, spec in experiment["outcomes"].items() if spec}
        splits = {spec["data"] for spec in outcomes.values() if "data" in spec}
        splits |= {"train"} if self.trains else set()
        splits |= {"contrast"} if experiment["trait"] else set()
        splits |= {"probe"} if experiment["drift"] else set()
        splits |= set(self._development)
        splits |= {split for key, split in (experiment["circuit"] or {}).items() if key != "baseline"}
        read = {key: experiment[key] for key in ("train", "trait", "drift", "completions")}
        for key, idle in (("train", "checkpoint_every"), ("trait", "description")):
            read[key] = {name: value for name, value in read[key].items() if name != idle} if read[key] else None
        measured = {name: {key: value for key, value in spec.items() if key not in _JUDGED} for name, spec in outcomes.items()}
        for outcome in self.outcomes:
            if (code := outcome.metric.code_digest()) is not None:
                measured[outcome.name]["code"] = code
        files = files_digest(self.settings["model"]["name"])
        if experiment["circuit"]:
            read["circuit"] = experiment["circuit"]
        if self.precision != FLOAT32:
            read[MEASURED_IN] = self.precision
        if experiment["features"]:
            read["features"] = {**experiment["features"], "dictionary": self.dictionary.source.sha256()}
        return {
            "model": self.settings["model"] | ({} if files is None else {"files": files}),
            "peft": self.settings["peft"] if self.trains else None,
            "precision": self.settings["trainer"]["precision"] if self.trains else None,
            "data": self.data.digest(*sorted(splits)),
            "outcomes": measured,
            **read,
        }

    def _spec_of(self, arm: Arm) -> dict[str, Any]:
        treatment = {"kind": arm.treatment.name, **arm.treatment.spec()}
        return {**self._shared_spec, "treatment": treatment, "when": arm.when, "control": arm.control_of is not None}


def _settled_in(folder: Path) -> str | None:
    """The precision that a folder holds a note of, or else finished cells."""
    file = folder / _SETTLED
    if file.is_file():
        return one_of(file.read_text(encoding="utf-8").strip(), (FLOAT32, BF16), f"the precision that '{file}' holds")
    done = next(iter(sorted(folder.glob(f"cells/*/{DONE}"))), None)
    return None if done is None else str(read_json(done).get("spec", {}).get(MEASURED_IN, FLOAT32))


def _with_weights(arms: Sequence[Arm]) -> list[Arm]:
    """Arms that do nothing in training, and do not say whose weights they use, use those of the first that does nothing at all."""
    untreated = next((arm.name for arm in arms if arm.when == NEVER), None)
    return [replace(arm, uses=untreated) if arm.when in (INFERENCE, BAKED) and arm.uses is None else arm for arm in arms]


# ---- errors


def _chosen_or_found(spec: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        "experiment.features does not say which features are meant",
        expected="either `chosen`, their numbers, or `concepts`, for one of which a feature is found",
        found="both" if spec["chosen"] else "neither",
        remedy="set experiment.features.chosen=[5,7], or experiment.features.concepts.<name>=[<words>]",
    )


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
