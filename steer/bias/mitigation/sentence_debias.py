"""SentenceDebias (Liang et al. 2020, arXiv 2007.08100): principal components of pair-centred sentence representations are subtracted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.bias.debiasing import MITIGATIONS, PlanMitigation, Sites
from steer.bias.gender_texts import gender_sentences
from steer.bias.mitigation._plans import Origin, moments_at, plan_mitigation, sites_of, span_out
from steer.bias.texts import Pairs, contrast_of
from steer.checks import whole_number
from steer.directions.moments import ContrastMoments
from steer.directions.scatter import Scatter
from steer.errors import ContrastError
from steer.model.site import Site
from steer.model.tokens import Row


@MITIGATIONS.register("sentence_debias")
def sentence_debias(
    model: nn.Module,
    texts: Pairs | None,
    tokenizer: Any,
    *,
    site: Sites | None = None,
    components: int = 1,
    span: str | int = "response",
    about: str = "zero",
    neutral: Sequence[str] | Sequence[Row] | None = None,
) -> PlanMitigation:
    """SentenceDebias: the first principal components of pair-centred sentence representations projected out.

    A sentence is represented by the mean over its span, scaled to length 1.

    Args:
        texts: more pairs than components; whole sentences when None.
        components: how many principal components are subtracted.
        site: as of `projection`. span: all tokens but the first of a text of one's own, unless said otherwise.
        about, neutral: see `Origin`; the method itself subtracts about zero.

    Raises:
        ContrastError: too few pairs, or pairs that differ along fewer directions. ConfigError, SiteError.
    """
    whole_number(components, "`components` of sentence_debias", least=1)
    contrast = contrast_of(gender_sentences() if texts is None else texts, tokenizer, least=components + 1)
    origin = Origin(model, tokenizer, about, neutral)
    operators = {}
    shares = {}
    for at, moments in moments_at(model, contrast, sites_of(model, site), span, "texts").items():
        rows, shares[str(at)] = principal(moments, components, at)
        operators[at] = span_out(rows, origin.at(at, moments))
    facts = {"components": components, "span": span, "share_of_variance": shares, **origin.facts()}
    what = f"SentenceDebias, {components} component{'s' * (components > 1)}"
    return plan_mitigation("sentence_debias", what, model, contrast, operators, **facts)


def principal(moments: ContrastMoments, components: int, site: Site) -> tuple[Tensor, float]:
    """[components, width] first principal directions of the pair-centred unit representations, and their share of the variance."""
    texts = moments.collected().double()
    texts = texts / torch.linalg.vector_norm(texts, dim=1, keepdim=True)
    # centred on its own midpoint, a pair is half its difference and minus that: the difference alone has the same directions
    values, vectors = Scatter(rows=texts[moments.is_positive] - texts[~moments.is_positive]).eigen
    if not float(values[0]) or float(values[components - 1]) <= 1e-12 * float(values[0]):
        raise _too_few_directions(site, components, int((values > 1e-12 * values[0]).sum()))
    return vectors[:components], float(values[:components].sum() / values.sum())


# ---- errors


def _too_few_directions(site: Site, components: int, found: int) -> ContrastError:
    return ContrastError(
        f"the pairs differ along too few directions at '{site}'",
        expected=f"{components}, one for each component",
        found=found,
        remedy="ask for fewer components, give other pairs, or use another site or span",
    )
