"""Choice among candidate directions by what they do to the model (Arditi et al. 2024, arXiv 2406.11717, section 2.3 and appendix C).

A behaviour is told by the tokens that open it, as "I" opens a refusal: its score is the log-odds that the next token is one of them. A
direction that carries the behaviour removes it when it is ablated everywhere from prompts that show it (bypass), and brings it about
when it is added to prompts that do not (induce), while ablation leaves neutral prompts alone (KL).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import number_within, of_type, whole_number
from steer.directions.direction import Direction, check_direction
from steer.directions.dose import divergence
from steer.directions.sweep import sweep, sweep_plan
from steer.errors import ConfigError, ContrastError, WidthError
from steer.intervene import Intervention, Plan
from steer.intervene.operators.ablate import Ablate
from steer.model.anatomy import Anatomy
from steer.model.site import Site
from steer.model.tokens import Row, check_rows

SLOTS = 12  # candidates measured in one batch, beside the unsteered model


@dataclass(frozen=True)
class Candidate:
    """What one direction does.

    Attributes:
        bypass: score on prompts that show the behaviour, the direction ablated; lower is better.
        induce: score on prompts that do not, the direction added; higher is better.
        kl: mean KL divergence of the next token on neutral prompts when it is ablated, in nat.
        rejected: why it may not be chosen; empty when it may.
    """

    site: str
    span: str | int
    method: str
    bypass: float
    induce: float
    kl: float
    rejected: str


@dataclass(frozen=True)
class Selection:
    """All candidates, and the one to take.

    Attributes:
        candidates: in the order in which they were given; `directions` likewise.
        showing, lacking: score of the unsteered model on prompts that show the behaviour and on those that do not.
    """

    candidates: tuple[Candidate, ...]
    directions: tuple[Direction, ...]
    showing: float
    lacking: float

    @property
    def chosen(self) -> Direction:
        """The candidate with the lowest bypass score among those that were not rejected. Raises ConfigError when all were."""
        left = [i for i, one in enumerate(self.candidates) if not one.rejected]
        if not left:
            raise ConfigError(
                "no candidate may be chosen",
                expected="one that induces the behaviour, is not too late in the model and leaves neutral prompts alone",
                found="; ".join(f"{one.site} ({one.span}): {one.rejected}" for one in self.candidates),
                remedy="give more candidates (sites, spans), other prompts, or a larger max_kl",
            )
        return self.directions[min(left, key=lambda i: self.candidates[i].bypass)]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        made = [asdict(one) for one in self.candidates]
        chosen = None if all(one.rejected for one in self.candidates) else self.directions.index(self.chosen)
        return {"candidates": made, "chosen": chosen, "showing": self.showing, "lacking": self.lacking}


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
        candidates: directions of the residual stream, of any sites and spans (token positions).
        showing: prompts on which the model behaves so; lacking: prompts on which it does not; both apart from those that made the
            candidates. See `steer.model.tokens.encode`.
        tokens: ids of the tokens that open the behaviour, each counted once.
        neutral: prompts on which ablation should change nothing; `lacking` when not given.
        max_kl: the most that ablation may change them.
        last: the share of the layers, from the end, whose candidates are rejected: there it is the token itself that is steered.

    Raises:
        ConfigError: no candidates, no tokens, or such as the model does not have; a limit out of its range.
        ContrastError: prompts that a candidate was made from, or none.
        WidthError: a candidate that is no direction of the residual stream.
    """
    neutral = lacking if neutral is None else neutral
    anatomy = Anatomy.find(model)
    _check(anatomy, candidates, tokens, {"showing": showing, "lacking": lacking, "neutral": neutral})
    number_within(max_kl, "max_kl", 0)
    number_within(last, "the share of the layers that is too late", 0, 1)
    opening = sorted(set(tokens))

    def log_odds(logprobs: Tensor) -> Tensor:
        p = logprobs[:, opening].double().logsumexp(-1).clamp(max=-1e-9)
        return p - torch.log(-torch.expm1(p))

    bypass, induce, kl = torch.zeros(3, len(candidates), dtype=torch.float64)
    before = torch.zeros(2, dtype=torch.float64)
    everywhere = anatomy.sites("embed", "layers.*.attn.output", "layers.*.mlp.output")  # all that is ever written to the residual stream
    for chunk in torch.arange(len(candidates)).split(SLOTS):
        vectors = torch.stack([candidates[i].vector for i in chunk])

        def ablated(vectors: Tensor = vectors) -> Plan:
            slots = torch.cat([vectors[:1], vectors])[:, None]
            strength = [0.0] + [1.0] * len(vectors)
            return Plan([Intervention(Ablate(slots), site, strength=strength) for site in everywhere])

        odds = _mean_score(model, ablated(), showing, len(chunk) + 1, log_odds, "bypass" if progress else None)
        before[0], bypass[chunk] = odds[0], odds[1:]
        kl[chunk] = _mean_score(model, ablated(), neutral, len(chunk) + 1, _from_first, "side effects" if progress else None)[1:]
    for site in {candidate.site for candidate in candidates}:
        for chunk in torch.tensor([i for i, one in enumerate(candidates) if one.site == site]).split(SLOTS):
            vectors = torch.stack([torch.zeros(anatomy.width), *(candidates[i].vector for i in chunk)])
            plan = sweep_plan(site, vectors, "all")
            odds = _mean_score(model, plan, lacking, len(vectors), log_odds, "induce" if progress else None)
            before[1], induce[chunk] = odds[0], odds[1:]
    limit = int(anatomy.n_layers * (1 - last))
    made = tuple(
        Candidate(
            site=str(one.site),
            span=one.span,
            method=one.method,
            bypass=float(bypass[i]),
            induce=float(induce[i]),
            kl=float(kl[i]),
            rejected=_rejected(_depth(anatomy, one.site) >= limit, float(induce[i]), float(kl[i]), max_kl),
        )
        for i, one in enumerate(candidates)
    )
    return Selection(made, tuple(candidates), float(before[0]), float(before[1]))


