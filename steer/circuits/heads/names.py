"""Attention heads by layer and number, as `23.3` or `a23.h3`, and the layers of a model that have any."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from steer.checks import of_type
from steer.errors import AnatomyError, ConfigError
from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of

_NAME = re.compile(r"a?(\d+)\.h?(\d+)")


class Head(NamedTuple):
    """A query head. Both numbers count from 0.

    Example:
        >>> Head(18, 6)
        Head(layer=18, head=6)
    """

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"


HeadName = str | tuple[int, int] | Head


def head_named(name: HeadName) -> Head:
    """Reads `23.3`, `a23.h3` or (23, 3). Raises ConfigError for anything else."""
    if isinstance(name, str) and (match := _NAME.fullmatch(name)):
        return Head(int(match[1]), int(match[2]))
    if isinstance(name, tuple) and len(name) == 2 and all(isinstance(number, int) for number in name):
        return Head(*name)
    raise _no_head_name(name)


def heads_named(anatomy: Anatomy, names: Sequence[HeadName] | HeadName) -> list[Head]:
    """Reads the names of heads of a model, each of which stays once.

    Raises:
        ConfigError: no name of a head, none at all, or a head that the model does not have.
        SiteError: a layer whose heads are not known.
    """
    of_type(names, (str, list, tuple), "the names of heads", "e.g. ['18.6', '17.4']")
    several = [names] if isinstance(names, str | Head) or is_pair(names) else names
    heads = list(dict.fromkeys(head_named(name) for name in several))  # type: ignore[arg-type]
    if not heads:
        raise _no_heads_named()
    for head in heads:
        if not 0 <= head.layer < anatomy.n_layers:
            raise _no_such_head(anatomy, head, f"layers 0 to {anatomy.n_layers - 1}")
        n_heads = heads_of(anatomy, head.layer).n_heads
        if not 0 <= head.head < n_heads:
            raise _no_such_head(anatomy, head, f"heads {head.layer}.0 to {head.layer}.{n_heads - 1}")
    return heads


def attention_layers(anatomy: Anatomy) -> list[int]:
    """Layers with attention; hybrid models have others.

    Raises:
        SiteError: a block of which it is not known what it adds to the residual stream, or whose heads are not known.
        AnatomyError: no layer has attention.
    """
    layers = [layer for layer, parts in enumerate(anatomy.parts) if parts.attention() or not parts.writers]
    for layer in layers:
        heads_of(anatomy, layer)
    if not layers:
        raise _no_attention(anatomy)
    return layers


def is_pair(names: object) -> bool:
    """One head as (layer, head), not several names."""
    return isinstance(names, tuple) and len(names) == 2 and all(isinstance(number, int) for number in names)


# ---- errors


def _no_head_name(name: object) -> ConfigError:
    return ConfigError("no name of an attention head", expected="layer.head, e.g. '23.3', or (23, 3)", found=repr(name),
                       remedy="count layers and query heads from 0")  # fmt: skip


def _no_heads_named() -> ConfigError:
    return ConfigError("no attention heads are named", expected="at least one, e.g. '23.3'", found="none",
                       remedy="take some of head_scores(model).top('induction')")  # fmt: skip


def _no_such_head(anatomy: Anatomy, head: Head, expected: str) -> ConfigError:
    return ConfigError(
        f"this {anatomy.kind} has no attention head {head}",
        expected=expected,
        found=str(head),
        remedy="name a head as layer.head; both count from 0, and heads are those of the queries",
    )


def _no_attention(anatomy: Anatomy) -> AnatomyError:
    writers = dict.fromkeys(writer.part for parts in anatomy.parts for writer in parts.writers)
    return AnatomyError(
        f"no block of this {anatomy.kind} has attention",
        expected="a module that mixes tokens and is attention by its name",
        found=f"blocks that add {', '.join(writers) or 'nothing known'} to the residual stream",
        remedy="heads are parts of attention: look at 'mixer.output' of this model instead",
    )
