"""What is on a model that was edited: the edits, the weights without them, and what is written; see `steer.edits.edited_weights`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

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
        casts: the dtypes to which a weight was cast, one after the other, since it was written; it is written anew with the next change.
    """

    edits: tuple[Edit, ...] = ()
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    written: Mapping[str, str | None] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    rounding: Mapping[str, float] = field(default_factory=dict)
    rebased: frozenset[str] = frozenset()
    casts: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)

    def original(self, path: str) -> Tensor:
        """W0 as it would be if the model had been cast without any edit."""
        original = self.originals[path]
        return original if path in self.rebased else cast(original, self.casts.get(path, ()))

    def after_casts(self, modules: Mapping[str, nn.Module]) -> WeightsState:
        """The same after casts of the model (`model.to(torch.bfloat16)`), there and back included: what was written, cast, is no change.

        Casts are told by their numbers: the shortest way that gives what is there. It does not matter whether anybody looked between two
        of them, but where the second changed numbers of W0 and none of the edited weight, as fp16 does to the smallest of bf16.
        """
        written, casts = dict(self.written), dict(self.casts)
        for path, dtype in self.dtypes.items():
            weight, known = weight_of(modules[path]) if path in modules else None, self.casts.get(path, ())
            if weight is None or not is_dense(weight):
                continue
            ways = _ways((dtype, *known)[-1], weight.detach())
            if not ways or hash_of(modules[path]) == self.written[path]:
                continue
            was = cast(exact_sum(self.originals[path], deltas_of(self.edits, path), modules[path]), (dtype, *known))
            for way in ways:
                if torch.equal(cast(was, way).to(weight.device), weight.detach()):
                    written[path], casts[path] = hash_of(modules[path]), (*known, *way)
                    break
        return replace(self, written=written, casts=casts) if casts != self.casts else self


def cast(tensor: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """A tensor that was cast to these dtypes, one after the other."""
    for dtype in dtypes:
        tensor = tensor.to(dtype)
    return tensor


def _ways(dtype: torch.dtype, weight: Tensor) -> list[tuple[torch.dtype, ...]]:
    """By which casts a weight of a dtype may have become this one. Once in each of two coarse dtypes, more casts change no number."""
    coarser = (torch.bfloat16, torch.float16, *([torch.float32] if dtype is torch.float64 else []))
    coarse = [other for other in coarser if other not in (dtype, weight.dtype)]
    direct = [] if weight.dtype is dtype else [(weight.dtype,)]
    last = [other for other in coarse if torch.equal(weight.to(other).to(weight.dtype), weight)]
    passed = coarse + [other for other in coarser if other is weight.dtype and other is not dtype]  # it may have been there before
    between = [way for count in range(1, len(passed) + 1) for way in permutations(passed, count) if way[-1] in last]
    return direct + [(*way, weight.dtype) for way in between]


def paths_of(edits: Iterable[Edit]) -> list[str]:
    """The matrices that edits change, each once."""
    return list(dict.fromkeys(delta.path for edit in edits for delta in edit.deltas))


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
