"""ROME: rank-one model editing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.checks import one_of
from steer.edits.contexts import WEIGHTINGS
from steer.edits.editor import EDITORS, EditBench, Solution, ValueEditor, solution_of_values, wanted_rows
from steer.edits.fact import Fact
from steer.edits.solve import Solved, solve_keys
from steer.errors import EditError


@EDITORS.register("rome")
@dataclass(frozen=True)
class ROME(ValueEditor):
    """One fact at one layer, written exactly: Delta = delta (C^-1 k)^T / (k^T C^-1 k).

    Meng et al. 2022, "Locating and Editing Factual Associations in GPT", arXiv 2202.05262, equation 2. The published code takes one key in
    the numerator and another in the denominator, which then may be near zero: such edits disable a model (arXiv 2406.11263). Here it is
    one key in both. Several facts are written one after the other, each on what those before it left, with values of the model without any.

    Attributes:
        weighting: of the contexts in the key, see `steer.edits.contexts.WEIGHTINGS`; `plain_half` is MEMIT's, `mean` R-ROME's, and `both`
            constrains the plain prompt and the mean over the contexts, the change being of rank two.

    Published settings of the value: ValueSettings(clamp=4.0, clamp_of="mlp_output").
    """

    weighting: str = "plain_half"

    def __post_init__(self) -> None:
        one_of(self.weighting, tuple(WEIGHTINGS), "the weighting of keys")

    def solve(self, bench: EditBench, facts: Sequence[Fact]) -> Solution:
        values = self.values(bench, facts)
        wanted = wanted_rows(facts, values)
        layer = one_layer(bench, self.name)
        if not wanted:
            return solution_of_values([bench.no_delta(layer)], values)
        site = bench.maps[layer].key_site
        read = bench.read([facts[i] for i in wanted], [site], self.weighting)
        keys, of = read.combined(site), read.of
        shifts = [values[i].delta.expand(int((of == number).sum()), -1) for number, i in enumerate(wanted)]
        solved = one_by_one(bench, layer, keys, of, shifts, [facts[i] for i in wanted])
        return solution_of_values([bench.delta(layer, solved, keys)], values, of=torch.tensor(wanted)[of])


def one_layer(bench: EditBench, name: str) -> int:
    """The layer that is edited. Raises EditError for several."""
    if len(bench.layers) > 1:
        raise _several_layers(bench, name)
    return bench.layers[0]


def one_by_one(bench: EditBench, layer: int, keys: Tensor, of: Tensor, shifts: Sequence[Tensor], facts: Sequence[Fact]) -> Solved:
    """Writes exactly what each fact shall get, on what the facts before it left.

    Args:
        keys: [m, f], of the facts `of`, [m].
        shifts: for each fact [its keys, d], by how much the output shall change.
    """
    u: list[Tensor] = []
    v: list[Tensor] = []
    for number, shift in enumerate(shifts):
        own = keys[of == number].double()  # [1 or 2, f]
        rest = shift.double()
        for earlier_u, earlier_v in zip(u, v, strict=True):
            rest = rest - own @ earlier_v @ earlier_u.T
        solved = solve_keys(own, rest, bench.factor(layer).solve, 0.0, names=[facts[number].prompt] * len(own))
        u.append(solved.u)
        v.append(solved.v)
    return Solved(torch.cat(u, 1), torch.cat(v, 1), torch.ones(len(keys), dtype=torch.float64))


# ---- errors


def _several_layers(bench: EditBench, name: str) -> EditError:
    return EditError(
        f"'{name}' edits one layer",
        expected="one, such as layers=[8]",
        found=f"layers {', '.join(map(str, bench.layers))}",
        remedy="name one, or use memit, which spreads an edit over layers",
    )
