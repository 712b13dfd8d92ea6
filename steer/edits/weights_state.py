"""What is on a model that was edited: the edits, the weights without them, and what is written; see `steer.edits.edited_weights`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from steer.edits.base_modules import dense_weight, matrix_hash, weight_of
from steer.edits.edit import Edit, WeightDelta
from steer.edits.exact_sum import exact_sum
from steer.intervene.deploy.weight_edit import is_dense


@dataclass(frozen=True)
class WeightsState:
    """What is on a model.

    Attributes:
        edits: in the order in which they were applied.
        originals: W0 by path, as the module held it; fp64 where it was worked out from weights that training had changed.
        written, dtypes: hash of what was written, and its dtype, by path.
        rounding: by path, see `EditedWeights.rounding`.
        rebased: paths whose W0 was worked out.
        cast: paths whose weight was cast since it was written, and is written anew with the next change.
    """

    edits: tuple[Edit, ...] = ()
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    written: Mapping[str, str | None] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    rounding: Mapping[str, float] = field(default_factory=dict)
    rebased: frozenset[str] = frozenset()
    cast: frozenset[str] = frozenset()

    def after_casts(self, modules: Mapping[str, nn.Module]) -> WeightsState:
        """The same after a cast of the model (`model.to(torch.bfloat16)`): W0 is cast where its weight is what was written, cast."""
        originals, written, dtypes, cast = dict(self.originals), dict(self.written), dict(self.dtypes), set()
        for path, dtype in self.dtypes.items():
            weight = weight_of(modules[path]) if path in modules else None
            if weight is None or not is_dense(weight) or weight.dtype is dtype:
                continue
            whole = exact_sum(originals[path], deltas_of(self.edits, path), modules[path]).to(dtype)
            if torch.equal(whole.to(weight), weight.detach()):
                originals[path] = originals[path] if path in self.rebased else originals[path].to(weight.dtype)
                written[path], dtypes[path] = hash_of(modules[path]), weight.dtype
                cast.add(path)
        return replace(self, originals=originals, written=written, dtypes=dtypes, cast=self.cast | cast) if cast else self


def deltas_of(edits: Sequence[Edit], path: str) -> list[WeightDelta]:
    """The deltas of a matrix in the one order in which they are added up."""
    return [delta for edit in sorted(edits, key=lambda edit: edit.name) if (delta := edit.delta(path)) is not None]


def hash_of(module: nn.Module) -> str | None:
    """Of the numbers of its matrix; None where it has none here."""
    weight = weight_of(module)
    return None if weight is None else matrix_hash(weight)


def write(modules: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> None:
    """Writes values into the matrices at these paths."""
    for path, value in values.items():
        dense_weight(modules[path]).copy_(value)
