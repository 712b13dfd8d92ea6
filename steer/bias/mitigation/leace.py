"""Least-squares concept erasure, LEACE (Belrose et al. 2023, arXiv 2306.03819), of the group; see `steer.directions.erasure`."""

from __future__ import annotations

from typing import Any

from torch import nn

from steer.bias.debiasing import MITIGATIONS, PlanMitigation, Sites
from steer.bias.gender_texts import gender_prompts
from steer.bias.mitigation._plans import plan_mitigation, sites_of
from steer.bias.texts import Pairs, contrast_of
from steer.directions.erasure import fit_erasure
from steer.intervene.operators.erase import Erase


@MITIGATIONS.register("leace")
def leace(model: nn.Module, texts: Pairs | None, tokenizer: Any, *, site: Sites | None = None, span: str | int = "last") -> PlanMitigation:
    """Least-squares concept erasure (LEACE): no linear probe can tell the two groups apart afterwards, at the least change.

    Args:
        texts: at least 2 pairs, or two groups of texts as a contrast set; beginnings of sentences when None.
        site, span: as of `projection`.

    Raises:
        ContrastError: too few pairs, or too weak a difference. ConfigError: `concept-erasure` is missing. SiteError.
    """
    contrast = contrast_of(gender_prompts() if texts is None else texts, tokenizer, least=2, paired=False)
    erasures = fit_erasure(model, contrast, sites_of(model, site), span=span, progress=False)
    operators = {site: Erase(erasure.left, erasure.right, erasure.mean) for site, erasure in erasures.items()}
    return plan_mitigation("leace", "LEACE", model, contrast, operators, span=span)
