"""Edits in sequence: each solved on the model with those before it in the weights, and watched by guards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from steer.checks import of_type, whole_number
from steer.edits.contexts import Contexts
from steer.edits.covariance import Covariance
from steer.edits.edit import Edit
from steer.edits.edit_facts import bench_for, editor_of, solve_edit
from steer.edits.edited_weights import EditedWeights
from steer.edits.editor import Editor
from steer.edits.fact import Fact, distinct_facts
from steer.edits.guards import Guards, NeutralTexts
from steer.errors import EditError, GuardError
from steer.model.devices import without_autocast


@dataclass(frozen=True, eq=False)
class SequenceResult:
    """What became of a sequence of edits.

    Attributes:
        edits: that are in the weights, in order; each has the readings of its guards in `provenance["readings"]`.
        left_out: facts that `roll_back` left out, in order.
        stopped: why the sequence ended before its end, with the names of the facts that ended it; None where it did not.
        not_reached: facts that were not written because of that, those that ended it included.

    Example:
        >>> how = {"editor": "rome", "layers": [8], "covariance": covariance, "contexts": contexts}
        >>> result = apply_in_sequence(model, tokenizer, [fact], **how)
        >>> result.edits, result.left_out, result.stopped
    """

    edits: tuple[Edit, ...]
    left_out: tuple[Fact, ...]
    stopped: GuardError | None
    not_reached: tuple[Fact, ...]

    def __str__(self) -> str:
        text = f"{len(self.edits)} edits of {sum(len(edit.facts) for edit in self.edits)} facts, {len(self.left_out)} facts left out"
        return text if self.stopped is None else f"{text}; stopped with {len(self.not_reached)} to go: {self.stopped}"


@without_autocast
def apply_in_sequence(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    batch: int = 1,
    editor: str | Editor = "memit",
    layers: Sequence[int] | None = None,
    covariance: Covariance | None = None,
    contexts: Contexts | None = None,
    guards: Guards | None = None,
    name: str = "",
    progress: str | None = None,
) -> SequenceResult:
    """Edits facts one batch after the other, and leaves the edits in the weights of the model.

    A fact may come again with another target: the last one wins. An error or an interrupt leaves the edits that were finished in the
    weights, whole: `EditedWeights.of(model)` lists and reverts them.

    Args:
        batch: facts of one edit; a fact whose prompt is in the batch already begins the next one.
        guards: read for each edit on the model before it; `neutral_kl` against the model before the first one. With `mode="stop"` the
            sequence ends before an edit beyond a limit, and says so in its result.
        name: before the number in the names of the edits; that of the editor when empty.
        progress: label of the progress bar, None for none.

    The others are as of `steer.edit_facts`, and so are the errors.

    Raises:
        EditError: no facts.

    Example:
        >>> how = {"layers": [8], "covariance": covariance, "contexts": contexts, "guards": Guards(mode="roll_back")}
        >>> result = apply_in_sequence(model, tokenizer, facts, **how)
        >>> result.left_out
    """
    of_type(facts, (list, tuple), "the facts of a sequence", "pass a list of facts")
    if not facts:
        raise _no_facts()
    whole_number(batch, "`batch`, the facts of one edit", least=1)
    method = editor_of(editor, model)
    guards = guards or Guards()
    bench = bench_for(model, tokenizer, facts, method, layers, covariance, contexts, None, None)
    neutral = NeutralTexts(bench, guards.neutral_texts) if guards.neutral_texts else None
    edited = EditedWeights.of(model)
    edits: list[Edit] = []
    left_out: list[Fact] = []
    done = 0
    with tqdm(total=len(facts), desc=progress, disable=True if progress is None else None, leave=False) as bar:
        for chosen in _batches(facts, batch):
            try:
                edit = solve_edit(bench, method, distinct_facts(chosen), guards, neutral, _free_name(edited, name or method.name))
            except GuardError as error:
                if guards.mode == "stop":
                    return SequenceResult(tuple(edits), tuple(left_out), error, tuple(facts[done:]))
                left_out += chosen
            else:
                left_out += [fact for fact in chosen if fact not in edit.facts]
                edited.apply(edit)
                edits.append(edit)
            done += len(chosen)
            bar.update(len(chosen))
    return SequenceResult(tuple(edits), tuple(left_out), None, ())


def _batches(facts: Sequence[Fact], size: int) -> Iterator[list[Fact]]:
    """Runs of facts with different prompts."""
    batch: list[Fact] = []
    for fact in facts:
        if len(batch) == size or any(fact.prompt == other.prompt for other in batch):
            yield batch
            batch = []
        batch.append(fact)
    yield batch


def _free_name(edited: EditedWeights, prefix: str) -> str:
    """A name that no edit of the model has; numbers go on where they ended, and sort as they came."""
    taken = {edit.name for edit in edited.applied}
    number = len(taken) + 1
    while (name := f"{prefix}-{number:05d}") in taken:
        number += 1
    return name


# ---- errors


def _no_facts() -> EditError:
    return EditError("there is nothing to edit", expected="at least one fact", found="none", remedy="pass [Fact.of(...)]")
