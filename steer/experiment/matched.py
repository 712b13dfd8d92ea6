"""Matched random partners of a plan: other directions, the same geometry, an edit as large.

Random directions come out of two sources. An edit that adds a vector whatever the activation is (`Add`) is as large along any direction, so
its partner is isotropic. One that reads the activation (an ablation, a clamp) changes much along directions in which activations vary, and
next to nothing along isotropic ones; its partner lies between an isotropic frame and one made of random combinations of token states, where
the mean squared edit E|dh|^2 over the tokens of the experiment is that of the edit itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from steer.errors import ConfigError
from steer.features.operators.add_decoder import AddDecoder
from steer.intervene import Intervention, Operator, Plan
from steer.intervene.expansion import at_single_sites
from steer.intervene.low_rank import LowRank
from steer.intervene.operator import tensors_of_rows
from steer.intervene.operators.add import Add
from steer.intervene.operators.head_shift import HeadShift
from steer.model.accumulator import Accumulator
from steer.model.capture import capture
from steer.model.site import Site
from steer.model.tokens import Row

_CLOSE = 0.005  # difference of the matched quantity at which a partner is near enough
_TRIES = 32  # pairs of frames, before an edit counts as one that no random direction matches
_MOST_TOKENS = 2048

States = Mapping[Site, Tensor]


class _Tokens(Accumulator):
    """The activations of the first tokens, [tokens, width] fp32."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.missing = _MOST_TOKENS

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        taken = h[weight.bool()][: self.missing].float().cpu()
        self.missing -= len(taken)
        self.parts.append(taken)


def sites_of(plan: Plan, model: nn.Module) -> list[Site]:
    """Every site of a plan in a model, once."""
    return list(dict.fromkeys(each.single_site for group in at_single_sites(plan.interventions, model) for each in group))


def states_at(model: nn.Module, sites: Sequence[Site], rows: Sequence[Row]) -> dict[Site, Tensor]:
    """Activations at sites, [tokens, width] each, on up to 2,048 tokens of the texts."""
    if not rows:
        raise _no_texts(sites)
    read = {site: _Tokens() for site in sites}
    capture(model, rows, dict(read), span="all")
    return {site: torch.cat(tokens.parts) for site, tokens in read.items()}


def edit_norms(plan: Plan, model: nn.Module, states: States) -> dict[str, float]:
    """Root mean square of |dh| over tokens, sites and row slots, by intervention: at full scope, before gates and schedules.

    Args:
        states: as `states_at` gives them.
    """
    norms = {}
    for intervention, placed in zip(plan.interventions, at_single_sites(plan.interventions, model), strict=True):
        of_sites = [_energy(intervention.operator, intervention.strength, states[each.single_site]) for each in placed]
        norms[intervention.name] = math.sqrt(sum(of_sites) / len(of_sites))
    return norms


def random_partner(plan: Plan, model: nn.Module, states: States, seed: int) -> Plan:
    """The same plan along random directions: same sites, scopes, strengths and norms, same angles within an operator, and edits as large.

    Args:
        states: as `states_at` gives them, for edits that read the activation.
        seed: of the directions.

    Raises:
        ConfigError: an operator of which no random partner is known, or an edit that no random direction matches.
    """
    made: dict[tuple[int, ...], Operator] = {}  # tensors that several interventions share stay shared
    partners = []
    for number, (intervention, placed) in enumerate(zip(plan.interventions, at_single_sites(plan.interventions, model), strict=True)):
        operator = intervention.operator
        tensors = tuple(map(id, operator.tensors.values()))
        if tensors not in made:
            generator = generator_of("plan", seed, number)
            of_sites = [states[each.single_site] for each in placed] if isinstance(operator, LowRank) else []
            made[tensors] = _random_operator(intervention, of_sites, generator)
        partners.append(intervention.unchecked(operator=made[tensors]))
    return Plan(partners, fingerprint=plan.fingerprint, step=plan.step)


