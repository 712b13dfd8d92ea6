"""Guards: readings of what each edit would do to the rest of the model, and limits that stop it, take it back or warn.

The norm of the change of a weight says little: with no covariance at all the changes are smaller and do more damage. What is read instead
is how much the change moves the outputs for ordinary keys, and what the model then says about ordinary text.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from steer.checks import number_within, of_type, one_of
from steer.edits.edited_weights import EditedWeights
from steer.edits.editor import EditBench, Solution
from steer.edits.fact import Fact
from steer.errors import GuardError
from steer.model.capture import evaluating
from steer.model.devices import input_device
from steer.model.tokens import Row, collate, plain

MODES = ("stop", "roll_back", "warn")
NEUTRAL_TOKENS = 256
_ROW_TOKENS = 64  # of a text; longer ones are cut


class GuardWarning(UserWarning):
    """An edit beyond a limit of its guards, which was made all the same."""


@dataclass(frozen=True)
class Guards:
    """Limits of what an edit may do. None leaves a limit out; readings are made of all that can be read.

    Attributes:
        strength: the least share of what was asked that a fact may get, k^T A^-1 k.
        drift: the most that its change may move the outputs of the edited map for ordinary keys, as a share of these outputs:
            sqrt(tr(D C D^T) / tr(W0 C W0^T)), the largest over layers; W0 holds no edit.
        key_cosine: the largest cosine that its key may have with the key of an earlier edit.
        neutral_kl: the largest KL divergence, in nat per token, on `neutral_texts`, of all edits of one solve together.
        value_ratio: the most that the output which is written may be longer than outputs of the map without edits, root mean square.
        neutral_texts: of which the first 256 tokens are read; empty for none.
        mode: `stop` raises GuardError (`apply_in_sequence` ends there), `roll_back` leaves out the facts beyond a limit, `warn` warns.

    Example:
        >>> guards = Guards(drift=0.5, value_ratio=20.0, neutral_texts=tuple(texts), mode="roll_back")
        >>> edit = steer.edit_facts(model, tokenizer, fact, layers=[8], covariance=covariance, contexts=contexts, guards=guards)
        >>> edit.provenance["readings"]
    """

    strength: float | None = None
    drift: float | None = 0.25
    key_cosine: float | None = None
    neutral_kl: float | None = 0.1
    value_ratio: float | None = None
    neutral_texts: tuple[str, ...] = ()
    mode: str = "warn"

    def __post_init__(self) -> None:
        for name in _LIMITS:
            if getattr(self, name) is not None:
                number_within(getattr(self, name), f"the limit `{name}` of guards", 0)
        of_type(self.neutral_texts, tuple, "`neutral_texts` of guards", "pass a tuple of texts")
        one_of(self.mode, MODES, "the mode of guards")

    def beyond(self, reading: GuardReading) -> tuple[str, ...]:
        """Names of the limits that a reading passes."""
        passed = []
        for name in _LIMITS:
            limit, value = getattr(self, name), getattr(reading, name)
            if limit is None or value is None:
                continue
            if math.isnan(value) or (value < limit if name == "strength" else value > limit):
                passed.append(name)
        return tuple(passed)

    def settings(self) -> dict[str, Any]:
        """Limits and mode, JSON-able."""
        return {name: getattr(self, name) for name in (*_LIMITS, "mode")}


_LIMITS = ("strength", "drift", "key_cosine", "neutral_kl", "value_ratio")


@dataclass(frozen=True)
class GuardReading:
    """What the edit of one fact would do; None for what cannot be read: no covariance, no earlier edits, no neutral texts.

    Attributes:
        fact: its name. The others are as in `Guards`.
        nearest: name of the earlier edit whose key is nearest.
        beyond: the limits that it passes.
        strength, drift, key_cosine, neutral_kl, value_ratio: see `Guards`.

    Example:
        >>> how = {"layers": [8], "covariance": covariance, "contexts": contexts}
        >>> edit = steer.edit_facts(model, tokenizer, fact, guards=Guards(neutral_texts=tuple(texts)), **how)
        >>> edit.provenance["readings"][0]  # as JSON
    """

    fact: str
    strength: float | None = None
    drift: float | None = None
    key_cosine: float | None = None
    nearest: str | None = None
    neutral_kl: float | None = None
    value_ratio: float | None = None
    beyond: tuple[str, ...] = ()

    def __str__(self) -> str:
        values = ((each.name, getattr(self, each.name)) for each in fields(self) if each.name in _LIMITS)
        return ", ".join(f"{name} {value:.3g}" for name, value in values if value is not None)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "beyond": list(self.beyond)}


class NeutralTexts:
    """What a model says about ordinary text, to be compared with what it says after an edit.

    Args:
        texts: their first 256 tokens are read, 64 of a text at most.
    """

    def __init__(self, bench: EditBench, texts: Sequence[str]) -> None:
        self.bench = bench
        self.rows = _neutral_rows(bench.tokenizer, texts)
        self.before = self._logprobs()

    def kl(self) -> float:
        """Mean over tokens of KL(before || now), in nat; NaN where what the model says now is not finite."""
        now = self._logprobs()
        total = sum(float((old.exp() * (old - new)).sum()) for old, new in zip(self.before, now, strict=True))
        return total / sum(len(old) for old in self.before)

    def _logprobs(self) -> list[Tensor]:
        """For each text [tokens, vocabulary]."""
        model, device = self.bench.model, input_device(self.bench.model)
        batch = {name: tensor.to(device) for name, tensor in collate(self.rows, 0).items() if name != "labels"}
        with evaluating(model):
            logits = model(**batch, use_cache=False).logits
        return [of_text[: len(row.ids)].float().log_softmax(-1) for of_text, row in zip(logits, self.rows, strict=True)]


def _neutral_rows(tokenizer: Any, texts: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    left = NEUTRAL_TOKENS
    for text in texts:
        ids = plain(tokenizer, text).ids[: min(_ROW_TOKENS, left)]
        rows.append(Row(ids, 1))
        left -= len(ids)
        if left <= 0:
            break
    return rows


def read_guards(
    bench: EditBench, facts: Sequence[Fact], solution: Solution, guards: Guards, neutral: NeutralTexts | None
) -> list[GuardReading]:
    """Readings of a solution, one for each fact; of a change that is no sum over facts, the drift is that of all of it."""
    kl = None
    if neutral is not None:
        with bench.beside(solution.deltas):
            kl = neutral.kl()
    readings = []
    for number, fact in enumerate(facts):
        cosine, nearest = _nearest_edit(bench, solution, number)
        reading = GuardReading(
            fact.name,
            strength=None if solution.strength is None else float(solution.strength[number]),
            drift=_drift(bench, solution, number),
            key_cosine=cosine,
            nearest=nearest,
            neutral_kl=kl,
            value_ratio=_value_ratio(bench, solution, number),
        )
        readings.append(replace(reading, beyond=guards.beyond(reading)))
    return readings


def _drift(bench: EditBench, solution: Solution, number: int) -> float | None:
    """The largest over layers of sqrt(tr(D C D^T) / tr(W0 C W0^T)), D being the part of the change that belongs to a fact."""
    drifts = []
    for delta in solution.deltas:
        power = bench.output_power(delta.layer)
        if power is None or bench.covariance is None:
            return None
        own = slice(None) if delta.is_dense or solution.of is None else solution.of == number
        u, v = delta.u[:, own].double(), delta.v[:, own].double()
        moved = (u.mT @ u) * (v.mT @ bench.factor(delta.layer).moment.to(v) @ v)
        drifts.append(math.sqrt(max(float(moved.sum()), 0.0) / power))
    return max(drifts, default=0.0)


def _nearest_edit(bench: EditBench, solution: Solution, number: int) -> tuple[float | None, str | None]:
    """The largest cosine of a fact's key with a key of an edit in the weights, over layers, and the name of that edit."""
    best: tuple[float | None, str | None] = (None, None)
    for delta in solution.deltas:
        if delta.keys is None or solution.of is None or not bool((solution.of == number).any()):
            continue
        own = normalize(delta.keys[solution.of == number].double(), dim=-1)
        for edit in EditedWeights.of(bench.model).applied:
            earlier = edit.delta(delta.path)
            if earlier is None or earlier.keys is None or not len(earlier.keys):
                continue
            cosine = float((own @ normalize(earlier.keys.double(), dim=-1).mT).max())
            if best[0] is None or cosine > best[0]:
                best = (cosine, edit.name)
    return best


