"""Damage of an ablation: the loss that it costs on neutral text, by source, beside random circuits of the same size.

Constants that were fitted on the text of the measurement hide the cost, so that texts which the ablation or the choice of the circuit has
seen are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from steer.checks import of_type, whole_number
from steer.circuits.ablation import MEAN, OPTIMAL
from steer.circuits.circuit import Circuit
from steer.circuits.text_overlap import overlapping
from steer.circuits.texts import Prompts, rows_of
from steer.errors import ConfigError
from steer.intervene import Plan
from steer.model.text_loss import LossChange, TextLosses, loss_change, pooled_change, text_losses
from steer.model.tokens import Row

LEAST_CONSTANT_TOKENS = 8_000
LEAST_TOKENS, LEAST_SOURCES = 16_000, 3


@dataclass(frozen=True, eq=False)
class Damage:
    """Change of the loss on neutral text.

    Attributes:
        by_source: of each source. pooled: over the tokens of all of them.
        random: pooled, of random circuits of the same size; empty for a plan.
        facts: strength, texts and whether an overlap could be looked for; JSON-able.

    Example:
        >>> found = damage(model, circuit, {"news": neutral[:4], "web": neutral[4:]})
        >>> found.pooled, found.random[0]  # of a random circuit of the same size
    """

    by_source: Mapping[str, LossChange]
    pooled: LossChange
    random: tuple[LossChange, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        sources = "; ".join(f"{name} {change.value:+.4f}" for name, change in self.by_source.items())
        of_random = f"; random {sum(change.value for change in self.random) / len(self.random):+.4f}" if self.random else ""
        return f"Damage({self.pooled}, {self.pooled.tokens} tokens; {sources}{of_random})"


def damage(
    model: nn.Module,
    ablated: Circuit | Plan,
    texts_by_source: Mapping[str, Prompts],
    *,
    strength: float = 1.0,
    tokenizer: Any = None,
    draws: int = 1,
    seed: int = 0,
    max_tokens: int = 2048,
) -> Damage:
    """What an ablation costs in nats per token of neutral text, with 95 % intervals from the same texts with and without it.

    Args:
        ablated: a circuit of which edges, or else components, are ablated; or any plan.
        texts_by_source: texts by the name of their source; at least 16,000 tokens of 3 sources tell something.
        draws: random circuits of the same size, ablated to the same kind of constants.

    Raises:
        ConfigError: a text shares a stretch with the constants of the ablation, or with what chose or taught the circuit; no texts; a
            circuit without an ablation; another strength than 1 for a plan, which has its own.

    Example:
        >>> damage(model, circuit, {"news": neutral[:4], "web": neutral[4:]})
    """
    of_type(texts_by_source, Mapping, "the texts of a damage", "pass texts by the name of their source")
    of_type(ablated, (Circuit, Plan), "what is ablated", "pass a circuit or a plan")
    whole_number(draws, "the number of random circuits")
    if isinstance(ablated, Plan) and strength != 1:
        raise _strength_of_plan(strength)
    sources = {name: rows_of(model, texts, tokenizer) for name, texts in texts_by_source.items()}
    if not sources or not all(sources.values()):
        raise _no_texts(sources)
    checked = _check_apart(ablated, sources)
    _warn_of_few(ablated, sources)
    before = _losses(model, sources, max_tokens)
    with _acting(model, ablated, strength):
        after = _losses(model, sources, max_tokens)
    of_random = []
    for number in range(draws if isinstance(ablated, Circuit) else 0):
        with _acting(model, ablated.random(seed + number), strength):  # type: ignore[union-attr]
            of_random.append(_pooled(before, _losses(model, sources, max_tokens)))
    by_source = {name: loss_change(before[name], after[name]) for name in sources}
    facts = {"strength": strength, "overlap_checked": checked, "draws": len(of_random), "seed": seed}
    return Damage(by_source, _pooled(before, after), tuple(of_random), facts)


def _losses(model: nn.Module, sources: Mapping[str, Sequence[Row]], max_tokens: int) -> dict[str, TextLosses]:
    return {name: text_losses(model, rows, max_tokens=max_tokens) for name, rows in sources.items()}


def _pooled(before: Mapping[str, TextLosses], after: Mapping[str, TextLosses]) -> LossChange:
    return pooled_change(list(before.values()), [after[name] for name in before])


def _acting(model: nn.Module, ablated: Circuit | Plan, strength: float) -> AbstractContextManager[Any]:
    if isinstance(ablated, Plan):
        return ablated.attached(model)
    if ablated.edges is not None:
        return ablated.edges_ablated(model, strength)
    return ablated.ablation_plan(model, strength).attached(model)


def _check_apart(ablated: Circuit | Plan, sources: Mapping[str, Sequence[Row]]) -> list[str]:
    """What the texts were compared with. Raises ConfigError."""
    checked: list[str] = []
    if isinstance(ablated, Plan):
        return checked
    constants = {} if ablated.ablation is None else ablated.ablation.facts
    chosen = [("the pairs that chose the circuit", "pairs"), ("the texts that chose the circuit", "texts")]
    seen = [("the constants of the ablation", constants), *((what, ablated.facts.get(name, {})) for what, name in chosen)]
    for what, facts in seen:
        hashes = facts.get("windows")
        if hashes is None:
            continue
        checked.append(what)
        for name, rows in sources.items():
            if shared := overlapping(rows, hashes):
                raise _overlap(name, what, shared, len(rows))
    return checked


def _warn_of_few(ablated: Circuit | Plan, sources: Mapping[str, Sequence[Row]]) -> None:
    tokens = sum(len(row.ids) for rows in sources.values() for row in rows)
    if tokens < LEAST_TOKENS or len(sources) < LEAST_SOURCES:
        warnings.warn(
            f"damage on {tokens} tokens of {len(sources)} sources says little: take at least {LEAST_TOKENS} tokens of {LEAST_SOURCES}",
            stacklevel=3,
        )
    ablation = ablated.ablation if isinstance(ablated, Circuit) else None
    known = ablation.facts.get("tokens") if ablation is not None and ablation.kind in (MEAN, OPTIMAL) else None
    if known is not None and known < LEAST_CONSTANT_TOKENS:
        warnings.warn(f"the constants of the ablation come from {known} tokens: take at least {LEAST_CONSTANT_TOKENS}", stacklevel=3)


# ---- errors


def _no_texts(sources: Mapping[str, Sequence[Row]]) -> ConfigError:
    return ConfigError("there is no text to measure damage on", expected="texts of each source",
                       found={name: len(rows) for name, rows in sources.items()}, remedy="e.g. {'news': [...], 'web': [...]}")  # fmt: skip


def _strength_of_plan(strength: float) -> ConfigError:
    return ConfigError("a plan has strengths of its own", expected="strength 1", found=strength,
                       remedy="make the plan with this strength: circuit.ablation_plan(model, strength)")  # fmt: skip


def _overlap(source: str, what: str, shared: Sequence[int], texts: int) -> ConfigError:
    return ConfigError(
        f"texts of '{source}' are among {what}, which would hide the damage",
        expected="texts used neither for constants nor for choosing the circuit",
        found=f"{len(shared)} of {texts} overlap, the first is number {shared[0]}",
        remedy="measure on other texts, or take the constants from others",
    )
