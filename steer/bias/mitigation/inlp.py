"""Iterative nullspace projection, INLP (Ravfogel et al. 2020, arXiv 2004.07667): classifier after classifier is projected out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.bias.debiasing import MITIGATIONS, PlanMitigation, Sites
from steer.bias.gender_texts import gender_prompts
from steer.bias.mitigation._plans import Origin, moments_at, plan_mitigation, sites_of, span_out
from steer.bias.texts import Pairs, contrast_of
from steer.checks import whole_number
from steer.directions.extractor import extractor_of
from steer.directions.moments import ContrastMoments
from steer.errors import ContrastError
from steer.model.site import Site
from steer.model.tokens import Row

CLASSIFIER = "logistic"  # an extractor; the paper leaves the choice of the linear classifier open


@MITIGATIONS.register("inlp")
def inlp(
    model: nn.Module,
    texts: Pairs | None,
    tokenizer: Any,
    *,
    site: Sites | None = None,
    classifiers: int = 8,
    span: str | int = "last",
    about: str = "zero",
    neutral: Sequence[str] | Sequence[Row] | None = None,
) -> PlanMitigation:
    """Iterative nullspace projection (INLP): activations are projected to where none of several linear classifiers sees the group.

    Each classifier (logistic regression) is trained on what the ones before it left, so that their weights are at right angles and the
    intersection of their nullspaces is what remains when their span is ablated.

    Args:
        texts: more pairs than classifiers, or two such groups of texts as a contrast set; beginnings of sentences when None.
        classifiers: how many. Fewer are used where nothing is left that tells the groups apart; `facts` say how many.
        site, span: as of `projection`.
        about, neutral: see `Origin`; the method itself projects about zero.

    Raises:
        ContrastError: too few texts, one group alone, or no difference at a site. ConfigError: scikit-learn is missing. SiteError.
    """
    whole_number(classifiers, "`classifiers` of inlp", least=1)
    extractor_of(CLASSIFIER).check(CLASSIFIER, paired=False)
    contrast = contrast_of(gender_prompts() if texts is None else texts, tokenizer, least=classifiers + 1, paired=False)
    origin = Origin(model, tokenizer, about, neutral)
    operators = {}
    accuracies = {}
    for at, moments in moments_at(model, contrast, sites_of(model, site), span, "texts").items():
        rows, accuracies[str(at)] = classifier_weights(moments, classifiers, at)
        operators[at] = span_out(rows, origin.at(at, moments))
    facts = {"classifiers": classifiers, "span": span, "training_accuracy": accuracies, **origin.facts()}
    return plan_mitigation("inlp", f"INLP, {classifiers} classifiers", model, contrast, operators, **facts)


def classifier_weights(moments: ContrastMoments, classifiers: int, site: Site) -> tuple[Tensor, list[float]]:
    """[at most `classifiers`, width] orthonormal weights, and the accuracy of each classifier on its own texts.

    Raises:
        ContrastError: the groups do not differ at all.
    """
    x = moments.collected().double()  # [texts, width]
    size = float(torch.linalg.vector_norm(x - x.mean(0)))
    found = torch.empty(0, x.shape[1], dtype=torch.float64)
    accuracies = []
    for _ in range(classifiers):
        if float(torch.linalg.vector_norm(_gap(x, moments.is_positive))) <= 1e-6 * size:
            break
        weight = _classifier(x, moments.is_positive)
        weight = weight - found.mT @ (found @ weight)  # at right angles but for rounding
        weight = weight / torch.linalg.vector_norm(weight)
        accuracies.append(_accuracy(x @ weight, moments.is_positive))
        x = x - torch.outer(x @ weight, weight)
        found = torch.cat([found, weight[None]])
    if not accuracies:
        raise _no_difference(site)
    return found, accuracies


def _gap(x: Tensor, is_positive: Tensor) -> Tensor:
    return x[is_positive].mean(0) - x[~is_positive].mean(0)


def _classifier(x: Tensor, is_positive: Tensor) -> Tensor:
    """[width] weights of a linear classifier. x: [texts, width]."""
    moments = ContrastMoments(is_positive, False, ("texts",))
    moments.update(x.float()[:, None], torch.ones(len(x), 1), torch.arange(len(x)))
    return extractor_of(CLASSIFIER).read(CLASSIFIER, moments)


def _accuracy(scores: Tensor, is_positive: Tensor) -> float:
    """Share of texts on the right side of the middle between the two class means. scores: [texts]."""
    middle = (scores[is_positive].mean() + scores[~is_positive].mean()) / 2
    return float(((scores > middle) == is_positive).double().mean())


# ---- errors


def _no_difference(site: Site) -> ContrastError:
    return ContrastError(
        f"the two groups do not differ at '{site}'",
        expected="activations that a classifier could tell apart",
        found="class means in the same place",
        remedy="use another site or span, or texts that differ there",
    )
