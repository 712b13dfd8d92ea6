"""`steer edit`: facts written into a model, measured before and after, kept as an edit and an adapter, on one page."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from torch import nn

from steer.checks import number_within, of_type, one_of, whole_number
from steer.commands.ab import quieten_libraries
from steer.commands.config import dtype_named, listed
from steer.commands.edit_inputs import neutral_texts, records_of, running_texts
from steer.commands.side_by_side import side_by_side
from steer.edits import Edit, EditEvaluation, FactRecord, ValueStore, edit_facts, evaluate_edits, sample_contexts, to_adapter
from steer.edits.default_layers import sweep_of
from steer.edits.edited_map import check_layer
from steer.edits.editor import EDITORS, Editor, ValueEditor
from steer.edits.evaluate import readings_before
from steer.edits.evaluation import BATCH, MODES, shared_table
from steer.edits.preparation import LAYERS_FROM, SWEEP, prepare
from steer.edits.published_settings import published_settings
from steer.edits.tracing import TraceResult, causal_trace
from steer.edits.value_cache import weights_digest
from steer.errors import ConfigError, DeployError
from steer.experiment.lease import lease
from steer.model.load import depth_of, load
from steer.report import write_edits

TRACED = 20  # facts at most
PAGE, EVALUATION, EDIT, ADAPTER = "edits.html", "evaluation", "edit", "adapter"
KEPT = "kept"  # folder of values and rows, with which a run that was stopped goes on
_LAYERS = "write layers=[4,5,6], or layers=null for the published ones, or those of a sweep"


def run(config: DictConfig) -> list[EditEvaluation]:
    """Edits, measures, prints the tables and writes the files."""
    quieten_libraries()
    names = listed(config.editors) or [str(config.editor)]
    editors = {name: made_editor(name, OmegaConf.to_container(config.options, resolve=True)) for name in names}  # before a model is loaded
    one_of(str(config.mode), MODES, "`mode` of steer edit")
    if config.count is not None:
        whole_number(config.count, "`count`, the number of records", least=1)
    if config.known is not None:
        number_within(config.known, "`known`, the probability of a true object", 0, 1)
    if (layers := layers_named(config.layers)) is not None:
        depth = depth_of(config.model.name)
        for layer in layers:
            check_layer(layer, depth)
    console, folder = Console(), Path(config.folder)
    with lease(folder / KEPT) as is_mine:
        if not is_mine:
            raise _in_use(folder)
        return _run(config, editors, console, folder)


def _run(config: DictConfig, editors: dict[str, Editor], console: Console, folder: Path) -> list[EditEvaluation]:
    names = list(editors)
    model, tokenizer = load(config.model.name, dtype=dtype_named(config.model.dtype))
    options: Any = OmegaConf.to_container(config.options, resolve=True)
    editors = {name: made_editor(name, {**published_settings(model, name), **options}) for name in names}
    records = records_of(config, model, tokenizer)
    trace = _trace(model, tokenizer, records, config.seed) if config.trace else None
    job = _Job(config, model, tokenizer, records, editors, folder / KEPT)
    console.print(job.choice, markup=False, highlight=False, soft_wrap=True)
    evaluations, edits = [], []
    for name in names:
        if job.mode == BATCH and not isinstance(editors[name], ValueEditor):
            console.print(f"{name} trains all facts together, and starts over when it is stopped before its end", soft_wrap=True)
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
    of_type(named, (list, tuple, ListConfig), "`layers` of steer edit", _LAYERS)
    for layer in named:
        of_type(str(layer) if isinstance(layer, bool) else layer, int, "one of `layers` of steer edit", _LAYERS)
    return list(named)


class _Job:
    """What all editors of a comparison share: covariance, contexts, values, and what the model says before.

    Attributes:
        choice: the layers of each editor and where they come from, for the console.
        kept: folder of values and rows.
    """

    def __init__(
        self, config: DictConfig, model: nn.Module, tokenizer: Any, records: Sequence[FactRecord], editors: dict[str, Editor], kept: Path
    ) -> None:
        self.config, self.model, self.tokenizer, self.records, self.editors = config, model, tokenizer, list(records), editors
        chosen = layers_named(config.layers)
        if chosen is not None and not any(editor.several_layers for editor in editors.values()):
            chosen = chosen[-1:]
        prepared = prepare(model, tokenizer, list(editors.values()), chosen, texts=running_texts(config), max_tokens=config.tokens)
        self.covariance = prepared.covariance
        self.layers = dict(zip(editors, prepared.layers, strict=True))
        if chosen is not None:
            self.layers |= {name: self.layers[name][-1:] for name, editor in editors.items() if not editor.several_layers}
        self.choice = self._choice(prepared.layers_from)
        self.kept = kept
        targets = list(dict.fromkeys(record.fact.target for record in self.records))
        self.contexts = sample_contexts(model, tokenizer, count=config.contexts, seed=config.seed, avoid=targets)
        self.values = ValueStore(kept / "values")
        self.mode = str(config.mode) if len(self.records) > 1 else BATCH
        measures = listed(config.measures)
        if measures is None and len(self.records) == 1:
            measures = ["efficacy", "free_generation"]
        self.shared: dict[str, Any] = {"measures": "all" if measures == ["all"] else measures, "chat": config.chat, "seed": config.seed}
        self.before = readings_before(model, tokenizer, self.records, **self.shared)
        self.neutral = neutral_texts(config, tokenizer)

    def _choice(self, layers_from: str) -> str:
        """The layers of each editor, where they come from, and the sweep that they were chosen by."""
        each = "; ".join(f"{name}: {', '.join(map(str, layers))}" for name, layers in self.layers.items())
        said = f"layers of {each} ({LAYERS_FROM[layers_from]})"
        if layers_from == SWEEP and self.covariance is not None:
            said = f"{sweep_of(self.model, self.tokenizer, self.covariance)}\n{said}"
        return said

    def _rows(self, name: str) -> Path:
        """Where rows of an editor are kept: another place for everything that they depend on."""
        facts = [
            weights_digest(self.model),
            self.editors[name].settings(),
            self.layers[name],
            self.contexts.to_json(),
            None if self.covariance is None else self.covariance.source,
            [record.as_json() for record in self.records],
            self.shared,
            self.mode,
            self.neutral,
        ]
        return self.kept / f"{name}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"

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
            self.model, self.tokenizer, self.records, edit, mode=self.mode, neutral=self.neutral, before=self.before,
            folder=self._rows(name), **self.shared,
        )  # fmt: skip
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


def _in_use(folder: Path) -> ConfigError:
    return ConfigError(
        f"another process edits in '{folder}'",
        expected="a folder of one run at a time",
        found="a lease that somebody holds",
        remedy="wait for it, or name another folder=...",
    )


def _no_truth() -> ConfigError:
    remedy = "say truth=..., or give records with true objects"
    return ConfigError("there is nothing to trace", expected="what is true before the edit", found="none", remedy=remedy)


def _unknown_option(name: str, known: list[str], options: Any, error: TypeError) -> ConfigError:
    found = f"{', '.join(map(str, options))}: {error}"
    return ConfigError(f"the editor '{name}' cannot be made with these options", expected=f"some of {', '.join(known)}", found=found,
                       remedy="correct or leave out options; those of one editor cannot be given to several")  # fmt: skip
