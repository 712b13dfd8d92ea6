"""Extractors that solve in the span of few texts give what they give with whole [width, width] matrices."""

import pytest
import torch
from concept_erasure import LeaceFitter
from directions.direction_helpers import moments_of

from steer.directions import EXTRACTORS
from steer.directions.erasure import _projections
from steer.directions.moments import ContrastMoments, Moments
from steer.directions.scatter import Scatter

SHAPES = [(24, 100), (60, 61), (12, 300)]  # texts, width


def texts(n: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns correlated texts far from zero, and a mask of the positive ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator) @ torch.randn(width, width, generator=generator) / width**0.5 + 5
    side = torch.arange(n) % 2 == 0
    x[side, :4] += 2
    return x, side


def dense(moments: ContrastMoments) -> ContrastMoments:
    """The same moments with matrices in place of the texts."""
    x = moments.texts.double()
    differences = x[moments.is_positive] - x[~moments.is_positive]
    moments.all = Moments(len(x), x.sum(0), x.mT @ x)
    moments.differences = Moments(len(differences), differences.sum(0), differences.mT @ differences)
    return moments


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("n", "width"), SHAPES)
@pytest.mark.parametrize("method", ["lda", "pca", "pca_centred", "leace"])
def test_few_texts_give_the_dense_solution(method, n, width, paired):
    x, side = texts(n, width)
    extractor = EXTRACTORS.get(method)
    few = extractor.read(method, moments_of(x, side, paired, extractor.needs))
    exact = extractor.read(method, dense(moments_of(x, side, paired, extractor.needs)))
    few = few * torch.sign(few @ exact)
    assert float((few - exact).norm() / exact.norm()) < (1e-6 if method == "leace" else 1e-11)  # an eraser is kept in fp32


@pytest.mark.parametrize(("n", "width"), SHAPES)
def test_an_eraser_of_few_texts_is_that_of_the_package(n, width):
    x, side = texts(n, width)
    left, right = _projections(moments_of(x, side, True, ("scatter",)))
    eraser = LeaceFitter.fit(x.double(), side.double()).eraser
    expected = eraser.proj_left @ eraser.proj_right
    assert float((left.mT @ right - expected).norm() / expected.norm()) < 1e-10


def test_no_matrix_is_kept_where_the_texts_are_fewer():
    x, side = texts(24, 100)
    moments = moments_of(x, side, True, ("scatter", "differences"))
    assert moments.all.second is None and moments.differences.second is None and moments.texts.shape == (24, 100)
    assert moments_of(x[:, :20], side, True, ("scatter",)).texts is None


def test_a_scatter_says_the_same_in_both_forms():
    rows = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[5] = rows[4]  # a text that adds no dimension
    few, full = Scatter(rows=rows), Scatter(dense=rows.mT @ rows)
    vector = torch.arange(10.0, dtype=torch.float64)
    assert torch.allclose(few.matrix, full.matrix) and few.width == full.width == 10
    assert torch.allclose(few.trace, full.trace) and torch.allclose(few.squared_norm, full.squared_norm)
    assert torch.allclose(few.eigen[0][:5], full.eigen[0][:5])
    assert torch.allclose(few.solve(vector, scale=0.5, ridge=0.1), full.solve(vector, scale=0.5, ridge=0.1))
