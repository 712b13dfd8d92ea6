"""On the embedded model: what is read off real texts steers others, more than chance does, and can be erased."""

import pytest
import torch

from steer.directions import ContrastSet, dose_curve, extract_all, fit_erasure
from steer.directions.heldout import auc
from steer.directions.sweep import pair_gaps
from steer.experiment.data import DataSet
from steer.model.capture import capture, pool
from steer.model.site import Site
from steer.model.tokens import Row, plain

SITE = "layers.15.output"


class Pooled:
    def __init__(self, texts: int) -> None:
        self.values = torch.zeros(texts, 576)

    def update(self, h: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> None:
        self.values[rows] = pool(h, weight)


@pytest.mark.real
def test_a_real_direction_reads_steers_and_is_erased(smollm2):
    model, tokenizer = smollm2
    data = DataSet("tone")
    short = sorted(data.split("contrast"), key=lambda pair: sum(map(len, pair.values())))[:12]
    contrast = ContrastSet.from_pairs(tokenizer, short)
    made_of, choosing = contrast.split(0.25, seed=0)
    by_method = extract_all(model, made_of, [SITE], name="tone", methods=["caa", "lda", "logistic"], holdout=0.3, progress=False)
    assert all(directions[SITE].metrics["auc"] >= 0.8 for directions in by_method.values())
    direction = by_method["caa"][SITE]
    neutral = [Row(plain(tokenizer, row["text"]).ids[:12], 1) for row in data.split("neutral_text")[:2]]
    curve = dose_curve(model, direction, choosing, neutral, doses=(0.3,), progress=False)
    (strong,) = curve.points
    assert strong.kl > curve.max_kl and strong.perplexity_ratio > 1 and not curve.working  # far too strong
    noise = torch.randn(576, generator=torch.Generator().manual_seed(0))
    noise *= strong.strength * direction.vector.norm() / noise.norm()
    random = float(pair_gaps(model, direction, choosing, noise[None]).mean()) - curve.gap
    assert strong.effect > max(random, 0) + 0.1

    few = ContrastSet(made_of.positive[:6], made_of.negative[:6], paired=True)
    eraser = fit_erasure(model, few, [SITE], progress=False)[Site.parse(SITE)]
    rows, sides = choosing.rows()
    pooled, side = Pooled(len(rows)), torch.tensor(sides)
    capture(model, rows, {Site.parse(SITE): pooled})
    assert eraser.left.shape == (1, 576)
    before, after = (x @ eraser.right[0].double() for x in (pooled.values.double(), eraser(pooled.values).double()))
    assert auc(before[side], before[~side]) >= 0.9
    assert float((after[side].mean() - after[~side].mean()).abs()) < 1e-3 * float((before[side].mean() - before[~side].mean()).abs())
