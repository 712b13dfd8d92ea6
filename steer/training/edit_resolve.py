"""Solving edits again for keys that have moved, with the values that they hold: one forward pass and one small solve a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steer.edits.edit import Edit, WeightDelta
from steer.training.edit_hosts import EditHost
from steer.training.edit_readings import keys_now
from steer.training.ranks import Ranks

_DEPENDENT = 1e-3  # share of the largest singular value below which directions of a delta are not used


def solve_again(tokenizer: Any, host: EditHost, edits: Sequence[Edit], ranks: Ranks) -> list[Edit]:
    """Solves edits again for the keys of now, puts them in the place of the old ones, and returns them.

    One forward pass and one solve for each layer, from below, since an edit moves the keys of those above. In all edits of a matrix
    together, see `moved`, the directions v = C^-1 k stay, which hold the covariance that they were solved with.

    Args:
        edits: with keys and values. host: where they are. ranks: which use the keys and the solution of the first one.
    """
    edits = list(edits)
    for layer in sorted({delta.layer for edit in edits for delta in edit.deltas}):
        there = [(number, delta) for number, edit in enumerate(edits) for delta in edit.deltas if delta.layer == layer]
        keys = torch.cat([keys_now(host.edited.model, tokenizer, edits[number], [layer])[layer] for number, _ in there])  # [n, f]
        ranks.broadcast(keys)
        deltas = [delta for _, delta in there]
        own_keys = keys.split([len(delta.keys) for delta in deltas if delta.keys is not None])
        new_u = moved(deltas, keys, host.given(deltas[0].path, keys))
        for (number, delta), u, new in zip(there, new_u, own_keys, strict=True):
            ranks.broadcast(u)
            other = replace(delta, u=u, keys=new)
            edits[number] = replace(edits[number], deltas=tuple(other if each is delta else each for each in edits[number].deltas))
        host.exchange(edits)
    return edits


def moved(deltas: Sequence[WeightDelta], keys: Tensor, given: Tensor) -> list[Tensor]:
    """[d, rank] u of each delta of one matrix, moved by the least that lets it give the stored values for new keys.

    u' = u + (V - W k')^T pinv(k'^T v)^T, over the keys and the columns of all of them.

    Args:
        keys: [n, f], of all deltas. given: [n, d] what the map gives for them now.
    """
    values = torch.cat([delta.values for delta in deltas if delta.values is not None])  # [n, d]
    v = torch.cat([delta.v for delta in deltas], 1).double()  # [f, rank]
    change = (torch.linalg.pinv(keys.double() @ v, rtol=_DEPENDENT) @ (values - given).double()).mT  # [d, rank]
    return [delta.u.double() + part for delta, part in zip(deltas, change.split([delta.rank for delta in deltas], 1), strict=True)]