def generator_of(kind: str, seed: int, number: int = 0) -> torch.Generator:
    """Random numbers of a control draw; not those of `torch.manual_seed(seed)`, with which a user may have made what is to be matched."""
    digest = hashlib.sha256(f"matched {kind} {seed} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def random_factors(out: int, width: int, rank: int, norm: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """L [out, rank] and R [width, rank] of a random matrix L R^T with a Frobenius norm."""
    left, right = torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator)
    made = float((left @ right).norm())
    return left * (norm / made if made else 0.0), right.mT


# ---- one operator


def _random_operator(intervention: Intervention, states: list[Tensor], generator: torch.Generator) -> Operator:
    operator = intervention.operator
    if isinstance(operator, LowRank):
        return _like_it_in_energy(intervention, states, generator)
    if isinstance(operator, AddDecoder):  # whose name would say that a random direction is the decoder of its features
        operator = Add(operator.tensors["vector"].detach())
    if isinstance(operator, Add):
        frame = _isotropic(_rank(operator.tensors["vector"]), operator.width, generator)
        if isinstance(operator, HeadShift):  # stays in its heads
            kept = torch.zeros(operator.n_heads, operator.width // operator.n_heads)
            kept[list(operator.heads)] = 1
            frame = frame * kept.flatten()
        return _with_frame(operator, ["vector"], frame)
    raise _no_partner(intervention)


def _like_it_in_energy(intervention: Intervention, states: list[Tensor], generator: torch.Generator) -> Operator:
    """Turns a frame from isotropic directions to directions of token states until the edit is as large."""
    operator, strength = intervention.operator, intervention.strength
    assert isinstance(operator, LowRank)
    names = [name for name in dict.fromkeys((operator.reads, operator.writes, "step")) if name in operator.tensors]
    rank = _rank(torch.cat([operator.tensors[name].detach().flatten(0, -2) for name in names]))
    pool = torch.cat(states)
    pool = pool - pool.mean(0)

    def energy(candidate: Operator) -> float:
        return sum(_energy(candidate, strength, of_site) for of_site in states)

    wanted, seen = energy(operator), []
    for _ in range(_TRIES):
        ends = (_isotropic(rank, operator.width, generator), torch.randn(rank, len(pool), generator=generator) @ pool)
        low, high = (_with_frame(operator, names, end) for end in ends)
        seen += [energy(low), energy(high)]
        if not min(seen[-2:]) <= wanted <= max(seen[-2:]):
            continue
        rises = seen[-1] > seen[-2]
        below, above = 0.0, 1.0
        for _ in range(40):
            share = (below + above) / 2
            turned = _with_frame(operator, names, (1 - share) * _unit(ends[0]) + share * _unit(ends[1]))
            reached = energy(turned)
            if abs(reached - wanted) <= _CLOSE * wanted:
                return turned
            below, above = (share, above) if (reached < wanted) == rises else (below, share)
    raise _out_of_reach(intervention, wanted, seen)


def _with_frame(operator: Operator, names: Sequence[str], frame: Tensor) -> Operator:
    """A copy whose tensors have the same coordinates in another orthonormal frame: norms and angles between all of them stay.

    Args:
        names: tensors [..., width].
        frame: [rank or more, width], not yet orthonormal.
    """
    rows = torch.cat([operator.tensors[name].detach().flatten(0, -2).double() for name in names])  # [rows, width]
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    rank = _rank(rows)
    coordinates = u[:, :rank] * s[:rank]  # [rows, rank]
    orthonormal = torch.linalg.qr(frame[:rank].double().mT)[0].mT  # [rank, width]
    turned = coordinates @ orthonormal
    copied = operator.copy({})
    start = 0
    for name in names:
        old = operator.tensors[name]
        stop = start + old.numel() // operator.width
        copied.tensors[name] = turned[start:stop].reshape(old.shape).to(old.dtype)
        start = stop
    return copied


def _energy(operator: Operator, strengths: Sequence[float], states: Tensor) -> float:
    """Mean of |dh|^2 over tokens and row slots."""
    slots = max(operator.slots, len(strengths))
    h = states.expand(slots, -1, -1)  # [slots, tokens, width]
    strength = torch.tensor(strengths).expand(slots)[:, None, None]
    with torch.no_grad():
        tensors = {name: tensor.to(h.device) for name, tensor in operator.tensors.items()}
        edited = operator.apply(h, strength, None, tensors_of_rows(tensors, torch.arange(slots)))
    return float((edited - h).double().square().sum(-1).mean())


def _rank(rows: Tensor) -> int:
    return max(1, int(torch.linalg.matrix_rank(rows.detach().flatten(0, -2).double())))


def _isotropic(rank: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rank, width, generator=generator)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


# ---- errors


def _no_texts(sites: Sequence[Site]) -> ConfigError:
    return ConfigError(
        "there are no texts on which the size of an edit could be measured",
        expected="an outcome whose items have a `prompt` or a `text`",
        found=f"none, for edits at {', '.join(map(str, sites))}",
        remedy="add such an outcome, or leave the matched controls out",
    )


def _no_partner(intervention: Intervention) -> ConfigError:
    return ConfigError(
        f"no matched random partner of '{intervention.name}' can be made",
        expected="an operator that adds a vector, or one that reads and writes along directions",
        found=f"'{intervention.operator.name}'",
        remedy="write the control yourself, as an arm with a plan of its own; `random_features` of steer.features draws features",
    )


def _out_of_reach(intervention: Intervention, wanted: float, seen: list[float]) -> ConfigError:
    return ConfigError(
        f"no random direction matches '{intervention.name}'",
        expected=f"an edit with E|dh|^2 = {wanted:.4g}",
        found=f"{min(seen):.4g} to {max(seen):.4g} along {len(seen)} random directions",
        remedy="the edit is larger or smaller than any at random: lower its strength, or write the control yourself",
    )
