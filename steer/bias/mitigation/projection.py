"""Projection: the mean difference of pairs is taken out of activations, about what they are on neutral text.

The direction is that of Bolukbasi et al. 2016 (arXiv 1607.06520) carried from word embeddings to the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from steer.bias.debiasing import MITIGATIONS, PlanMitigation, Sites
from steer.bias.gender_texts import gender_prompts
from steer.bias.mitigation._plans import Origin, moments_at, plan_mitigation, sites_of, span_out, unit
from steer.bias.texts import Pairs, contrast_of
from steer.directions.extract import scaled
from steer.model.tokens import Row


@MITIGATIONS.register("projection")
def projection(
    model: nn.Module,
    texts: Pairs | None,
    tokenizer: Any,
    *,
    site: Sites | None = None,
    span: str | int = "last",
    about: str = "neutral",
    neutral: Sequence[str] | Sequence[Row] | None = None,
) -> PlanMitigation:
    """Mean difference of pairs projected out of the residual stream, about the mean of neutral text.

    Args:
        texts: at least 2 pairs, or two groups of texts as a contrast set; beginnings of sentences when None.
        site: one site, a pattern, or a list of them; `layers.<n>.output` at 87 % of the depth when None.
        span: tokens of a text that are averaged, see `steer.extract`.
        about, neutral: see `Origin`.

    Raises:
        ContrastError: too few pairs, or no difference at a site. ConfigError, SiteError.
    """
    contrast = contrast_of(gender_prompts() if texts is None else texts, tokenizer, least=2, paired=False)
    origin = Origin(model, tokenizer, about, neutral)
    operators = {
        site: span_out(unit(scaled(moments.gap, moments, site))[None], origin.at(site, moments))
        for site, moments in moments_at(model, contrast, sites_of(model, site), span).items()
    }
    return plan_mitigation("projection", "mean difference projected out", model, contrast, operators, span=span, **origin.facts())
