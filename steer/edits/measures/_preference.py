"""Preference between the new and the true object behind prompts, which efficacy, paraphrase and neighbourhood share."""

from __future__ import annotations

from collections.abc import Sequence

from steer.edits.measure import SHARE, Column, Readings, Wanted, mean
from steer.edits.record import FactRecord


def preference_columns(name: str, titles: tuple[str, str, str], wins: str, loses: str, where: str) -> tuple[Column, ...]:
    """Score, magnitude, accuracies and probability. wins, loses: the object that should be preferred, and the other one, in words."""
    better = "higher"
    return (
        Column(name, titles[0], SHARE, better, f"share of {where} behind which the {wins} object is likelier than the {loses} one"),
        Column(f"{name}_magnitude", titles[1], "", better, f"mean of p({wins}) - p({loses}) behind {where}"),
        Column(f"{name}_accuracy", titles[2], SHARE, better, f"share of {where} behind which the {wins} object is the likeliest"),
        Column(f"{name}_token_accuracy", f"{titles[2]}, tokens", SHARE, better, f"share of its tokens that are, behind {where}"),
        Column(f"{name}_probability", f"p({wins}), {name}", "", better, f"mean of p({wins}) behind {where}"),
    )


def asked(record: FactRecord, prompts: Sequence[str]) -> Wanted:
    """Both objects behind each prompt."""
    objects = dict.fromkeys(each for each in (record.fact.target, record.fact.true) if each is not None)
    return Wanted(answers=tuple((prompt, each) for prompt in prompts for each in objects))


def preference(name: str, seen: Readings, prompts: Sequence[str], wins: str | None, loses: str | None) -> dict[str, float]:
    """The columns; without prompts or the object that should win none, without another one accuracies and probability alone.

    Accuracy asks for all tokens of the object, as in CounterFact; that of tokens counts each behind the right ones, as with zsRE.
    """
    if not prompts or wins is None:
        return {}
    won = [seen.answers[prompt, wins] for prompt in prompts]
    found = {
        f"{name}_accuracy": mean([answer.is_top for answer in won]),
        f"{name}_token_accuracy": mean([answer.accuracy for answer in won]),
        f"{name}_probability": mean([answer.probability for answer in won]),
    }
    if loses is None or loses == wins:  # there is nothing to be preferred
        return found
    pairs = [(a.probability, seen.answers[prompt, loses].probability) for prompt, a in zip(prompts, won, strict=True)]
    return {name: mean([a > b for a, b in pairs]), f"{name}_magnitude": mean([a - b for a, b in pairs]), **found}
