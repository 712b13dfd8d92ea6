"""Spreading an edit over layers: each writes its share of what is still missing behind the last (MEMIT, arXiv 2210.07229, section 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steer.edits.edit import WeightDelta
from steer.edits.editor import EditBench, Solution, smallest, solution_of_values, wanted_rows
from steer.edits.fact import Fact
from steer.edits.solve import Solved
from steer.edits.value import Value
from steer.errors import EditError
from steer.model.site import Site

# layer, keys [m, f], what they shall get [m, d], of which of the facts each is [m], the facts -> the change of that layer
SolveLayer = Callable[[int, Tensor, Tensor, Tensor, Sequence[Fact]], Solved]
SHARES: dict[str, Callable[[int], float]] = {"equal": float, "root": lambda left: left**0.5}


def spread(
    bench: EditBench, facts: Sequence[Fact], values: Sequence[Value], weighting: str, solve_layer: SolveLayer, share: str = "equal"
) -> Solution:
    """Solves layer after layer, with keys and the missing rest read on the model as it is with the layers before it changed.

    Args:
        values: at the last layer.
        weighting: of the contexts in the keys; the rest is read in the same mixture.
        share: what a layer writes of the rest: `equal` has 1 / layers left, `root` 1 / sqrt(layers left).

    Raises:
        EditError: several layers in a model with a norm between MLP and stream.
    """
    wanted = wanted_rows(facts, values)
    if not wanted:
        return solution_of_values([bench.no_delta(layer) for layer in bench.layers], values)
    if len(bench.layers) > 1 and any(edited.has_post_norm for edited in bench.maps.values()):
        raise _post_norm(bench)
    chosen = [facts[i] for i in wanted]
    deltas = torch.stack([values[i].delta for i in wanted]).double()  # [n, d]
    last = bench.layers[-1]
    stream = Site("output", layer=last)
    deltas_of_layers: list[WeightDelta] = []
    strength = torch.ones(len(chosen), dtype=torch.float64)
    target: Tensor | None = None  # [m, d] of the stream behind the last layer
    for number, layer in enumerate(bench.layers):
        left = len(bench.layers) - number
        sites = [bench.maps[layer].key_site] + ([stream] if len(bench.layers) > 1 else [])
        with bench.beside(deltas_of_layers):
            read = bench.read(chosen, sites, weighting)
        keys, of = read.combined(sites[0]), read.of
        rest = deltas[of]
        if len(bench.layers) > 1:
            now = read.combined(stream).double()
            if target is None:
                target = now + bench.maps[last].scale * deltas[of]
            rest = (target - now) / SHARES[share](left) / bench.maps[layer].scale
        solved = solve_layer(layer, keys, rest, of, chosen)
        strength = torch.minimum(strength, smallest(solved.strength, of, len(chosen)))
        deltas_of_layers.append(bench.delta(layer, solved, keys))
    of_all = torch.ones(len(facts), dtype=torch.float64)
    of_all[wanted] = strength
    return solution_of_values(deltas_of_layers, values, of_all, torch.tensor(wanted)[of])


# ---- errors


def _post_norm(bench: EditBench) -> EditError:
    return EditError(
        f"an edit cannot be spread over layers of this {bench.anatomy.kind}",
        expected="one layer: a norm follows each MLP, so that what a lower one adds to the stream is no linear function of its weight",
        found=f"layers {', '.join(map(str, bench.layers))}",
        remedy=f"pass one, e.g. layers=[{bench.layers[-1]}]; its value is found before that norm, and is exact",
    )
