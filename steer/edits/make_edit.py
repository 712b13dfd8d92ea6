"""Making an edit of deltas that were solved on a model: with the hashes of what they were solved for, and the values that they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from steer.edits.base_modules import base_path, dense_weight, find_module, weight_of
from steer.edits.edit import Edit, WeightDelta
from steer.edits.edited_weights import EditedWeights
from steer.edits.fact import Fact
from steer.intervene.deploy.weight_edit import is_conv1d, is_dense
from steer.model.anatomy import Anatomy


def make_edit(
    model: nn.Module,
    facts: Sequence[Fact],
    deltas: Sequence[WeightDelta],
    *,
    editor: str,
    settings: Mapping[str, Any] | None = None,
    contexts: Mapping[str, Any] | None = None,
    name: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> Edit:
    """An edit that was solved on a model as it is now, with the hashes that say so; the model is left as it is.

    Deltas with keys and without values get the values that the edited map gives. Names of edits that were on the model when it was solved
    are kept in `provenance["over"]`.

    Args:
        deltas: their paths may be those of wrapped modules. Otherwise as of `Edit`.

    Raises:
        WrongModelError: a path that the model does not have.
    """
    edited = EditedWeights.of(model)
    completed = [_completed(delta, edited.model) for delta in deltas]
    base = {delta.path: digest for delta in completed if (digest := edited.base_hash(delta.path)) is not None}
    over = [edit.name for edit in edited.applied]
    return Edit(
        tuple(facts),
        editor,
        tuple(completed),
        name,
        settings=settings or {},
        contexts=contexts,
        base=base,
        model=Anatomy.find(model).fingerprint(),
        provenance={**(provenance or {}), **({"over": over} if over else {})},
    )


def _completed(delta: WeightDelta, base: nn.Module) -> WeightDelta:
    """A delta with its base path, and the values of its keys."""
    path = base_path(delta.path)
    module = find_module(base, path)
    values = delta.values
    if delta.keys is not None and values is None and is_dense(weight_of(module)):
        values = mapped(module, delta.keys) + (delta.keys @ delta.v) @ delta.u.mT
    return replace(delta, path=path, values=values)


@torch.no_grad()
def mapped(module: nn.Module, keys: Tensor) -> Tensor:
    """W k of a linear map, without its bias. keys: [n, f]; [n, d] fp32 on the CPU, summed in fp64."""
    weight = dense_weight(module).cpu().double()
    return (keys.cpu().double() @ (weight if is_conv1d(module) else weight.mT)).float()
