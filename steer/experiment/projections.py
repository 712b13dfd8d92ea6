"""Projections of answers on a direction, token by token: where in a text a trait is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.directions.direction import Direction
from steer.model.accumulator import Accumulator
from steer.model.capture import capture
from steer.model.token_texts import token_texts
from steer.model.tokens import Row, encode


class _Projections(Accumulator):
    """(h v) / |v|^2 of every token, by text."""

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector.double() / vector.double().square().sum()
        self.values: dict[int, list[float]] = {}

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        projected = h.double().cpu() @ self.vector  # [batch, tokens]
        for row, values, mask in zip(rows.tolist(), projected, weight.cpu().bool(), strict=True):
            self.values[row] = values[mask].tolist()


def mean_projection(model: nn.Module, direction: Direction, rows: Sequence[Row]) -> float:
    """Mean over the tokens of texts, in class gaps: what `token_projections` takes off."""
    read = _Projections(direction.vector)
    capture(model, rows, {direction.site: read}, span="all")
    values = [value for of_row in read.values.values() for value in of_row]
    return sum(values) / len(values)


def token_projections(
    model: nn.Module, tokenizer: Any, direction: Direction, offset: float, asked: Sequence[Mapping[str, Any]], texts: Sequence[str]
) -> list[list[tuple[str, float]]]:
    """The tokens of answers, each with its projection minus the offset: 1 is one class gap along the trait.

    A plan that is attached stays in force.

    Args:
        offset: from `mean_projection` of neutral texts.
        asked: what was answered, `prompt` and perhaps `system`.
        texts: the answers; an empty one has no tokens.
    """
    said = [i for i, text in enumerate(texts) if text]
    rows = [encode(tokenizer, asked[i]["prompt"], texts[i], system=asked[i].get("system")) for i in said]
    tokens: list[list[tuple[str, float]]] = [[] for _ in texts]
    if not rows:
        return tokens
    read = _Projections(direction.vector)
    with torch.no_grad():
        capture(model, rows, {direction.site: read}, span="response")
    for number, i in enumerate(said):
        ids = rows[number].ids[rows[number].prompt :]
        words = token_texts(tokenizer, ids)
        values = [value - offset for value in read.values[number]]
        special = set(tokenizer.all_special_ids)
        tokens[i] = [(word, round(value, 3)) for word, value, token in zip(words, values, ids, strict=True) if token not in special]
    return tokens
