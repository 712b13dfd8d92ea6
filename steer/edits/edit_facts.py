"""Editing facts: from a model and what it shall say to an `Edit`, which changes the model only when it is applied."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import nn

from steer.checks import of_type
from steer.edits.contexts import Contexts, FirstTokenSubjectWarning, SubjectTokenWarning, sample_contexts
from steer.edits.covariance import Covariance
from steer.edits.edit import Edit
from steer.edits.editor import EDITORS, EditBench, Editor, Solution
from steer.edits.fact import Fact, distinct_facts
from steer.edits.guards import GuardReading, Guards, NeutralTexts, heed, read_guards
from steer.edits.locate import check_known, target_ids
from steer.edits.make_edit import make_edit
from steer.edits.preparation import GIVEN, SHIPPED_TEXT, prepare
from steer.edits.published_settings import published_settings
from steer.edits.value_cache import ValueStore
from steer.errors import GuardError
from steer.model.capture import check_vocabulary
from steer.model.devices import without_autocast
from steer.model.tokens import Row

log = logging.getLogger(__name__)


@torch.inference_mode(False)  # values are found by gradients
@without_autocast
def edit_facts(
    model: nn.Module,
    tokenizer: Any,
    facts: Fact | Sequence[Fact],
    *,
    editor: str | Editor = "memit",
    layers: Sequence[int] | None = None,
    covariance: Covariance | None = None,
    contexts: Contexts | None = None,
    guards: Guards | None = None,
    values: ValueStore | None = None,
    name: str = "",
    progress: str | None = None,
) -> Edit:
    """Works out the change of weights that makes a model say facts. The model itself is left as it was: apply the edit to change it.

    A fact that the model says already needs no change: it is named in `edit.provenance["no_op"]`, and an edit of such facts alone has rank
    0. One for which no value was found is in "not_found", with a warning, and is not written either. What the edit of each fact would do to
    the rest of the model is in `edit.provenance["readings"]`.

    Args:
        model: with the edits that are in its weights; an edit on top of others is solved for what they left.
        facts: one or many, with different prompts.
        editor: a name of `EDITORS`, with the settings that were published for the model where there are some
            (`steer.edits.published_settings`), or one with settings of your own: `MEMIT(ridge=500.0)`.
        layers: to be edited. None for those of the publications, or that were measured, where the model is one of these; else the layers of
            the covariance are tried out on a few facts, once for a model, see `steer.edits.layer_sweep`. Where they come from is in
            `edit.provenance["layers_from"]`.
        covariance: of the keys of ordinary text, at these layers, which all editors with a closed form need. None fits it on text that
            ships with the library, once for a model: minutes, with a bar; then it is read from the cache folder. Where it
            comes from, and of how many tokens it is, stands in `edit.provenance["covariance"]`.
        contexts: before the prompts; None draws five from the model, which no target is in.
        guards: None warns of a change that moves the outputs of a layer by more than a quarter.
        values: a store that several calls share, to compare editors.
        name: of the edit; the editor and a digest when empty.
        progress: label of the progress bar, None for none.

    Raises:
        EditError: no facts, layers that cannot be edited, or a system that cannot be solved. ConflictingEditsError: two targets for one
            prompt. GuardError: a limit is passed, or no fact is left. WrongModelError: the covariance of another model.
        NonFiniteError: a value. SubjectNotFoundError, TokenizerError, ConfigError.

    Example:
        >>> fact = steer.Fact.of("The mother tongue of {} is", "Danielle Darrieux", "English")
        >>> covariance = Covariance.fit(model, tokenizer, texts, layers=[7, 8])
        >>> edit = steer.edit_facts(model, tokenizer, fact, editor="memit", layers=[7, 8], covariance=covariance)
        >>> with edit.applied(model):
        ...     model.generate(**prompt, max_new_tokens=2)
    """
    chosen = distinct_facts([facts] if isinstance(facts, Fact) else facts)
    method = editor_of(editor, model)
    bench = bench_for(model, tokenizer, chosen, method, layers, covariance, contexts, values, progress)
    of_type(guards, (Guards, NoneType), "the guards of an edit", "pass steer.edits.Guards(drift=0.3)")
    guards = guards or Guards()
    neutral = NeutralTexts(bench, guards.neutral_texts) if guards.neutral_texts else None
    return solve_edit(bench, method, chosen, guards, neutral, name)


def bench_for(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    method: Editor,
    layers: Sequence[int] | None,
    covariance: Covariance | None,
    contexts: Contexts | None,
    values: ValueStore | None,
    progress: str | None,
) -> EditBench:
    """What the facts are edited with: arguments as of `edit_facts`, those left out filled in, the covariance checked."""
    of_type(contexts, (Contexts, NoneType), "the contexts of an edit", "pass steer.edits.Contexts(('It rains.',)), or leave them out")
    of_type(covariance, (Covariance, NoneType), "the covariance of an edit", "pass Covariance.fit(model, tokenizer, texts, layers)")
    prepared = prepare(model, tokenizer, [method], layers, covariance)
    contexts = sample_contexts(model, tokenizer, avoid=[fact.target for fact in facts]) if contexts is None else contexts
    bench = EditBench(
        model, tokenizer, prepared.layers[0], contexts, covariance=prepared.covariance, values=values, progress=progress,
        layers_from=prepared.layers_from, covariance_from=SHIPPED_TEXT if covariance is None else GIVEN,
    )  # fmt: skip
    if prepared.covariance is not None:
        prepared.covariance.check(model, bench.layers, tokenizer)
    return bench


def solve_edit(bench: EditBench, method: Editor, facts: Sequence[Fact], guards: Guards, neutral: NeutralTexts | None, name: str) -> Edit:
    """One edit, of the facts within the guards."""
    for fact in facts:
        located = bench.contexts.locate(bench.tokenizer, fact)  # warns once, where all readings that follow would
        check_known(bench.tokenizer, fact, located[0])
        target = target_ids(bench.tokenizer, fact.target)
        check_vocabulary(bench.anatomy, [Row((*place.ids, *target), 0) for place in located])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FirstTokenSubjectWarning)
        warnings.simplefilter("ignore", SubjectTokenWarning)
        kept, solution, readings, left_out = _within(bench, method, facts, guards, neutral)
    no_op = [kept[i].name for i in solution.no_op]
    if no_op:
        log.info("%d of %d facts are said already: nothing is written for them", len(no_op), len(kept))
    return make_edit(
        bench.model,
        kept,
        [delta for delta in solution.deltas if delta.rank],
        editor=method.name,
        settings={**method.settings(), "layers": bench.layers, "guards": guards.settings()},
        contexts=bench.contexts.to_json(),
        of=None if solution.of is None else solution.of.tolist(),
        name=name,
        provenance={
            "layers_from": bench.layers_from,
            **_covariance_of(bench, method),
            "no_op": no_op,
            "not_found": [kept[i].name for i, value in enumerate(solution.values or ()) if not (value.is_no_op or bool(value.delta.any()))],
            "left_out": [reading.as_json() for reading in left_out],
            "readings": [reading.as_json() for reading in readings],
        },
    )


def _covariance_of(bench: EditBench, method: Editor) -> dict[str, Any]:
    if bench.covariance is None or not method.needs_covariance:
        return {}
    return {"covariance": {"from": bench.covariance_from, **bench.covariance.facts(bench.layers)}}


def editor_of(editor: str | Editor, model: nn.Module) -> Editor:
    """An editor by its name, with the settings that were published for a model, or itself. Raises ConfigError."""
    of_type(editor, (str, Editor), "an editor", f"pass one of {', '.join(EDITORS)}")
    return EDITORS.get(editor)(**published_settings(model, editor)) if isinstance(editor, str) else editor


def _within(
    bench: EditBench, method: Editor, facts: Sequence[Fact], guards: Guards, neutral: NeutralTexts | None
) -> tuple[Sequence[Fact], Solution, list[GuardReading], list[GuardReading]]:
    """The facts within the guards, their solution and readings, and the readings of those left out. Raises GuardError for none left."""
    if bench.store is None and guards.mode == "roll_back":
        bench.store = ValueStore()  # what is solved again without some facts needs no new values
    left_out: list[GuardReading] = []
    while True:
        solution = method.solve(bench, facts)
        readings = read_guards(bench, facts, solution, guards, neutral)
        beyond = heed(guards, facts, readings)
        if not beyond:
            return facts, solution, readings, left_out
        left_out += [reading for reading in readings if reading.beyond]
        facts = [fact for fact in facts if fact not in beyond]
        if not facts:
            raise _none_left(left_out)


# ---- errors


def _none_left(left_out: Sequence[GuardReading]) -> GuardError:
    reading = left_out[0]
    error = GuardError(
        "no fact is within the guards",
        expected="at least one",
        found=f"'{reading.fact}' beyond {', '.join(reading.beyond)} ({reading}), and {len(left_out) - 1} more",
        remedy="edit another layer, or widen the limits",
    )
    error.facts = tuple(reading.fact for reading in left_out)
    return error
