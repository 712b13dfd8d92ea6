"""EMMET: equality-constrained mass editing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from steer.checks import finite_number, number_within, one_of
from steer.edits.contexts import WEIGHTINGS
from steer.edits.editor import EDITORS, EditBench, Solution, ValueEditor, collinear
from steer.edits.fact import Fact
from steer.edits.solve import Solved, solve_keys
from steer.edits.spread import spread
from steer.errors import EditError


@EDITORS.register("emmet")
@dataclass(frozen=True)
class EMMET(ValueEditor):
    """Many facts at once, each written exactly: Delta = R (K^T C^-1 K)^-1 K^T C^-1.

    Gupta et al. 2024, "A Unified Framework for Model Editing", arXiv 2403.14236, equation 12. Their code multiplies C by a number and adds
    `ridge` to the inverted matrix. With M = (covariance_weight C)^-1 that is R (K^T M K + ridge I)^-1 K^T M: MEMIT with
    lambda = ridge * covariance_weight. Without a ridge the number cancels, and what is written is exact; that is the default here.

    Attributes:
        ridge: added to a diagonal without units; 0 is exact. 0.1 in their code, for several facts.
        covariance_weight: factor of C; 1 to 1,000 there, 10,000 and more in EasyEdit.
        weighting: of the contexts in the keys, see `steer.edits.contexts.WEIGHTINGS`; `both` constrains the plain prompt and the mean over
            the contexts.

    Raises:
        EditError: facts whose keys are nearly the same, such as two of one subject; it names them.
    """

    ridge: float = 0.0
    covariance_weight: float = 1.0
    weighting: str = "plain_half"

    def __post_init__(self) -> None:
        number_within(self.ridge, "the ridge of an editor", 0)
        finite_number(self.covariance_weight, "the weight of the covariance", above=0)
        one_of(self.weighting, tuple(WEIGHTINGS), "the weighting of keys")

    def solve(self, bench: EditBench, facts: Sequence[Fact]) -> Solution:
        def solve_layer(layer: int, keys: Tensor, wanted: Tensor, of: Tensor, chosen: Sequence[Fact]) -> Solved:
            if self.ridge == 0 and (found := collinear(keys, of, chosen)) is not None:
                raise _collinear(*found)
            factor = bench.factor(layer)
            names = [chosen[i].prompt for i in of.tolist()]
            return solve_keys(keys, wanted, lambda k: factor.solve(k) / self.covariance_weight, self.ridge, names=names)

        return spread(bench, facts, self.values(bench, facts), self.weighting, solve_layer)


# ---- errors


def _collinear(first: Fact, second: Fact, cosine: float) -> EditError:
    return EditError(
        f"'{first.prompt}' and '{second.prompt}' cannot both be written exactly: their keys are nearly the same",
        expected="facts with keys of their own, mostly of different subjects",
        found=f"a cosine of {cosine:.4f}",
        remedy="make these edits one after the other, or use an editor with a ridge: memit, or EMMET(ridge=0.1)",
    )
