"""Edges of a model whose heads share keys and values, and of its ungrouped copy, in which each head has its own.

Other programs attribute to the copy: one key and one value reader for each query head, where ours have one for each group. The metric of
the copy is M(x_1, ..., x_n), with an input x for each head of a group; the grouped model is M(x, ..., x), and by the chain rule its
gradient at x is the sum of those at the copies of x. A score <u' - u, gradient> is linear in the gradient, and stays so when gradients are
averaged over several points, so

    score(u -> group) = sum over the heads of the group of score(u -> head).

`grouped` adds them up, exactly. What each head has of a group's score cannot be known from the sum: `ungrouped` gives each the same share,
so that `grouped(ungrouped(s)) = s`, and a share is the mean of what the heads have. Copies of the whole score would count a group as many
times as it has heads. Scores by patching one edge at a time are not linear, and do not add up.

An edge to a whole group is the same circuit in both, since all copies get the same input. An edge to some of its heads exists in the copy
alone: `grouped` takes the whole group, and `groups_in_part` says where.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.errors import ConfigError


def ungrouped(edges: Tensor, n_heads: int, groups: Sequence[int]) -> Tensor:
    """Edges of a model with key-value groups as those of its ungrouped copy: scores in equal shares, bool to every head of a group.

    Args:
        edges: [writers, readers of the grouped model]: of each block q of all heads, k and v of its groups, the MLP; then the logits.
        groups: key-value groups of each block.

    Returns:
        [writers, readers], in the order of `MibShape.readers`.

    Raises:
        ConfigError: heads that cannot be shared out evenly, or a matrix of another width.
    """
    parts = []
    for (q, k, v, mlp), n_groups in _blocks(edges, n_heads, groups, grouped=True):
        size = n_heads // n_groups
        parts += [q, *(part.repeat_interleave(size, 1) / (1 if edges.dtype is torch.bool else size) for part in (k, v)), mlp]
    return torch.cat([*(part.to(edges.dtype) for part in parts), edges[:, -1:]], 1)


def grouped(edges: Tensor, n_heads: int, groups: Sequence[int]) -> Tensor:
    """Edges of an ungrouped model as those of the model with key-value groups: scores summed over the heads of a group, bool where any is.

    Arguments, result and errors are those of `ungrouped`, the other way round.
    """
    parts = []
    for (q, k, v, mlp), n_groups in _blocks(edges, n_heads, groups, grouped=False):
        by_group = (part.unflatten(1, (n_groups, -1)) for part in (k, v))  # [writers, groups, heads of a group]
        parts += [q, *(part.any(2) if edges.dtype is torch.bool else part.sum(2) for part in by_group), mlp]
    return torch.cat([*parts, edges[:, -1:]], 1)


def groups_in_part(edges: Tensor, n_heads: int, groups: Sequence[int]) -> Tensor:
    """[writers, readers of the grouped model] bool: only some heads of the group have the edge, so that `grouped` makes more of it.

    Arguments and errors are those of `grouped`, edges being bool.
    """
    return grouped(edges, n_heads, groups) & grouped(~edges, n_heads, groups)


def _blocks(edges: Tensor, n_heads: int, groups: Sequence[int], *, grouped: bool) -> list[tuple[tuple[Tensor, ...], int]]:
    """Of each block the columns of q, k, v and MLP, and the number of its groups."""
    if not groups or any(n_groups < 1 or n_heads % n_groups for n_groups in groups):
        raise _uneven_groups(n_heads, groups)
    sizes = [[n_heads, n, n, 1] for n in (groups if grouped else [n_heads] * len(groups))]
    n_readers = sum(map(sum, sizes)) + 1
    if edges.dim() != 2 or edges.shape[1] != n_readers:
        raise _other_width(edges, n_readers)
    by_block = edges[:, :-1].split([sum(size) for size in sizes], 1)
    return [(block.split(size, 1), n_groups) for block, size, n_groups in zip(by_block, sizes, groups, strict=True)]


# ---- errors


def _uneven_groups(n_heads: int, groups: Sequence[int]) -> ConfigError:
    return ConfigError(
        "key-value groups do not share the heads evenly",
        expected=f"for each block a number that divides {n_heads}",
        found=list(groups),
        remedy="give the key-value heads of each block, as the model's configuration has them",
    )


def _other_width(edges: Tensor, n_readers: int) -> ConfigError:
    return ConfigError(
        "a matrix of edges does not fit the heads and groups",
        expected=f"[writers, {n_readers}]: of each block q, k, v and MLP, and the logits last",
        found=list(edges.shape),
        remedy="give the groups of every block, and edges in the order of the readers",
    )