def _value_ratio(bench: EditBench, solution: Solution, number: int) -> float | None:
    """|v*| against the root mean square of what the last edited map gives for ordinary keys, both without its bias."""
    power = bench.output_power(bench.layers[-1])
    if solution.values is None or power is None:
        return None
    value, bias = solution.values[number], getattr(bench.maps[bench.layers[-1]].module, "bias", None)
    written = value.written + value.delta
    return float((written if bias is None else written - bias.detach().to(written)).norm()) / math.sqrt(power)


def heed(guards: Guards, facts: Sequence[Fact], readings: Sequence[GuardReading]) -> list[Fact]:
    """The facts beyond a limit, which `roll_back` leaves out. Warns of them by mode. Raises GuardError by mode."""
    beyond = [(fact, reading) for fact, reading in zip(facts, readings, strict=True) if reading.beyond]
    if not beyond:
        return []
    if guards.mode == "stop":
        raise _stopped(guards, beyond)
    if guards.mode == "warn":
        for fact, reading in beyond:
            names = ", ".join(reading.beyond)
            warnings.warn(
                f"the edit '{fact.prompt}' -> '{fact.target}' is beyond its guards ({names}): {reading}", GuardWarning, stacklevel=3
            )
        return []
    return [fact for fact, _ in beyond]


# ---- errors


def _stopped(guards: Guards, beyond: Sequence[tuple[Fact, GuardReading]]) -> GuardError:
    fact, reading = beyond[0]
    limits = ", ".join(f"{name} {getattr(guards, name):g}" for name in reading.beyond)
    others = f", and {len(beyond) - 1} more" if len(beyond) > 1 else ""
    error = GuardError(
        f"a guard stopped the edit '{fact.prompt}' -> '{fact.target}'{others}",
        expected=f"within {limits}",
        found=str(reading),
        remedy="leave the fact out (mode='roll_back' does), edit another layer, or widen the limit",
    )
    error.facts = tuple(fact.name for fact, _ in beyond)
    return error
