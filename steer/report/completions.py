"""What the model says in each arm, side by side, with tokens coloured by what they project on a direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer.report.numbers import measured, number
from steer.report.view import indices_of

LONG = 700  # characters; of a longer text the rest is folded
SHOWN = 600


def completion_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Prompts in their first order, each with the answer of the base model and of every arm (None: not generated)."""
    labels = {"base": "the model as it is"} | {str(arm["name"]): str(arm.get("label") or "") for arm in metrics.get("arms") or []}
    indices = indices_of(metrics)
    by_arm = {arm: {str(each.get("prompt", "")): each for each in answers or ()} for arm, answers in _ordered(metrics, labels)}
    prompts = dict.fromkeys(prompt for answers in by_arm.values() for prompt in answers)
    most = largest_projection(metrics)
    return [
        {
            "prompt": prompt,
            "answers": [
                {"name": arm, "label": labels.get(arm, ""), "index": indices.get(arm), **_answer(answers.get(prompt), most)}
                for arm, answers in by_arm.items()
            ],
        }
        for prompt in prompts
    ]


def _ordered(metrics: Mapping[str, Any], labels: Mapping[str, str]) -> list[tuple[str, Any]]:
    completions = metrics.get("completions") or {}
    known = [name for name in labels if name in completions]
    return [(name, completions[name]) for name in [*known, *(name for name in completions if name not in labels)] if completions[name]]


def largest_projection(metrics: Mapping[str, Any]) -> float | None:
    """The end of the colour scale, which is symmetric: the largest |value| of any token; None when the tree has no projections."""
    if not metrics.get("projections"):
        return None
    values = [
        abs(value)
        for answers in (metrics.get("completions") or {}).values()
        for answer in answers or ()
        for _, value in answer.get("tokens") or ()
        if measured(value)
    ]
    return max(values, default=0.0) or None


def _answer(answer: Mapping[str, Any] | None, most: float | None) -> dict[str, Any]:
    if answer is None:
        return {"text": None, "tokens": None}
    text = str(answer.get("text") or "")
    tokens: Sequence[Any] = answer.get("tokens") or ()
    if most is None or not tokens:
        return {"text": text, "tokens": None, "begin": text[:SHOWN] if len(text) > LONG else None}
    return {"text": text, "tokens": [_token(str(token), value, most) for token, value in tokens]}


def _token(text: str, value: Any, most: float) -> dict[str, Any]:
    """A token with its share of the colour scale, 0 to 100, and its side of it."""
    if not measured(value):
        return {"text": text, "share": 0, "side": "none", "value": number(value)}
    side = "plus" if value > 0 else "minus"
    return {"text": text, "share": round(100 * abs(value) / most), "side": side, "value": number(value, signed=True)}
