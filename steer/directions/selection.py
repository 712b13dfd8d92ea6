"""Choice among candidate directions by what they do to the model (Arditi et al. 2024, arXiv 2406.11717, section 2.3 and appendix C).

A behaviour is told by the tokens that open it, as "I" opens a refusal: its score is the log-odds that the next token is one of them. A
direction that carries the behaviour removes it when it is ablated everywhere from prompts that show it (bypass), and brings it about
when it is added to prompts that do not (induce), while ablation leaves neutral prompts alone (KL).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import number_within, of_type, whole_number
from steer.directions.direction import Direction, check_direction
from steer.directions.dose import divergence
from steer.directions.heldout import is_at_chance
from steer.directions.passes import SlottedPlan
from steer.directions.sweep import Predictions, sweep, sweep_plan, sweep_plans
from steer.errors import ConfigError, ContrastError, WidthError
from steer.intervene import Intervention, Plan
from steer.intervene.operators.ablate import Ablate
from steer.model.anatomy import Anatomy
from steer.model.site import Site
from steer.model.tokens import Row, check_rows

SLOTS = 16  # candidates measured in one batch, beside the unsteered model


@dataclass(frozen=True)
class Candidate:
    """What one direction does.

    Attributes:
        bypass: score on prompts that show the behaviour, the direction ablated; lower is better.
        induce: score on prompts that do not, the direction added; higher is better.
        kl: mean KL divergence of the next token on neutral prompts when it is ablated, in nat.
        rejected: why it may not be chosen; empty when it may.
        auc, held_out: its held-out AUC, None where that was not measured, and what was held out: `groups`, `texts` or `nothing`.
    """

    site: str
    span: str | int
    method: str
    bypass: float
    induce: float
    kl: float
    rejected: str
    auc: float | None = None
    held_out: str = "nothing"


@dataclass(frozen=True)
class Selection:
    """All candidates, and the one to take.

    Attributes:
        candidates: in the order in which they were given; `directions` likewise.
        showing, lacking: score of the unsteered model, log-odds in nat, on prompts that show the behaviour and on those that do not.

    Example:
        >>> tokens = [tokenizer.encode(" no")[0]]
        >>> candidates = list(directions.values())
        >>> selection = steer.select(model, candidates, showing=prompts[:4], lacking=prompts[4:], tokens=tokens, max_kl=50.0)
        >>> selection.showing - selection.lacking  # how far the unsteered model tells the two kinds of prompts apart
    """

    candidates: tuple[Candidate, ...]
    directions: tuple[Direction, ...]
    showing: float
    lacking: float

    def __repr__(self) -> str:
        rejected = sum(bool(candidate.rejected) for candidate in self.candidates)
        chosen = f", chosen: {self.chosen}" if rejected < len(self.candidates) else ""
        return f"Selection({len(self.candidates)} candidates, {rejected} rejected{chosen})"

    @property
    def chosen(self) -> Direction:
        """The candidate with the lowest bypass score among those that were not rejected. Raises ConfigError when all were."""
        eligible = [i for i, candidate in enumerate(self.candidates) if not candidate.rejected]
        if not eligible:
            raise _rejected_error(self.candidates)
        return self.directions[min(eligible, key=lambda i: self.candidates[i].bypass)]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        candidates = [asdict(candidate) for candidate in self.candidates]
        chosen = None if all(candidate.rejected for candidate in self.candidates) else self.directions.index(self.chosen)
        return {"candidates": candidates, "chosen": chosen, "showing": self.showing, "lacking": self.lacking}


def select(
    model: nn.Module,
    candidates: Sequence[Direction],
    *,
    showing: Sequence[Row],
    lacking: Sequence[Row],
    tokens: Sequence[int],
    neutral: Sequence[Row] | None = None,
    max_kl: float = 0.1,
    last: float = 0.2,
    progress: bool = True,
) -> Selection:
    """Measures what every candidate does to the first token of an answer; candidates share batches as row slots.

    Args:
        model: a causal language model, raw or wrapped.
        candidates: directions of the residual stream, of any sites and spans (token positions). One that was extracted with groups and is
            at chance on those it has not seen is rejected.
        showing: prompts on which the model behaves so; lacking: prompts on which it does not; both apart from those that made the
            candidates. See `steer.model.tokens.encode`.
        tokens: ids of the tokens that open the behaviour, each counted once.
        neutral: prompts on which ablation should change nothing; `lacking` when not given.
        max_kl: the most that ablation may change them, mean KL divergence of the next token in nat.
        last: the share of the layers, from the end, whose candidates are rejected: there it is the token itself that is steered.

    Raises:
        ConfigError: no candidates, no tokens, or such as the model does not have; a limit out of its range.
        ContrastError: prompts that a candidate was made from, or none.
        WidthError: a candidate that is no direction of the residual stream.

    Example:
        >>> tokens = [tokenizer.encode(" no")[0]]
        >>> candidates = list(directions.values())
        >>> selection = steer.select(model, candidates, showing=prompts[:4], lacking=prompts[4:], tokens=tokens, max_kl=50.0)
        >>> [(candidate.bypass, candidate.kl) for candidate in selection.candidates]
    """
    neutral = lacking if neutral is None else neutral
    anatomy = Anatomy.find(model)
    _check(anatomy, candidates, tokens, {"showing": showing, "lacking": lacking, "neutral": neutral})
    number_within(max_kl, "max_kl", 0)
    number_within(last, "the share of the layers that is too late", 0, 1)
    opening = sorted(set(tokens))
    before_showing, bypass, before_neutral, kl = _ablation_scores(model, anatomy, candidates, showing, neutral, opening, progress)
    induce, before_lacking = _addition_scores(model, anatomy, candidates, lacking, opening, progress, unsteered=neutral is not lacking)
    limit = int(anatomy.n_layers * (1 - last))
    measured = tuple(
        Candidate(
            site=str(direction.site),
            span=direction.span,
            method=direction.method,
            bypass=float(bypass[i]),
            induce=float(induce[i]),
            kl=float(kl[i]),
            rejected=_rejected(direction, _depth(anatomy, direction.site) >= limit, float(induce[i]), float(kl[i]), max_kl),
            auc=direction.metrics.get("auc"),
            held_out=direction.held_out,
        )
        for i, direction in enumerate(candidates)
    )
    showing_score, lacking_score = before_showing, before_neutral if before_lacking is None else before_lacking
    return Selection(measured, tuple(candidates), showing_score, lacking_score)


def _rejected(direction: Direction, late: bool, induce: float, kl: float, max_kl: float) -> str:
    if late:
        return "too late in the model"
    if direction.held_out == "groups" and "auc" in direction.metrics and is_at_chance(direction.metrics):
        return f"it reads no better than chance on groups that it has not seen (AUC {direction.metrics['auc']:.3g})"
    if kl > max_kl:
        return f"KL {kl:.3g} is above {max_kl:g}"
    return "" if induce > 0 else f"adding it does not bring the behaviour about (log-odds {induce:.3g})"


def _depth(anatomy: Anatomy, site: Site) -> int:
    """Block that a site belongs to: -1 before the first, the number of blocks after the last."""
    site = anatomy.point(site).site
    if site.layer is not None:
        return site.layer
    return -1 if site.part == "embed" else anatomy.n_layers


def log_odds(logprobs: Tensor, tokens: Sequence[int]) -> Tensor:
    """Log-odds that the next token is one of these, fp64. logprobs: [..., vocabulary] -> [...]."""
    p = logprobs[..., tokens].double().logsumexp(-1).clamp(max=-1e-9)
    return p - torch.log(-torch.expm1(p))


def _ablation_scores(
    model: nn.Module,
    anatomy: Anatomy,
    candidates: Sequence[Direction],
    showing: Sequence[Row],
    neutral: Sequence[Row],
    opening: Sequence[int],
    progress: bool,
) -> tuple[float, Tensor, float, Tensor]:
    """What ablating each candidate everywhere does.

    Returns:
        Mean score of the unsteered model on `showing`, [candidates] that of the ablated ones; mean score of the unsteered model on
        `neutral`, [candidates] KL divergence there.
    """
    everywhere = anatomy.written_sites()
    bypass, kl = torch.zeros(2, len(candidates), dtype=torch.float64)
    for chunk in torch.arange(len(candidates)).split(SLOTS):
        vectors = torch.stack([candidates[i].vector for i in chunk])
        operator = Ablate(torch.cat([vectors[:1], vectors])[:, None])
        strength = [0.0] + [1.0] * len(vectors)
        plan = Plan([Intervention(operator, site, strength=strength) for site in everywhere])
        sums = torch.zeros(3, len(strength), dtype=torch.float64)

        def read(predictions: Predictions, sums: Tensor = sums) -> None:
            shows = predictions.texts < len(showing)
            before = predictions.logits[0].float().log_softmax(-1)  # [texts, vocabulary]
            for slot, logits in enumerate(predictions.logits):
                logprobs = logits.float().log_softmax(-1)
                odds = log_odds(logprobs, opening).cpu()
                sums[0, slot] += odds[shows].sum()
                sums[1, slot] += odds[~shows].sum()
                sums[2, slot] += divergence(before, logprobs).cpu()[~shows].sum()

        texts = [*showing, *neutral]
        sweep(model, plan, texts, len(strength), read, predict="last", progress="ablating" if progress else None)
        bypass[chunk] = sums[0, 1:] / len(showing)
        kl[chunk] = sums[2, 1:] / len(neutral)
    return float(sums[0, 0]) / len(showing), bypass, float(sums[1, 0]) / len(neutral), kl


def _addition_scores(
    model: nn.Module,
    anatomy: Anatomy,
    candidates: Sequence[Direction],
    lacking: Sequence[Row],
    opening: Sequence[int],
    progress: bool,
    *,
    unsteered: bool,
) -> tuple[Tensor, float | None]:
    """What adding each candidate at its own site does: [candidates] mean score, and that of the unsteered model where it is asked for.

    Every site has a plan of its own, so that the later a candidate acts the less of the model runs for it.
    """
    by_site: dict[Site, list[int]] = {}
    for i in sorted(range(len(candidates)), key=lambda i: _depth(anatomy, candidates[i].site)):
        by_site.setdefault(candidates[i].site, []).append(i)
    plans: list[SlottedPlan] = []
    owners: list[list[int]] = []  # candidate of each slot
    for site, members in by_site.items():
        for start in range(0, len(members), SLOTS):
            owners.append(members[start : start + SLOTS])
            vectors = torch.stack([candidates[i].vector for i in owners[-1]])
            plans.append(SlottedPlan(sweep_plan(site, vectors, "all"), len(vectors)))
    if unsteered:  # at the last site, where it costs least
        owners.append([len(candidates)])
        plans.append(SlottedPlan(sweep_plan(site, torch.zeros(1, anatomy.width), "all"), 1))
    sums = torch.zeros(len(candidates) + 1, dtype=torch.float64)

    def read(predictions: Predictions) -> None:
        odds = log_odds(predictions.logits.float().log_softmax(-1), opening)  # [slots, texts]
        sums[owners[predictions.plan]] += odds.sum(1).cpu()

    sweep_plans(model, plans, lacking, read, predict="last", progress="adding" if progress else None)
    scores = sums / len(lacking)
    return scores[:-1], float(scores[-1]) if unsteered else None


def _check(anatomy: Anatomy, candidates: Sequence[Direction], tokens: Sequence[int], prompts: dict[str, Sequence[Row]]) -> None:
    of_type(candidates, (list, tuple), "the candidates", "pass a list of Direction; of Directions, list(directions.values())")
    of_type(tokens, (list, tuple), "the tokens that open the behaviour", "pass a list of token ids")
    for candidate in candidates:
        check_direction(candidate)
    for what, rows in prompts.items():
        check_rows(rows, f"the prompts in `{what}`")
    if not candidates or not tokens:
        raise _nothing_error(len(candidates), len(tokens))
    _check_tokens(tokens, anatomy.point("logits").width or anatomy.config.vocab_size)
    for candidate in candidates:
        if len(candidate.vector) != anatomy.width:
            raise _stream_error(candidate, anatomy.width)
        for what, rows in prompts.items():
            candidate.check_unseen(rows, f"the prompts in `{what}`")
    for what, rows in prompts.items():
        if not rows:
            raise _prompts_error(what)


def _check_tokens(tokens: Sequence[int], vocabulary: int) -> None:
    for token in tokens:
        whole_number(token, "a token that opens the behaviour")
    beyond = sorted({token for token in tokens if token >= vocabulary})
    if beyond or len(set(tokens)) == vocabulary:
        raise _vocabulary_error(beyond, vocabulary)


def _rejected_error(candidates: Sequence[Candidate]) -> ConfigError:
    return ConfigError(
        "no candidate may be chosen",
        expected="one that induces the behaviour, is not too late in the model and leaves neutral prompts alone",
        found="; ".join(f"{candidate.site} ({candidate.span}): {candidate.rejected}" for candidate in candidates),
        remedy="give more candidates (sites, spans), other prompts, or a larger max_kl",
    )


def _nothing_error(candidates: int, tokens: int) -> ConfigError:
    return ConfigError(
        "nothing to select" if not candidates else "no token opens the behaviour",
        expected="at least one candidate and one token id",
        found=f"{candidates} candidates, {tokens} tokens",
        remedy="extract directions at several sites, and look up the first tokens of answers that show the behaviour",
    )


def _stream_error(candidate: Direction, width: int) -> WidthError:
    return WidthError(
        f"'{candidate.site}' is no direction of the residual stream",
        expected=f"width {width}, since it is ablated wherever the model writes to it",
        found=len(candidate.vector),
        remedy="give candidates of layers.<n>.output, input, attn.output or mlp.output",
    )


def _prompts_error(what: str) -> ContrastError:
    return ContrastError(
        f"no prompts in `{what}`", expected="at least one", found="none", remedy="give prompts made with steer.model.tokens.encode"
    )


def _vocabulary_error(beyond: list[int], vocabulary: int) -> ConfigError:
    return ConfigError(
        "tokens that the model does not have" if beyond else "every token opens the behaviour, and none is left to tell it from",
        expected=f"some of the ids 0 to {vocabulary - 1}",
        found=beyond or f"all {vocabulary}",
        remedy="look up the first tokens of answers that show the behaviour, with the tokenizer of this model",
    )
