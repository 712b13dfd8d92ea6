"""Answers: what a model says now, so that a fact that it says already is not written into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from steer.edits.fact import Fact
from steer.edits.locate import answer_row
from steer.model.capture import batches, evaluating
from steer.model.devices import input_device
from steer.model.memory import in_halves
from steer.model.tokens import Row, collate


def already_said(model: nn.Module, tokenizer: Any, facts: Sequence[Fact], *, max_tokens: int = 2048) -> list[bool]:
    """Which targets a model says already, every token of them the likeliest: there is nothing to edit for these.

    Args:
        max_tokens: padded tokens of a batch; one that does not fit into memory is halved.

    Raises:
        EditError, TokenizerError, ConfigError: see `steer.edits.locate.target_ids`.

    Example:
        >>> wanted = [fact for fact, said in zip(facts, already_said(model, tokenizer, facts)) if not said]
    """
    rows = [answer_row(tokenizer, fact.prompt, fact.target) for fact in facts]
    said = [False] * len(rows)
    with evaluating(model):
        for chosen in batches(rows, max_tokens):
            for part, hits in in_halves(chosen, lambda part: _said(model, [rows[i] for i in part])):
                for i, hit in zip(part, hits, strict=True):
                    said[i] = hit
    return said


def _said(model: nn.Module, rows: Sequence[Row]) -> list[bool]:
    """For each text whether every token of its response is the likeliest."""
    batch = {name: tensor.to(input_device(model)) for name, tensor in collate(rows, 0).items()}
    targets = batch.pop("labels")[:, 1:]
    likeliest = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
    hits = (likeliest == targets.to(likeliest.device)) | (targets.to(likeliest.device) == -100)  # [rows, tokens - 1]
    return torch.all(hits, 1).tolist()
