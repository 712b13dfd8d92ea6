"""What the methods that are plans share: sites, the text that is neither, and a span that is projected out at each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.bias.debiasing import PlanMitigation, Sites
from steer.bias.gender_texts import NEUTRAL_SENTENCES
from steer.bias.texts import running_text
from steer.checks import of_type, one_of
from steer.directions.at_words import token_states
from steer.directions.contrast import ContrastSet
from steer.directions.extract import read_moments
from steer.directions.moments import ContrastMoments
from steer.errors import ConfigError
from steer.intervene import Intervention, Operator, Plan
from steer.intervene.operators.ablate import Ablate
from steer.intervene.operators.erase import Erase
from steer.model.anatomy import Anatomy
from steer.model.site import Site
from steer.model.tokens import Row, check_rows, rows_hash

DEPTH = 0.87  # share of the blocks before the default site: late, where the pronoun to come is decided
ABOUT = ("neutral", "pairs", "zero")
SINK = 10  # tokens this many times as long as the median are attention sinks, whose mean would be that of all


def sites_of(model: nn.Module, site: Sites | None) -> list[Site]:
    """The sites that are named; one late in the residual stream when there is none. Raises SiteError for one that is not there."""
    anatomy = Anatomy.find(model)
    if site is None:
        site = f"layers.{min(round(DEPTH * anatomy.n_layers), anatomy.n_layers - 1)}.output"
    patterns = [site] if isinstance(site, str | Site) else site
    of_type(patterns, (list, tuple), "`site` of a mitigation", "pass a site such as 'layers.12.output', or a list of them")
    if not patterns:
        raise _no_site()
    return list(dict.fromkeys(anatomy.sites(*map(str, patterns))))


def moments_at(model: nn.Module, contrast: ContrastSet, sites: Sequence[Site], span: str | int, *needs: str) -> dict[Site, ContrastMoments]:
    """Moments of the texts at each site, see `steer.directions.moments`."""
    return read_moments(model, contrast, sites, span, set(needs), progress=False)


class Origin:
    """The point about which a span is projected out: what an edited activation has along it.

    Args:
        about: `neutral`, the mean over tokens of neutral text; `pairs`, the mean of the pairs; `zero`.
        neutral: texts or rows that speak of neither group; those of `steer.bias.gender_texts` when None.

    Raises:
        ConfigError: another word; neutral text that would not be used, or is none.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, about: str, neutral: Sequence[str] | Sequence[Row] | None) -> None:
        self.model = model
        self.about = one_of(about, ABOUT, "`about` of a mitigation")
        self.rows: list[Row] = []
        if about != "neutral":
            if neutral is not None:
                raise _unused_neutral(about)
            return
        neutral = NEUTRAL_SENTENCES if neutral is None else neutral
        of_type(neutral, (list, tuple), "the neutral texts of a mitigation", "pass a list of texts or rows")
        if not neutral:
            raise _no_neutral()
        if all(isinstance(text, str) for text in neutral):
            neutral = [running_text(tokenizer, str(text)) for text in neutral]
        check_rows(neutral, "the neutral texts of a mitigation")
        self.rows = list(neutral)  # type: ignore[arg-type]

    def at(self, site: Site, moments: ContrastMoments) -> Tensor | None:
        """[width] fp32; None for zero."""
        if self.about == "zero":
            return None
        if self.about == "pairs":
            return moments.mean.float()
        states, _, places = token_states(self.model, self.rows, site)  # [tokens, width]
        length = states.norm(dim=1)
        return states[(places > 0) & (length < SINK * length.median())].mean(0)

    def facts(self) -> dict[str, Any]:
        neutral = {"neutral_texts": len(self.rows), "neutral_sha256": rows_hash(self.rows)} if self.rows else {}
        return {"about": self.about, **neutral}


def span_out(rows: Tensor, origin: Tensor | None) -> Operator:
    """Takes what an activation has in a span out of it, about zero or about an origin. rows: [rank, width], orthonormal."""
    if origin is None:
        return Ablate(rows.float())
    return Erase(rows.float(), rows.float(), origin)


def plan_mitigation(
    name: str, what: str, model: nn.Module, contrast: ContrastSet, operators: Mapping[Site, Operator], **facts: Any
) -> PlanMitigation:
    """A fitted plan with one operator a site, and what it was fitted on."""
    fingerprint = Anatomy.find(model).fingerprint()
    interventions = [Intervention(operator, site, name=f"{name}@{site}") for site, operator in operators.items()]
    known = {
        "method": name,
        "model": fingerprint,
        "sites": [str(site) for site in operators],
        "texts": len(contrast),
        "paired": contrast.paired,
        "texts_sha256": contrast.digest(),
    }
    return PlanMitigation(name=name, what=what, plan=Plan(interventions, fingerprint=fingerprint), facts={**known, **facts})


def unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector)


# ---- errors


def _no_site() -> ConfigError:
    return ConfigError("a mitigation has no site", expected="at least one", found="none", remedy="e.g. site='layers.12.output'")


def _unused_neutral(about: str) -> ConfigError:
    return ConfigError(
        "neutral texts that are not used",
        expected="about='neutral'",
        found=f"about='{about}'",
        remedy="leave the neutral texts out, or project about them",
    )


def _no_neutral() -> ConfigError:
    return ConfigError(
        "no neutral text to project about",
        expected="at least one text of several tokens",
        found="none",
        remedy="pass texts that speak of neither group, or leave `neutral` out",
    )
