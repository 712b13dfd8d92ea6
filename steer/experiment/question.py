"""The question of an experiment: which contrast decides, which were planned beside it, and which were only looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steer.errors import ConfigError, did_you_mean
from steer.experiment.arms import Arm
from steer.experiment.outcome import GUARDRAIL, PRIMARY, SECONDARY, Outcome
from steer.experiment.stats import ALPHA
from steer.experiment.treatment import NEVER


@dataclass(frozen=True)
class Pair:
    """One outcome in two arms: `arm` minus `against`."""

    outcome: str
    arm: str
    against: str


@dataclass(frozen=True)
class Question:
    """What an experiment asks.

    Attributes:
        text: for people.
        primary: the contrast that decides, at `alpha`.
        secondary: planned with it, corrected for their number.
        exploratory: looked at besides.
        guardrails: outcomes that must stay within their margins, in an arm against the arm that nothing is done to.
    """

    text: str
    primary: Pair
    secondary: tuple[Pair, ...] = ()
    exploratory: tuple[Pair, ...] = ()
    guardrails: tuple[Pair, ...] = ()
    alpha: float = ALPHA

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def question_of(
    arms: Sequence[Arm],
    outcomes: Sequence[Outcome],
    *,
    text: str = "",
    primary: Mapping[str, str] | Sequence[str] | None = None,
    secondary: Sequence[Mapping[str, str]] | None = None,
) -> Question:
    """What these arms ask, as far as it is not said.

    Compared is the first arm with a treatment, in a sweep that of the first dose but 0: with its matched controls where it has some,
    otherwise with the first arm to which nothing is done. Planned beside it: that arm against the one to which nothing is done, on the
    primary outcome and the secondary ones, and every other arm with a treatment on the primary outcome. The controls against the untreated
    arm are exploratory.

    Args:
        primary: `arm` and `against`, if they are not these.
        secondary: pairs of `outcome` (the primary one when left out), `arm` and `against`, in place of those that follow.

    Raises:
        ConfigError: no arm with a treatment, nothing to compare it with, or a name that is none.
    """
    measured = next((outcome.name for outcome in outcomes if outcome.role == PRIMARY), None)
    if measured is None:
        raise _no_primary_outcome([outcome.name for outcome in outcomes])
    chosen = _primary_pair(arms, measured, primary)
    untreated = next((arm.name for arm in arms if arm.when == NEVER), None)
    if secondary is not None:
        planned = [_read_pair(pair, measured, arms, outcomes) for pair in secondary]
    elif untreated is None:
        planned = []
    else:
        planned = _planned(arms, outcomes, chosen, untreated)
    planned = _new(planned, [chosen])
    looked_at = [Pair(measured, arm.name, untreated) for arm in arms if arm.control_of is not None and untreated is not None]
    guarded = [
        Pair(outcome.name, arm.name, untreated)
        for outcome in outcomes
        for arm in arms
        if outcome.role == GUARDRAIL and untreated is not None and arm.when != NEVER and arm.control_of is None
    ]
    exploratory = _new(looked_at, [chosen, *planned])
    words = text or f"Does '{chosen.arm}' change {chosen.outcome} against '{chosen.against}'?"
    return Question(words, chosen, tuple(planned), tuple(exploratory), tuple(guarded))


def _primary_pair(arms: Sequence[Arm], outcome: str, said: Any) -> Pair:
    names = [arm.name for arm in arms]
    if said is not None:
        return _read_pair(said, outcome, arms, ())
    treated = next((arm for arm in arms if arm.when != NEVER and arm.control_of is None and arm.dose != 0), None)
    if treated is None:
        raise _nothing_treated(names)
    control = next((arm.name for arm in arms if arm.control_of == treated.name), None)
    against = control or next((arm.name for arm in arms if arm.when == NEVER), None)
    if against is None:
        others = [arm.name for arm in arms if arm.name != treated.name and arm.control_of is None and arm.dose != 0]
        raise _nothing_to_compare_with(treated.name, others)
    return Pair(outcome, treated.name, against)


def _planned(arms: Sequence[Arm], outcomes: Sequence[Outcome], chosen: Pair, untreated: str) -> list[Pair]:
    planned = [Pair(chosen.outcome, chosen.arm, untreated)] if chosen.arm != untreated else []
    planned += [Pair(outcome.name, chosen.arm, untreated) for outcome in outcomes if outcome.role == SECONDARY and chosen.arm != untreated]
    others = [arm.name for arm in arms if arm.when != NEVER and arm.control_of is None and arm.name != chosen.arm]
    return [*planned, *(Pair(chosen.outcome, name, untreated) for name in others)]


def _new(pairs: Sequence[Pair], asked: Sequence[Pair]) -> list[Pair]:
    """Pairs that are not asked about already; a pair the other way round is the same question."""
    known = {(pair.outcome, frozenset((pair.arm, pair.against))) for pair in asked}
    new = []
    for pair in pairs:
        key = (pair.outcome, frozenset((pair.arm, pair.against)))
        if key not in known:
            known.add(key)
            new.append(pair)
    return new


def _read_pair(said: Any, outcome: str, arms: Sequence[Arm], outcomes: Sequence[Outcome]) -> Pair:
    """A pair from its configuration. outcome: what it is about if it does not say; outcomes: those that it may name."""
    names = [arm.name for arm in arms]
    if isinstance(said, Sequence) and not isinstance(said, str) and len(said) == 2:
        said = {"arm": said[0], "against": said[1]}
    known = ("arm", "against", "outcome") if outcomes else ("arm", "against")
    if not isinstance(said, Mapping) or not {"arm", "against"} <= set(said) <= set(known):
        raise _no_pair(said, known)
    pair = Pair(said.get("outcome", outcome), said["arm"], said["against"])
    for name in (pair.arm, pair.against):
        if name not in names:
            raise _no_such_arm(name, names)
    if pair.arm == pair.against:
        raise _against_itself(pair)
    if outcomes and pair.outcome not in (measured := [each.name for each in outcomes]):
        raise _no_such_outcome(pair.outcome, measured)
    return pair


# ---- errors


def _no_primary_outcome(names: Sequence[str]) -> ConfigError:
    found = ", ".join(names) or "no outcome"
    return ConfigError("no outcome decides", expected="one with role=primary", found=found, remedy="give one of them role: primary")


def _nothing_treated(names: Sequence[str]) -> ConfigError:
    remedy = "add an arm with a treatment: a plan, weights, a prompt or other training rows"
    return ConfigError("nothing is done in any arm", expected="an arm with a treatment", found=", ".join(names), remedy=remedy)


def _nothing_to_compare_with(arm: str, others: Sequence[str]) -> ConfigError:
    named = f"to compare it with '{others[0]}', say so: primary=('{arm}', '{others[0]}'); else " if others else ""
    return ConfigError(
        f"it is not said what arm '{arm}' is compared with" if others else f"arm '{arm}' is compared with nothing",
        expected="a matched control of it, or an arm to which nothing is done",
        found=f"other treatments alone: {', '.join(others)}" if others else "neither",
        remedy=f"{named}add an arm without a treatment, such as 'plain': None, or a control: steer.matched(plan)",
    )


def _no_pair(said: Any, known: Sequence[str]) -> ConfigError:
    what = "a contrast of the question cannot be read"
    remedy = "write {arm: <name>, against: <name>}"
    return ConfigError(what, expected=f"two arms, with the keys {', '.join(known)}", found=said, remedy=remedy)


def _against_itself(pair: Pair) -> ConfigError:
    what = f"the question compares '{pair.arm}' with itself"
    return ConfigError(
        what, expected="two arms", found=f"{pair.arm} and {pair.against}", remedy="name another arm in one of the two places"
    )


def _no_such_arm(name: str, names: Sequence[str]) -> ConfigError:
    remedy = did_you_mean(str(name), names) or "name two arms of the experiment"
    return ConfigError(f"the question names no arm of the experiment: '{name}'", expected=", ".join(names), found=name, remedy=remedy)


def _no_such_outcome(name: str, names: Sequence[str]) -> ConfigError:
    remedy = did_you_mean(str(name), names) or "name an outcome of the experiment"
    return ConfigError(f"the question names no outcome: '{name}'", expected=", ".join(names), found=name, remedy=remedy)
