"""Readings of edits during training: how likely their targets are, and how far the keys at which they were written have moved."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from steer.edits.contexts import WEIGHTINGS, Contexts, FirstTokenSubjectWarning, SubjectTokenWarning
from steer.edits.edit import Edit
from steer.edits.keys import fact_keys
from steer.edits.locate import answer_row
from steer.errors import ConfigError
from steer.model.devices import without_autocast
from steer.model.likelihood import response_logprobs


@without_autocast
def target_probability(model: nn.Module, tokenizer: Any, edits: Sequence[Edit]) -> list[float]:
    """Mean over the facts of each edit of p(target | prompt) = exp(mean log-probability of the target's tokens); NaN for one without."""
    rows = [answer_row(tokenizer, fact.prompt, fact.target) for edit in edits for fact in edit.facts]
    if not rows:
        return [math.nan] * len(edits)
    of_facts = response_logprobs(model, rows, pad=0).exp().split([len(edit.facts) for edit in edits])
    return [float(each.mean()) for each in of_facts]  # the mean of nothing is NaN


def has_keys(edit: Edit) -> bool:
    """It was solved from keys, and says how they can be read again."""
    return _was_solved(edit) and "weighting" in edit.settings


def _was_solved(edit: Edit) -> bool:
    return bool(edit.facts) and bool(edit.deltas) and all(delta.keys is not None for delta in edit.deltas)


def has_values(edit: Edit) -> bool:
    """It holds what it gives for its keys, which an edit of a quantised map does not."""
    return all(delta.values is not None for delta in edit.deltas)


def check_weighting(edit: Edit) -> None:
    """Raises ConfigError for keys of which it is not known how contexts were weighted in them."""
    if _was_solved(edit) and "weighting" not in edit.settings:
        raise _no_weighting(edit)


def keys_now(model: nn.Module, tokenizer: Any, edit: Edit, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
    """The keys of an edit as the model gives them now, [n, f] by layer, in the order of those in its deltas.

    Args:
        layers: some of those that it edits; all by default.

    Raises:
        ConfigError: an edit that does not say how its keys were read.
    """
    check_weighting(edit)
    wanted = {delta.layer: delta for delta in edit.deltas if layers is None or delta.layer in layers}
    facts = [edit.facts[number] for number in _facts_of_keys(edit)]
    contexts = Contexts(()) if edit.contexts is None else Contexts.from_json(edit.contexts)
    with warnings.catch_warnings():  # said when the edit was made
        for category in (FirstTokenSubjectWarning, SubjectTokenWarning):
            warnings.simplefilter("ignore", category)
        read = fact_keys(model, tokenizer, facts, contexts, list(wanted), str(edit.settings["weighting"]))
    for layer, delta in wanted.items():
        assert delta.keys is not None  # of `has_keys`
        if read[layer].combined.shape != delta.keys.shape:
            raise _other_keys(edit, layer, len(delta.keys), len(read[layer].combined))
    return {layer: read[layer].combined for layer in wanted}


def key_drift(edit: Edit, keys: dict[int, Tensor]) -> float:
    """Mean of |k' - k| / |k| over keys and layers. keys: as `keys_now` gives them."""
    moved = []
    for delta in edit.deltas:
        assert delta.keys is not None
        moved.append(((keys[delta.layer] - delta.keys).norm(dim=1) / delta.keys.norm(dim=1)).mean())
    return float(sum(moved)) / len(moved)


def _facts_of_keys(edit: Edit) -> list[int]:
    """Numbers of the facts that have keys, ascending."""
    if edit.of is not None:
        return sorted(set(edit.of))
    said_before = set(edit.provenance.get("no_op", ()))
    return [number for number, fact in enumerate(edit.facts) if fact.name not in said_before]


# ---- errors


def _no_weighting(edit: Edit) -> ConfigError:
    return ConfigError(
        f"it is not known how the keys of edit '{edit.name}' were read",
        expected=f"settings['weighting'], one of {', '.join(WEIGHTINGS)}",
        found=f"an edit by '{edit.editor}' without it",
        remedy="pass settings={'weighting': ...} to steer.edits.make_edit, or have an editor of your own say it in its settings()",
    )


def _other_keys(edit: Edit, layer: int, stored: int, found: int) -> ConfigError:
    return ConfigError(
        f"the keys of edit '{edit.name}' cannot be read again",
        expected=f"{stored} keys in layer {layer}, as it holds",
        found=f"{found} by its facts, contexts and weighting",
        remedy="give the edit `of`, `contexts` and settings['weighting'] as its keys were made, see steer.edits.make_edit",
    )
