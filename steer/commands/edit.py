"""`steer edit`: facts written into a model, measured before and after, kept as an edit and an adapter, on one page."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from torch import nn

from steer.checks import of_type, one_of
from steer.commands.ab import quieten_libraries
from steer.commands.config import dtype_named, listed
from steer.commands.edit_inputs import neutral_texts, records_of, running_texts
from steer.commands.side_by_side import side_by_side
from steer.edits import Covariance, Edit, EditEvaluation, FactRecord, ValueStore, edit_facts, evaluate_edits, sample_contexts, to_adapter
from steer.edits.default_layers import default_layers
from steer.edits.editor import EDITORS, Editor
from steer.edits.evaluate import readings_before
from steer.edits.evaluation import BATCH, MODES, shared_table
from steer.edits.tracing import TraceResult, causal_trace
from steer.errors import ConfigError, DeployError
from steer.model.anatomy import Anatomy
from steer.model.load import load
from steer.report import write_edits

TRACED = 20  # facts at most
PAGE, EVALUATION, EDIT, ADAPTER = "edits.html", "evaluation", "edit", "adapter"


def run(config: DictConfig) -> list[EditEvaluation]:
    """Edits, measures, prints the tables and writes the files."""
    quieten_libraries()
    names = listed(config.editors) or [str(config.editor)]
    editors = {name: made_editor(name, OmegaConf.to_container(config.options, resolve=True)) for name in names}
    one_of(str(config.mode), MODES, "`mode` of steer edit")
    layers_named(config.layers)
    model, tokenizer = load(config.model.name, dtype=dtype_named(config.model.dtype))
    records = records_of(config, model, tokenizer)
    console, folder = Console(), Path(config.folder)
    trace = _trace(model, tokenizer, records, config.seed) if config.trace else None
    job = _Job(config, model, tokenizer, records, editors)
    evaluations, edits = [], []
    for name in names:
        found, made = job.evaluated(name)
        ending = "" if len(names) == 1 else f"-{name}"
        found.save(folder / f"{EVALUATION}{ending}.json")
        console.print(found)
        evaluations.append(found)
        if made is not None:
            edits.append(made)
            made.save(folder / f"{EDIT}{ending}")
            _write_adapter(made, model, folder / f"{ADAPTER}{ending}", console)
    if len(names) > 1:
        console.print(shared_table(evaluations))
    if len(records) == 1:
        _print_continuations(console, evaluations)
    page = write_edits(folder / PAGE, evaluations, edits=edits, trace=trace, facts={"Weights": str(config.model.name)})
    console.print(f"page, evaluations and edits in {folder}: {page.name}", soft_wrap=True)
    return evaluations


def made_editor(name: str, options: Any) -> Editor:
    """The editor of that name with its options. Raises ConfigError."""
    editor = EDITORS.get(name)
    try:
        return editor(**options)
    except TypeError as error:
        raise _unknown_option(name, list(inspect.signature(editor).parameters), options, error) from error


def layers_named(layers: Any) -> list[int] | None:
    """The layers of a configuration: one number, several, or null. Raises ConfigError for anything else."""
    if layers is None:
        return None
    named = [layers] if isinstance(layers, int) else layers
    of_type(named, (list, tuple, ListConfig), "`layers` of steer edit", "write layers=[4,5,6], or layers=null for the published ones")
    for layer in named:
        of_type(layer, int, "one of `layers` of steer edit", "write layers=[4,5,6], or layers=null for the published ones")
    return list(named)


class _Job:
    """What all editors of a comparison share: covariance, contexts, values, and what the model says before."""

    def __init__(
        self, config: DictConfig, model: nn.Module, tokenizer: Any, records: Sequence[FactRecord], editors: dict[str, Editor]
    ) -> None:
        self.config, self.model, self.tokenizer, self.records, self.editors = config, model, tokenizer, list(records), editors
        anatomy = Anatomy.find(model)
        chosen = layers_named(config.layers)
        self.layers = {
            name: default_layers(anatomy, several=editor.several_layers) if chosen is None else chosen for name, editor in editors.items()
        }
        if chosen is not None and len(chosen) > 1:
            self.layers |= {name: chosen[-1:] for name, editor in editors.items() if not editor.several_layers}
        targets = list(dict.fromkeys(record.fact.target for record in self.records))
        self.contexts = sample_contexts(model, tokenizer, count=config.contexts, seed=config.seed, avoid=targets)
        needing = sorted({layer for name, editor in editors.items() if editor.needs_covariance for layer in self.layers[name]})
        self.covariance = Covariance.fit(model, tokenizer, running_texts(config), needing, max_tokens=config.tokens) if needing else None
        self.values = ValueStore()
        self.mode = str(config.mode) if len(self.records) > 1 else BATCH
        measures = listed(config.measures)
        if measures is None and len(self.records) == 1:
            measures = ["efficacy", "free_generation"]
        self.shared: dict[str, Any] = {"measures": "all" if measures == ["all"] else measures, "chat": config.chat, "seed": config.seed}
        self.before = readings_before(model, tokenizer, self.records, **self.shared)
        self.neutral = neutral_texts(config, tokenizer)

    def evaluated(self, name: str) -> tuple[EditEvaluation, Edit | None]:
        """What an editor did, and the edit where all facts are one."""
        made: list[Edit] = []

        def edit(model: nn.Module, tokenizer: Any, facts: Any) -> Edit:
            made.append(
                edit_facts(model, tokenizer, facts, editor=self.editors[name], layers=self.layers[name], covariance=self.covariance,
                           contexts=self.contexts, values=self.values)
            )  # fmt: skip
            return made[-1]

        edit.__name__ = name
        found = evaluate_edits(
            self.model, self.tokenizer, self.records, edit, mode=self.mode, neutral=self.neutral, before=self.before, **self.shared
        )
        return found, made[0] if self.mode == BATCH else None


def _trace(model: nn.Module, tokenizer: Any, records: Sequence[FactRecord], seed: int) -> TraceResult:
    """Of what is true before the edit. Raises ConfigError where nobody says what that is."""
    true = [record.fact for record in records if record.fact.true is not None]
    if not true:
        raise _no_truth()
    return causal_trace(model, tokenizer, true, count=TRACED, seed=seed)


def _write_adapter(edit: Edit, model: nn.Module, folder: Path, console: Console) -> None:
    if not edit.deltas:
        console.print(f"{edit.name} changes nothing, and has no adapter", markup=False)
        return
    try:
        to_adapter(edit, model, folder)
    except DeployError as error:  # an edit of as high a rank as its matrices is no smaller as an adapter
        console.print(f"no adapter of {edit.name}: {error}", soft_wrap=True, markup=False)


def _print_continuations(console: Console, evaluations: Sequence[EditEvaluation]) -> None:
    rows = [found.rows[0] for found in evaluations]
    if all(row.written for row in rows):
        answers = {"before": [rows[0].written["before"]]}
        answers |= {found.editor: [row.written["after"]] for found, row in zip(evaluations, rows, strict=True)}
        side_by_side(console, [rows[0].prompt], answers)


# ---- errors


def _no_truth() -> ConfigError:
    remedy = "say truth=..., or give records with true objects"
    return ConfigError("there is nothing to trace", expected="what is true before the edit", found="none", remedy=remedy)


def _unknown_option(name: str, known: list[str], options: Any, error: TypeError) -> ConfigError:
    found = f"{', '.join(map(str, options))}: {error}"
    return ConfigError(f"the editor '{name}' cannot be made with these options", expected=f"some of {', '.join(known)}", found=found,
                       remedy="correct or leave out options; those of one editor cannot be given to several")  # fmt: skip