def _rejected(late: bool, induce: float, kl: float, max_kl: float) -> str:
    if late:
        return "too late in the model"
    if kl > max_kl:
        return f"KL {kl:.3g} is above {max_kl:g}"
    return "" if induce > 0 else f"adding it does not bring the behaviour about (log-odds {induce:.3g})"


def _depth(anatomy: Anatomy, site: Site) -> int:
    found = anatomy.point(site).site
    return found.layer if found.layer is not None else -1 if found.part == "embed" else anatomy.n_layers


def _from_first(logprobs: Tensor) -> Tensor:
    return divergence(logprobs[:1], logprobs)


def _mean_score(
    model: nn.Module, plan: Plan, rows: Sequence[Row], slots: int, score: Callable[[Tensor], Tensor], progress: str | None
) -> Tensor:
    """[slots] fp64, mean over texts of a score of the next token's log-probabilities, [slots, vocabulary] -> [slots]."""
    total = torch.zeros(slots, dtype=torch.float64)

    def read(chosen: list[int], logits: Tensor, labels: Tensor) -> None:
        for place, i in enumerate(chosen):
            total.add_(score(logits[:, place, len(rows[i].ids) - 1].float().log_softmax(-1)).cpu())

    sweep(model, plan, rows, slots, read, progress=progress)
    return total / len(rows)


def _check(anatomy: Anatomy, candidates: Sequence[Direction], tokens: Sequence[int], prompts: dict[str, Sequence[Row]]) -> None:
    of_type(candidates, (list, tuple), "the candidates", "pass a list of Direction; of Directions, list(directions.values())")
    of_type(tokens, (list, tuple), "the tokens that open the behaviour", "pass a list of token ids")
    for one in candidates:
        check_direction(one)
    for what, rows in prompts.items():
        check_rows(rows, f"the prompts in `{what}`")
    if not candidates or not tokens:
        raise ConfigError(
            "nothing to select" if not candidates else "no token opens the behaviour",
            expected="at least one candidate and one token id",
            found=f"{len(candidates)} candidates, {len(tokens)} tokens",
            remedy="extract directions at several sites, and look up the first tokens of answers that show the behaviour",
        )
    _check_tokens(tokens, anatomy.point("logits").width or anatomy.config.vocab_size)
    for one in candidates:
        if len(one.vector) != anatomy.width:
            raise WidthError(
                f"'{one.site}' is no direction of the residual stream",
                expected=f"width {anatomy.width}, since it is ablated wherever the model writes to it",
                found=len(one.vector),
                remedy="give candidates of layers.<n>.output, input, attn.output or mlp.output",
            )
        for what, rows in prompts.items():
            one.check_unseen(rows, f"the prompts in `{what}`")
    if empty := [what for what, rows in prompts.items() if not rows]:
        raise ContrastError(
            f"no prompts in `{empty[0]}`", expected="at least one", found="none", remedy="give prompts made with steer.model.tokens.encode"
        )


def _check_tokens(tokens: Sequence[int], vocabulary: int) -> None:
    for token in tokens:
        whole_number(token, "a token that opens the behaviour")
    beyond = sorted({token for token in tokens if token >= vocabulary})
    if beyond or len(set(tokens)) == vocabulary:
        raise ConfigError(
            "tokens that the model does not have" if beyond else "every token opens the behaviour, and none is left to tell it from",
            expected=f"some of the ids 0 to {vocabulary - 1}",
            found=beyond or f"all {vocabulary}",
            remedy="look up the first tokens of answers that show the behaviour, with the tokenizer of this model",
        )
