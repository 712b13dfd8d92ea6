"""R-ROME: ROME with the same key everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steer.edits.editor import EDITORS, EditBench, Solution, ValueEditor, solution_of_values, wanted_rows
from steer.edits.editors.rome import one_by_one, one_layer
from steer.edits.fact import Fact

_WEIGHTING = "mean"  # of the contexts in the keys


@EDITORS.register("r_rome")
@dataclass(frozen=True)
class RROME(ValueEditor):
    """ROME with the mean key of all contexts everywhere: Delta = (v* - W k) (C^-1 k)^T / (k^T C^-1 k).

    Gupta et al. 2024, "Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing", arXiv 2403.07175, section 4. v* is what
    the map gives in the plain prompt, shifted by delta, and k the mean over the plain prompt and all contexts. The plain prompt itself
    gets the share k0^T C^-1 k / k^T C^-1 k of it, which is small where its key k0 is unlike the mean.
    """

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"weighting": _WEIGHTING}

    def solve(self, bench: EditBench, facts: Sequence[Fact]) -> Solution:
        values = self.values(bench, facts)
        wanted = wanted_rows(facts, values)
        layer = one_layer(bench, self.name)
        if not wanted:
            return solution_of_values([bench.no_delta(layer)], values)
        edited = bench.maps[layer]
        read = bench.read([facts[i] for i in wanted], [edited.key_site, edited.value_site], _WEIGHTING)
        keys, outputs = read.combined(edited.key_site), read.combined(edited.value_site)  # [n, f], [n, d]
        # a prompt that has no weight beside its contexts has no output either
        plain = torch.stack([texts[0] if weights[0, 0] else weights[0] @ texts for texts, weights in
                             zip(read.values[edited.value_site], read.weights, strict=True)])  # fmt: skip
        shifts = [(values[i].delta + plain[number] - outputs[number])[None] for number, i in enumerate(wanted)]
        solved = one_by_one(bench, layer, keys, read.of, shifts, [facts[i] for i in wanted])
        return solution_of_values([bench.delta(layer, solved, keys)], values, of=torch.tensor(wanted)[read.of])
