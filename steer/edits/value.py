"""Values: what an MLP would have to write at the subject of a fact, so that the model gives the new answer.

Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262, equation 4), and 2023, "Mass-Editing Memory in a
Transformer" (arXiv 2210.07229, equation 13). A shift delta of what the MLP of one block gives at the last token of the subject is found by
Adam, for all facts at once; the weights of the model have no gradients.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import astuple, replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from steer.edits.contexts import Contexts
from steer.edits.edited_map import edited_maps
from steer.edits.fact import Fact
from steer.edits.frozen import frozen
from steer.edits.locate import locate, target_ids
from steer.edits.value_cache import ValueStore, weights_digest
from steer.edits.value_pass import ValueRow
from steer.edits.value_problem import ValueProblem
from steer.edits.value_settings import Value, ValueSettings
from steer.model.anatomy import Anatomy
from steer.model.capture import batches_of
from steer.model.devices import without_autocast
from steer.model.memory import in_halves
from steer.model.watcher import watchers_of


@without_autocast
def solve_values(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    contexts: Contexts,
    layer: int,
    settings: ValueSettings | None = None,
    *,
    cache: ValueStore | None = None,
    max_tokens: int = 1024,
    progress: str | None = None,
) -> list[Value]:
    """Optimises what the MLP of a layer has to write at the last subject token of each fact. The model is left as it was.

    Args:
        layer: the edited one, or the last edited one.
        settings: None for the defaults.
        cache: values that are in it are taken from it, where weights, fact, contexts, layer and settings are the same.
        max_tokens: padded tokens of a batch of facts; a batch that does not fit into memory is halved.
        progress: label of the progress bar, None for none.

    Returns:
        One value for each fact.

    Raises:
        NonFiniteError: a loss or a gradient that is not finite; it names the fact. EditError: a layer that cannot be edited.
        SubjectNotFoundError, TokenizerError: by `steer.edits.locate`.

    Example:
        >>> (value,) = solve_values(model, tokenizer, [fact], contexts, layer=8)
        >>> value.probability
    """
    settings = settings or ValueSettings()
    anatomy = Anatomy.find(model)
    (edited,) = edited_maps(anatomy, [layer])
    maps = [edited.module, _attention_map(anatomy, edited.layer)] if settings.with_attention else [edited.module]
    problem = ValueProblem(model, anatomy, edited.layer, maps, settings)
    rows = [fact_rows(tokenizer, fact, contexts, i) for i, fact in enumerate(facts)]
    if watchers_of(model) or any(parameter.is_meta for parameter in model.parameters()):
        cache = None  # values depend on what is attached to the model, and on weights that are offloaded: no digest knows of these
    keys = [] if cache is None else _keys(weights_digest(model), edited.layer, settings, rows)
    values = {i: value for i, key in enumerate(keys) if cache is not None and (value := cache.get(key)) is not None}
    missing = [i for i in range(len(facts)) if i not in values]
    with frozen(model):
        with tqdm(total=len(missing), desc=progress, disable=True if progress is None else None, leave=False) as bar:
            for chunk in _chunks(rows, max_tokens):  # of all facts, so that those that are found later are found as at first
                for part, solved in _solved(problem, rows, facts, [i for i in chunk if i not in values]):
                    values |= zip(part, solved, strict=True)
                    if cache is not None:
                        cache.put({keys[i]: value for i, value in zip(part, solved, strict=True)})
                    bar.update(len(part))
    return [values[i] for i in range(len(facts))]


def _solved(
    problem: ValueProblem, rows: Sequence[list[ValueRow]], facts: Sequence[Fact], chunk: list[int]
) -> Iterator[tuple[Sequence[int], list[Value]]]:
    """Numbers of facts and their values, in halves where memory does not suffice for all at once."""
    if not chunk:
        return
    start = time.process_time()
    for part, values in in_halves(chunk, lambda part: problem.solve([row for i in part for row in rows[i]], [facts[i] for i in part])):
        seconds = (time.process_time() - start) / len(part)
        yield part, [replace(value, seconds=seconds) for value in values]
        start = time.process_time()


def _chunks(rows: Sequence[list[ValueRow]], max_tokens: int) -> Iterator[list[int]]:
    """Facts whose texts run together: of similar length behind the edited token, so that little is padded."""
    if not rows:
        return
    lengths = [max(len(row.ids) - row.site for row in of_fact) for of_fact in rows]
    for chunk in batches_of(lengths, max(max_tokens // len(rows[0]), 1)):
        yield sorted(chunk)


def _keys(weights: str, layer: int, settings: ValueSettings, rows: Sequence[list[ValueRow]]) -> list[Hashable]:
    """Under what the value of each fact is kept: all that it depends on; token ids say more than texts."""
    return [(weights, layer, astuple(settings), tuple((row.ids, row.site, row.targets, row.weight) for row in of_fact)) for of_fact in rows]


def _attention_map(anatomy: Anatomy, layer: int) -> nn.Module:
    """The map that gives the output of an attention. Raises SiteError where that is none."""
    return anatomy.point(f"layers.{layer}.attn.z").module


def fact_rows(tokenizer: Any, fact: Fact, contexts: Contexts, number: int) -> list[ValueRow]:
    """The texts of the value problem of a fact: the prompt behind every context, with the target, and "<subject> is a".

    A prompt whose subject is its first token, without a start-of-text token, has no weight beside contexts: what a model does at the first
    token of a text hardly depends on it.
    """
    target = target_ids(tokenizer, fact.target)
    located = contexts.locate(tokenizer, fact)
    weights = contexts.weights("mean", plain=not located[0].at_start)[0].tolist()
    rows = [
        ValueRow((*place.ids, *target[:-1]), place.last, number, target, weights[i], is_plain=i == 0) for i, place in enumerate(located)
    ]
    essence = f"{fact.subject} is a"
    text = essence if weights[0] else contexts.texts(essence)[1]
    place = locate(tokenizer, text, fact.subject, start=len(text) - len(essence))
    return [*rows, ValueRow(place.ids[: place.last + 1], place.last, number, (), 0.0)]


__all__ = ["Value", "ValueSettings", "fact_rows", "solve_values"]
