"""Attribution over a data set that does not fit memory, or that is read as it comes: chunk after chunk of pairs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from steer.circuits.attribute import attribute
from steer.circuits.component_scores import ComponentScores
from steer.circuits.pairs import Pairs
from steer.circuits.targets import Target
from steer.errors import ConfigError


def attribute_chunks(model: nn.Module, chunks: Iterable[tuple[Pairs, Target]], **how: Any) -> ComponentScores:
    """Scores over the pairs of all chunks, as `attribute` gives them on all at once. One chunk is in memory at a time.

    Under DDP give each process chunks of its own, and join with `all_reduced`.

    Args:
        chunks: pairs, and their target, which counts prompts from the first of its chunk.
        how: further arguments of `attribute`.

    Raises:
        ConfigError: no chunk. Whatever `attribute` raises.

    Example:
        >>> def chunks():
        ...     for noun in ("nurse", "dog"):  # as many as there are, one in memory at a time
        ...         yield Pairs.of(model, [f"The {noun} said that"], ["The person said that"], tokenizer=tokenizer), target
        >>> scores = attribute_chunks(model, chunks(), method="eap_ig").all_reduced()
    """
    total: ComponentScores | None = None
    for pairs, target in chunks:
        scores = attribute(model, pairs, target, **how)
        total = scores if total is None else total.joined(scores)
    if total is None:
        raise _no_chunk()
    return total


# ---- errors


def _no_chunk() -> ConfigError:
    return ConfigError("no pairs to attribute on", expected="at least one chunk of pairs with its target", found="none",
                       remedy="a generator gives its chunks once; make it anew")  # fmt: skip
