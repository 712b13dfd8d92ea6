"""What the cells of an experiment share: model, adapters, tokenised texts, treatments and their random partners."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from steer.commands import cell_ranks
from steer.commands.config import dtype_named
from steer.commands.experiment_config import ExperimentConfig
from steer.commands.train_checks import lora_config, tracked_sites
from steer.directions import ContrastSet, Direction, Directions, extract
from steer.drift.tracker import DriftTracker
from steer.experiment.complete import complete
from steer.experiment.experiment_features import ExperimentFeatures
from steer.experiment.metrics.concept_probability import ConceptProbability
from steer.experiment.outcome import prepare_all, texts_of
from steer.experiment.projections import mean_projection, token_projections
from steer.experiment.pronoun_circuits import PronounCircuits
from steer.experiment.sft import loader
from steer.experiment.treatment import Bench, Treatment
from steer.model.anatomy import Anatomy
from steer.model.devices import input_device
from steer.model.load import load
from steer.model.precision import products_in
from steer.model.tokens import Row, encode, pad_id


class ExperimentRun:
    """An experiment at work: its model, and what is made with it once for all cells, each when it is first asked for.

    Args:
        config: what is asked for.
        root: the folder of the experiment; cells lie in `cells`.
    """

    def __init__(self, config: ExperimentConfig, root: Path) -> None:
        self.config = config
        self.config.settle_precision([root, *map(Path, config.values.get("folders") or ())])
        self.root = root
        self.console = Console(quiet=not cell_ranks.is_first())

    def say(self, step: str, text: str) -> None:
        """Prints what is being done."""
        self.console.print(f"[bold]{step:>10}[/]  {text}")

    # ---- the model and what is made of it

    @cached_property
    def loaded(self) -> tuple[nn.Module, Any]:
        self.say("model", f"loading {self.config.values.model.name}")
        return load(self.config.values.model.name, dtype=dtype_named(self.config.values.model.dtype))

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
        trait = self.config.experiment.trait
        if trait is None:
            return None
        contrast = ContrastSet.from_pairs(self.tokenizer, self.config.data.split("contrast"))
        directions = extract(
            self.model, contrast, list(trait.sites), name=trait.name, method=trait.method, span=trait.span, holdout=trait.holdout
        )
        chosen = self.chosen_of(directions)
        judged = "unseen groups" if chosen.held_out == "groups" else "held-out texts"
        quality = (
            f"AUC {chosen.metrics['auc']:.3f} on {judged}, |v| {chosen.metrics['gap']:.2f}, relative dose {chosen.relative_dose():.2f}"
        )
        self.say("direction", f"{trait.name} at {chosen.site}: {quality}")
        return directions

    def chosen_of(self, directions: Directions) -> Direction:
        """The direction that is used where a plan names no site."""
        site = self.config.experiment.trait.site
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
            "held_out": chosen.held_out,
            "norm": chosen.metrics["gap"],
            "relative_dose": chosen.relative_dose(),
        }

    @cached_property
    def bench(self) -> Bench:
        """What treatments are made from."""
        directions: dict[str, Directions] = {}
        if self.directions is not None:
            directions[self.directions.name] = _Placed(self.directions, self.chosen_of(self.directions))
        return Bench(self.model, self.tokenizer, self.measured_rows, directions, self.anatomy.fingerprint(), self.features, self.circuits)

    @cached_property
    def features(self) -> ExperimentFeatures | None:
        """What arms of the treatment `feature` edit: chosen by number, or found on development text."""
        spec = self.config.settings["experiment"]["features"]
        if spec is None:
            return None
        if spec["chosen"]:
            return ExperimentFeatures(self.model, self.config.dictionary, spec["chosen"])
        concepts = {name: words for name, words in spec["concepts"].items() if words}  # null leaves one out
        self.say("features", f"of {len(concepts)} concepts are looked for on development text")
        speaking, neutral = ([row["text"] for row in self.config.data.split(spec[key])] for key in ("speaking", "neutral"))
        options = {key: spec[key] for key in ("rank", "candidates", "damage")}
        found = ExperimentFeatures.found(self.model, self.tokenizer, self.config.dictionary, concepts, speaking, neutral, **options)
        for rank, concept in enumerate(found.tried, 1):
            mark = " (this experiment)" if rank == spec["rank"] else ""
            factor = "" if concept.effect is None else f", {math.exp(concept.effect):.3g} x"
            self.say("tried", f"{concept.name}: feature {concept.feature}{factor}{mark}")
        return found

    @cached_property
    def circuits(self) -> PronounCircuits | None:
        """What arms of the treatment `circuit` ablate, kept in the folder of the experiment."""
        spec = self.config.settings["experiment"]["circuit"]
        if spec is None:
            return None
        splits = {key: split for key, split in spec.items() if key != "baseline"}
        return PronounCircuits(
            self.model,
            self.tokenizer,
            self.config.data,
            splits,
            spec["baseline"],
            self.root / "circuits",
            lambda text: self.say("circuit", text),
            self.config.precision,
        )

    @cached_property
    def measured_rows(self) -> list[Row]:
        """Texts of the outcomes, on which the sizes of edits are measured."""
        return texts_of(self.config.outcomes, self.tokenizer)

    @cached_property
    def treatments(self) -> dict[str, list[Treatment]]:
        """Of every arm, one for each draw of a control; matched to what it controls."""
        return {arm.name: arm.treatments(self.bench) for arm in self.config.arms}

    def prepare(self) -> None:
        """Makes all that the cells need, so that faults are found before the first of them runs."""
        if self.config.trains:
            self.lora = lora_config(self.anatomy, self.config.values.peft)
            self.batches(self.training_rows(None), self.config.seeds[0])  # raises for a prompt that is too long
        self.tracked = [] if self.config.experiment.drift is None else tracked_sites(self.anatomy, self.config.experiment)
        for outcome in self.config.outcomes:
            if isinstance(outcome.metric, ConceptProbability) and self.features is not None and self.features.concept is not None:
                outcome.metric.choose(list(self.features.concept.words))
        _ = self.treatments  # matched to what they control
        with products_in(self.config.precision, input_device(self.model)):  # as the arms are measured
            if self.directions is not None:
                _ = self.neutral_projection  # of the base, before an arm acts
            prepare_all(self.config.outcomes, self.model, self.tokenizer)

    # ---- training

    def training_rows(self, treatment: Treatment | None) -> list[Row]:
        """The rows that an arm is trained on."""
        rows: Sequence[Mapping[str, Any]] = self.config.data.split("train")
        if treatment is not None:
            rows = treatment.training_rows(rows)
        return [encode(self.tokenizer, row["prompt"], row["answer"], system=row.get("system")) for row in rows]

    def batches(self, rows: list[Row], seed: int, first: int = 0) -> DataLoader[Any]:
        """The batches of a seed, the same for every arm."""
        spec = self.config.experiment.train
        return loader(rows, batch_size=spec.batch_size, pad=self.pad, seed=seed, max_length=spec.max_length, steps=spec.steps, first=first)

    def tracker(self, store: Path | None, seed: int) -> DriftTracker | None:
        """A tracker of the trait direction at the sites of experiment.drift."""
        if self.directions is None or not self.tracked:
            return None
        drift = self.config.experiment.drift
        watched = {self.directions.name: [self.directions[site] for site in self.tracked]}
        probe = [encode(self.tokenizer, row["prompt"]) for row in self.config.data.split("probe")]
        options = {"controls": drift.controls, "stream": drift.stream, "store": store, "seed": seed}
        return DriftTracker(watched, features=self.config.tracked_features, probe=probe, **options)

    @cached_property
    def neutral_projection(self) -> float:
        """Mean projection of the experiment's texts on the trait direction, on the base model."""
        assert self.directions is not None
        return mean_projection(self.model, self.chosen_of(self.directions), self.measured_rows)

    def completions(self, model: nn.Module, system: str | None) -> list[dict[str, Any]]:
        """What a model says to the prompts of the experiment, and where in it the trait is."""
        if not self.config.prompts:
            return []
        asked: list[Any] = [{"prompt": prompt, "system": system} for prompt in self.config.prompts]
        answers = complete(model, self.tokenizer, asked, max_new_tokens=self.config.experiment.completions.max_new_tokens)
        said: list[dict[str, Any]] = [{"prompt": prompt, "text": text} for prompt, text in zip(self.config.prompts, answers, strict=True)]
        if self.directions is not None:
            chosen = self.chosen_of(self.directions)
            tokens = token_projections(model, self.tokenizer, chosen, self.neutral_projection, asked, answers)
            said = [{**answer, "tokens": of_answer} for answer, of_answer in zip(said, tokens, strict=True)]
        return said


class _Placed(Directions):
    """Directions of which a plan that names no site means that of experiment.trait.site."""

    def __init__(self, directions: Directions, chosen: Direction) -> None:
        super().__init__(list(directions.entries.values()), directions.name, directions.provenance)
        self.chosen = chosen

    def best(self) -> Direction:
        return self.chosen
