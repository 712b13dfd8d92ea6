"""MEMIT: mass-editing memory in a transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from steer.checks import finite_number, of_type, one_of
from steer.edits.contexts import WEIGHTINGS
from steer.edits.editor import EDITORS, EditBench, Solution, ValueEditor, warn_of_collinear
from steer.edits.fact import Fact
from steer.edits.solve import Solved, solve_keys
from steer.edits.spread import spread


@EDITORS.register("memit")
@dataclass(frozen=True)
class MEMIT(ValueEditor):
    """Many facts at once, spread over layers: Delta = R K^T (lambda C + K K^T)^-1.

    Meng et al. 2022, "Mass-Editing Memory in a Transformer", arXiv 2210.07229, equation 14 and algorithm 1.

    Attributes:
        ridge: lambda, the number of tokens that C counts for; None for the width f of the keys, at which a token of the texts behind the
            covariance would get half of what is asked for it (its k^T C^-1 k is f on average). Published: 15,000 for GPT-J (f = 16,384),
            20,000 for GPT-2 XL (6,400).
        weighting: of the contexts in the keys, see `steer.edits.contexts.WEIGHTINGS`.
        keeps_past: to disturb the edits in the weights of the model costs as much as to miss the new ones (MEMIT_seq).

    Example:
        >>> edit = steer.edit_facts(model, tokenizer, facts, editor="memit", layers=[4, 5, 6, 7, 8], covariance=covariance)
    """

    several_layers = True

    ridge: float | None = None
    weighting: str = "plain_half"
    keeps_past: bool = True

    def __post_init__(self) -> None:
        if self.ridge is not None:
            finite_number(self.ridge, "the ridge of an editor", above=0)
        one_of(self.weighting, tuple(WEIGHTINGS), "the weighting of keys")
        of_type(self.keeps_past, bool, "`keeps_past`", "pass True or False")

    def solve(self, bench: EditBench, facts: Sequence[Fact]) -> Solution:
        def solve_layer(layer: int, keys: Tensor, wanted: Tensor, of: Tensor, chosen: Sequence[Fact]) -> Solved:
            if layer == bench.layers[0]:
                warn_of_collinear(keys, of, chosen)
            metric = bench.factor(layer).solve
            past = bench.past_keys(layer, metric, "covariance", keys) if self.keeps_past else None
            ridge = float(keys.shape[1]) if self.ridge is None else self.ridge
            return solve_keys(keys, wanted, metric, ridge, past=past)

        return spread(bench, facts, self.values(bench, facts), self.weighting, solve_layer)
