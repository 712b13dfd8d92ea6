"""evaluate_edits: edits made one at a time, as one batch or in sequence, and measured before and after."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from steer.checks import of_type, one_of
from steer.edits.base_modules import weight_modules, weight_of
from steer.edits.contexts import Contexts
from steer.edits.covariance import Covariance
from steer.edits.edit import Edit
from steer.edits.edit_facts import edit_facts, editor_of
from steer.edits.edited_weights import EditedWeights
from steer.edits.editor import Editor
from steer.edits.evaluation import BATCH, MODES, SEQUENCE, SINGLE, EditEvaluation, EditRow
from steer.edits.evaluation_store import EvaluationStore
from steer.edits.fact import Fact
from steer.edits.guards import Guards
from steer.edits.key_source import tokenizer_digest
from steer.edits.measure import SHARE, Readings, measures_of
from steer.edits.preparation import prepare
from steer.edits.readings import EditReader
from steer.edits.record import FactRecord, record_of, without_edited_subjects
from steer.edits.value_cache import spent_before, weights_digest
from steer.errors import ConfigError, EditError, NonFiniteError
from steer.model.devices import without_autocast
from steer.model.load import tokenizer_of
from steer.model.restoring import restoring
from steer.model.text_loss import LossChange, TextLosses, loss_change, text_losses
from steer.model.tokens import Row, plain

EditFunction = Callable[[nn.Module, Any, Sequence[Fact]], Edit]


@without_autocast
def evaluate_edits(
    model: nn.Module,
    tokenizer: Any,
    records: FactRecord | Fact | Sequence[FactRecord | Fact],
    edit: str | Editor | Edit | EditFunction = "memit",
    *,
    mode: str = SINGLE,
    measures: Sequence[str] | str | None = None,
    neutral: Sequence[str] = (),
    chat: bool = False,
    before: Readings | None = None,
    folder: str | Path | None = None,
    max_tokens: int = 1024,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> EditEvaluation:
    """Edits facts and measures what that did; the model is left as it was.

    Args:
        model: edits that are on it stay, and belong to what is measured before.
        tokenizer: None for the one that came with the model.
        records: one or many facts, with the prompts that they are measured on; see `load_records`.
        edit: an editor or its name; a function (model, tokenizer, facts) -> Edit; or an edit that was made of these facts, as one batch.
        mode: `single`, each fact alone and undone; `batch`, all in one edit; `sequence`, one after the other, all measured once more on the
            final weights.
        measures: names of `EDIT_MEASURES`, or `all`; None for those that need no generation.
        neutral: texts that no edit is about, whose loss should stay.
        chat: prompts are put through the chat template as messages of a user.
        before: what `readings_before` gave for the same records and measures, where several editors are compared.
        folder: rows of `single` and `sequence` are kept there as they are measured, and not measured again.
        max_tokens: padded tokens of a batch.
        seed: of texts that are written by chance.
        progress: a bar where the output is a terminal.
        options: of `edit_facts`, such as `layers` and `covariance`.

    In a batch and a sequence, neighbours that are about a subject of another edit are left out, since these edits change them.

    Raises:
        ConfigError: an unknown mode, measure or editor; a folder of another evaluation; options beside an edit that is made already.
        Otherwise as `edit_facts`; but a fact that cannot be edited in `single` and `sequence`, or whose edit leaves a model that gives no
        finite numbers, is recorded with its reason. Such an edit is taken out, and none of what it should have done counts as done.

    Example:
        >>> print(steer.edits.evaluate_edits(model, tokenizer, records, "rome", layers=[8], covariance=covariance, contexts=contexts))
    """
    one_of(mode, MODES, "`mode` of an evaluation of edits")
    records = [records] if isinstance(records, FactRecord | Fact) else records
    of_type(neutral, (list, tuple), "the neutral texts of an evaluation of edits", "pass a list of texts")
    of_type(records, (list, tuple), "the records of an evaluation of edits", "pass what steer.edits.load_records gives, or facts")
    tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
    if isinstance(edit, str | Editor):  # once, not for every fact
        prepared = prepare(model, tokenizer, [editor_of(edit, model)], options.get("layers"), options.get("covariance"))
        options |= {"layers": prepared.layers[0], "covariance": prepared.covariance}
    reader = EditReader(model, tokenizer, measures_of(measures), chat=chat, max_tokens=max_tokens, seed=seed, progress=False)
    texts = [plain(tokenizer, text) for text in neutral]
    run = _Run(reader, tokenizer, [record_of(record) for record in records], edit, mode, options, texts, folder, progress)
    return {SINGLE: run.single, BATCH: run.batch, SEQUENCE: run.sequence}[mode](before)


@without_autocast
def readings_before(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[FactRecord | Fact],
    *,
    measures: Sequence[str] | str | None = None,
    chat: bool = False,
    max_tokens: int = 1024,
    seed: int = 0,
    progress: bool = True,
) -> Readings:
    """What a model says before any edit, to be handed to `evaluate_edits` for several editors. Arguments as there.

    Args:
        records, measures, chat: as of `evaluate_edits`.

    Example:
        >>> before = steer.edits.readings_before(model, tokenizer, records)
        >>> how = {"layers": [8], "covariance": covariance, "contexts": contexts}
        >>> evaluated = steer.edits.evaluate_edits(model, tokenizer, records, "rome", before=before, **how)
    """
    reader = EditReader(model, tokenizer, measures_of(measures), chat=chat, max_tokens=max_tokens, seed=seed, progress=progress)
    return reader.read([record_of(record) for record in records], what="before the edit")


class _Run:
    """One evaluation under way.

    Attributes:
        neutral: texts that no edit is about.
        options: of the editor.
        store: where rows are kept; None where they are not.
    """

    def __init__(
        self,
        reader: EditReader,
        tokenizer: Any,
        records: list[FactRecord],
        edit: str | Editor | Edit | EditFunction,
        mode: str,
        options: dict[str, Any],
        neutral: list[Row],
        folder: str | Path | None,
        progress: bool,
    ) -> None:
        if not records:
            raise _no_records()
        self.reader, self.model, self.tokenizer = reader, reader.model, tokenizer
        self.records, left_out = (records, 0) if mode == SINGLE else without_edited_subjects(records)
        self.mode, self.neutral, self.progress = mode, neutral, progress
        self.editor, self.make = _editing(edit, mode, options)
        self.options = options
        self.facts = {
            "model": type(self.model).__name__,
            "chat": reader.scorer.chat,
            "seed": reader.seed,
            "neutral_texts": len(neutral),
            "neighbours_left_out": left_out,
            "options": {name: _told(value) for name, value in options.items()},
            "settings": editor_of(edit, self.model).settings() if isinstance(edit, str | Editor) else {},
        }
        self.store = None if folder is None or mode == BATCH else EvaluationStore(folder, self._identity())

    def _identity(self) -> dict[str, Any]:
        """What rows depend on, as far as it can be told; an editing function by its name."""
        return {
            **self.facts,
            "weights": weights_digest(self.model),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "editor": self.editor,
            "mode": self.mode,
            "measures": [measure.name for measure in self.reader.measures],
            "records": [record.as_json() for record in self.records],
            "neutral": [row.ids for row in self.neutral],
            "options": {name: _known_by(value) for name, value in self.options.items() if name not in _OF_THE_WORK},
        }

    # ---- modes

    def single(self, before: Readings | None) -> EditEvaluation:
        rows = list(self.store.rows) if self.store is not None else []
        left = self.records[len(rows) :]
        before = self._before(before, left)
        losses = self._losses() if left else None
        with self._bar(len(self.records), len(rows)) as bar:
            for record in left:
                row, edit = self._edited(record, before)
                if edit is not None:
                    try:
                        with edit.applied(self.model):
                            row = self._measured(row, record, before)
                            if losses is not None:
                                row = replace(row, neutral=self._change(losses).value)
                    except NonFiniteError as error:
                        row = self._broken(row, error)
                rows.append(row)
                if self.store is not None:
                    self.store.add(row)
                bar.update(1)
        return self._evaluation(rows, None)

    def batch(self, before: Readings | None) -> EditEvaluation:
        before, losses = self._before(before, self.records), self._losses()
        edit, seconds = self._timed([record.fact for record in self.records])
        with edit.applied(self.model):
            seen = self.reader.read(self.records)
            change = None if losses is None else self._change(losses)
        sizes = self._size(edit)
        rows = []
        for record in self.records:
            row = self._row(record, before, seconds / len(self.records), sizes)
            rows.append(self._with_after(row, record, seen, before))
        return self._evaluation(rows, change)

    def sequence(self, before: Readings | None) -> EditEvaluation:
        before, losses = self._before(before, self.records), self._losses()
        edited = EditedWeights.of(self.model)
        there = {edit.name for edit in edited.applied}
        rows = list(self.store.rows) if self.store is not None else []

        def put_back() -> None:
            if made := [edit for edit in edited.applied if edit.name not in there]:
                edited.revert(*made)

        with restoring(put_back), self._bar(len(self.records), len(rows)) as bar:
            if rows and self.store is not None:
                edited.apply(*self.store.edits())  # in one step: one after the other, each adds up all before it anew
            for record in self.records[len(rows) :]:
                row, edit = self._edited(record, before)
                if edit is not None:
                    edit = edit.named(f"{edit.name}-{len(rows)}")  # the same edit twice is two edits
                    try:
                        edited.apply(edit)
                        row = self._measured(row, record, before)
                    except NonFiniteError as error:
                        row = self._broken(row, error)
                        if edit in edited.applied:
                            edited.revert(edit)
                        edit = None
                if self.store is not None:
                    self.store.add(row) if edit is None else self.store.add_edit(row, edit)
                rows.append(row)
                bar.update(1)
            seen = self.reader.read(self.records)
            change = None if losses is None else self._change(losses)
        pairs = zip(rows, self.records, strict=True)
        return self._evaluation([replace(row, final=self.reader.values(record, seen, before)) for row, record in pairs], change)

    # ---- parts

    def _before(self, before: Readings | None, records: list[FactRecord]) -> Readings:
        if before is not None:
            return before
        return self.reader.read(records, what="before the edit")

    def _losses(self) -> TextLosses | None:
        return text_losses(self.model, self.neutral, max_tokens=self.reader.max_tokens) if self.neutral else None

    def _change(self, before: TextLosses) -> LossChange:
        return loss_change(before, text_losses(self.model, self.neutral, max_tokens=self.reader.max_tokens))

    def _timed(self, facts: list[Fact]) -> tuple[Edit, float]:
        start = time.process_time()
        with spent_before() as earlier:
            edit = self.make(self.model, self.tokenizer, facts)
        of_type(edit, Edit, "what an editing function gives", "return an Edit, as steer.edit_facts makes it")
        return edit, time.process_time() - start + earlier.seconds

    def _edited(self, record: FactRecord, before: Readings) -> tuple[EditRow, Edit | None]:
        """The row of a fact with nothing measured after yet, and its edit; None and the reason where there can be none."""
        try:
            edit, seconds = self._timed([record.fact])
        except (EditError, NonFiniteError) as error:
            row = self._row(record, before, 0.0, 0.0)
            return replace(row, after=row.before, problem=str(error.what)), None
        return self._row(record, before, seconds, self._size(edit)), edit

    def _broken(self, row: EditRow, error: NonFiniteError) -> EditRow:
        """The row of an edit that was taken out, since the model with it gives no numbers: none of what is counted as a share."""
        shares = {column.name: 0.0 for measure in self.reader.measures for column in measure.columns if column.unit == SHARE}
        return replace(row, after={name: value for name, value in shares.items() if name in row.before}, problem=str(error.what))

    def _row(self, record: FactRecord, before: Readings, seconds: float, change: float) -> EditRow:
        fact = record.fact
        values = self.reader.values(record, before)
        written = {"before": before.greedy[fact.prompt]} if fact.prompt in before.greedy else {}
        return EditRow(record.name, fact.prompt, fact.subject, fact.target, fact.true, values, {}, seconds=seconds, change=change,
                       written=written)  # fmt: skip

    def _measured(self, row: EditRow, record: FactRecord, before: Readings) -> EditRow:
        return self._with_after(row, record, self.reader.read([record]), before)

    def _with_after(self, row: EditRow, record: FactRecord, seen: Readings, before: Readings) -> EditRow:
        written = {**row.written, "after": seen.greedy[record.fact.prompt]} if record.fact.prompt in seen.greedy else row.written
        return replace(row, after=self.reader.values(record, seen, before), written=written)

    def _size(self, edit: Edit) -> float:
        """Largest |dW| / |W| of the matrices of an edit."""
        modules = weight_modules(EditedWeights.of(self.model).model) if edit.deltas else {}
        weights = {delta.path: weight_of(modules[delta.path]) for delta in edit.deltas if delta.path in modules}
        return max((delta.norm / float(weight.detach().float().norm()) for delta in edit.deltas
                    if (weight := weights.get(delta.path)) is not None), default=0.0)  # fmt: skip

    @contextmanager
    def _bar(self, total: int, done: int) -> Iterator[Any]:
        with tqdm(total=total, initial=done, desc=f"{self.editor}, {self.mode}", disable=None if self.progress else True) as bar:
            yield bar

    def _evaluation(self, rows: Sequence[EditRow], change: LossChange | None) -> EditEvaluation:
        neutral = None if change is None else change.as_facts()
        measures = tuple(measure.name for measure in self.reader.measures)
        return EditEvaluation(self.mode, self.editor, measures, tuple(rows), neutral, self.facts)


def _editing(edit: Any, mode: str, options: dict[str, Any]) -> tuple[str, EditFunction]:
    """Name of the method, and what makes the edits."""
    if isinstance(edit, str | Editor):
        return edit if isinstance(edit, str) else edit.name, partial(edit_facts, editor=edit, **options)
    if isinstance(edit, Edit):
        if mode != BATCH or options:
            raise _made_already(edit, mode, options)
        return edit.editor, lambda model, tokenizer, facts: edit
    if not callable(edit):
        of_type(edit, (str, Editor, Edit), "what edits the facts", "pass an editor or its name, an edit, or a function that makes one")
    return getattr(edit, "__name__", type(edit).__name__), partial(edit, **options)


def _told(value: Any) -> Any:
    """An option of an editor as JSON; what JSON cannot hold by its type."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return type(value).__name__


def _known_by(value: Any) -> Any:
    """An option of an editor as what tells it from others."""
    if isinstance(value, Contexts):
        return value.to_json()
    if isinstance(value, Guards):
        return asdict(value)
    if isinstance(value, Covariance):
        return [value.source, value.tokens]
    return _told(value)


_OF_THE_WORK = ("values", "progress")  # options on which no number depends


# ---- errors


def _no_records() -> ConfigError:
    return ConfigError("there is nothing to evaluate", expected="at least one record", found="none", remedy="pass records or facts")


def _made_already(edit: Edit, mode: str, options: dict[str, Any]) -> ConfigError:
    found = f"mode '{mode}'" + (f" and {', '.join(options)}" if options else "")
    remedy = "pass mode='batch' alone, or the name of an editor, which makes an edit of each fact"
    return ConfigError(f"{edit!r} is made already", expected="mode 'batch', and no options of an editor", found=found, remedy=remedy)
