"""WEAT and SEAT: are embeddings of two sets of targets associated with two sets of attributes?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steer.bias.items import AssociationTest, check_items
from steer.bias.scoring import Scorer
from steer.bias.table import ALL, BiasRow, Column, Measured, row_of
from steer.checks import one_of, whole_number
from steer.errors import NonFiniteError
from steer.model.accumulator import TextAccumulator, pool
from steer.model.capture import capture
from steer.model.estimates import Estimate, mean_of
from steer.model.site import Site
from steer.model.tokens import Row

COLUMNS = (
    Column("effect size", "", 0.0, "difference of the mean association of the two targets, in standard deviations of all of them"),
    Column("p", "p", None, "one-sided: share of splits of the targets with an association as large"),
    Column("|effect size|", "", 0.0, "of each test; in the row of all, the mean over tests"),
)
EXACT = 20_000  # splits that are all gone through


class _Embeddings(TextAccumulator):
    """Mean activation over the span of each text."""

    def __init__(self) -> None:
        self.by_text: dict[int, Tensor] = {}

    def reduce(self, h: Tensor, weight: Tensor) -> Tensor:
        return pool(h, weight)

    def add(self, values: Tensor, rows: Tensor) -> None:
        self.by_text.update(zip(rows.tolist(), values.double(), strict=True))


def association(
    items: Sequence[AssociationTest], scorer: Scorer, *, site: str, token: str = "mean", permutations: int = 10_000
) -> Measured:
    """Effect size and permutation p of each test, on activations at a site.

    Args:
        site: where texts are embedded, e.g. `layers.12.output`.
        token: `mean` over the tokens of a text, without the start token, or `last`.
        permutations: random splits of the targets where there are more than 20,000.
    """
    check_items(items, AssociationTest, "association")
    one_of(token, ("mean", "last"), "`token`")
    whole_number(permutations, "`permutations`", least=1)
    texts = sorted({text for item in items for texts in (*item.targets, *item.attributes) for text in texts})
    rows = [Row((scorer.start, *scorer.ids(text)), 1) for text in texts]
    embeddings = _Embeddings()
    span = "response" if token == "mean" else "last"
    progress = "embeddings" if scorer.progress else None
    capture(scorer.model, rows, {Site.parse(site): embeddings}, span=span, max_tokens=scorer.max_tokens, progress=progress)
    by_text = {text: embeddings.by_text[place] for place, text in enumerate(texts)}
    found = [_row(item, by_text, permutations, scorer.seed) for item in items]
    sizes = [row.values["|effect size|"].value for row in found]
    if len(found) > 1:
        found.insert(0, row_of(ALL, len(found), {"|effect size|": mean_of(sizes)}))
    return Measured(COLUMNS, tuple(found), (f"embeddings: {token} token at {site}",))


def _row(item: AssociationTest, by_text: dict[str, Tensor], permutations: int, seed: int) -> BiasRow:
    sets = [torch.stack([by_text[text] for text in texts]) for texts in (*item.targets, *item.attributes)]
    d, p = effect_size(*sets), permutation_p(*sets, permutations=permutations, seed=seed)
    n = len(sets[0]) + len(sets[1])
    return row_of(item.group, n, {"effect size": Estimate(d, n=n), "p": Estimate(p), "|effect size|": Estimate(abs(d))})


def associations(targets: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[targets] mean cosine with the attributes a less that with b. All arguments [n, width]."""
    unit = [torch.nn.functional.normalize(x.double(), dim=-1) for x in (targets, a, b)]
    return unit[0] @ unit[1].mean(0) - unit[0] @ unit[2].mean(0)


def effect_size(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> float:
    """d = (mean association of x - that of y) / standard deviation over x and y together (n - 1)."""
    of_x, of_y = associations(x, a, b), associations(y, a, b)
    spread = torch.cat([of_x, of_y]).std()
    if not bool(spread > 0):
        raise _no_spread(spread)
    return float((of_x.mean() - of_y.mean()) / spread)


def permutation_p(x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, permutations: int = 10_000, seed: int = 0) -> float:
    """One-sided p: share of splits of x and y into sets of their sizes whose association is at least that of the split at hand.

    All splits where there are no more than `EXACT`; else random ones, the split at hand counted among them.
    """
    values = torch.cat([associations(x, a, b), associations(y, a, b)]).numpy()
    size, n = len(x), len(values)
    # the sum over one side decides, as that over both is fixed; rounding must not break ties
    least = values[:size].sum() - 1e-12 * np.abs(values).sum()
    if math.comb(n, size) <= EXACT:
        sums = [values[list(chosen)].sum() for chosen in itertools.combinations(range(n), size)]
        return float(np.mean(np.asarray(sums) >= least))
    random = np.random.default_rng(seed)
    hits = sum(values[random.permutation(n)[:size]].sum() >= least for _ in range(permutations))
    return (1 + int(hits)) / (1 + permutations)


# ---- errors


def _no_spread(spread: Tensor) -> NonFiniteError:
    return NonFiniteError(
        "an association test has no effect size",
        expected="targets whose associations differ",
        found=f"a standard deviation of {float(spread)}",
        remedy="choose a site where the texts differ, and token='mean' where all end alike",
    )
