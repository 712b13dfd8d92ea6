"""PMET: precise model editing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from steer.checks import finite_number, one_of
from steer.edits.contexts import WEIGHTINGS
from steer.edits.editor import EDITORS, EditBench, Solution, ValueEditor, warn_of_collinear
from steer.edits.fact import Fact
from steer.edits.solve import Solved, solve_keys
from steer.edits.spread import spread
from steer.edits.value import ValueSettings

_SHARE = 6000 / 16384  # of lambda in f, as published for GPT-J
_SETTINGS = ValueSettings(lr=0.2, steps=30, kl=1.0, argmax_weight=0.1, stop_kl=0.01, with_attention=True)


@EDITORS.register("pmet")
@dataclass(frozen=True)
class PMET(ValueEditor):
    """Shifts of attention and MLP are optimised together, and only that of the MLP is written: R / sqrt(layers left) in each layer.

    Li et al. 2023, "PMET: Precise Model Editing in a Transformer", arXiv 2308.08742, section 4. The solve is that of MEMIT. What the
    attention would have had to add is not written, so that less of the shift arrives than with other editors at the same lambda.

    Attributes:
        ridge: lambda, the number of tokens that C counts for; None for 0.37 f, which is 6,000 for GPT-J as published.
        weighting: of the contexts in the keys, see `steer.edits.contexts.WEIGHTINGS`.
    """

    several_layers = True

    ridge: float | None = None
    weighting: str = "plain_half"
    value_settings: ValueSettings = field(default=_SETTINGS, kw_only=True)

    def __post_init__(self) -> None:
        if self.ridge is not None:
            finite_number(self.ridge, "the ridge of an editor", above=0)
        one_of(self.weighting, tuple(WEIGHTINGS), "the weighting of keys")

    def solve(self, bench: EditBench, facts: Sequence[Fact]) -> Solution:
        def solve_layer(layer: int, keys: Tensor, wanted: Tensor, of: Tensor, chosen: Sequence[Fact]) -> Solved:
            if layer == bench.layers[0]:
                warn_of_collinear(keys, of, chosen)
            ridge = _SHARE * keys.shape[1] if self.ridge is None else self.ridge
            return solve_keys(keys, wanted, bench.factor(layer).solve, ridge)

        return spread(bench, facts, self.values(bench, facts), self.weighting, solve_layer, share="root")
