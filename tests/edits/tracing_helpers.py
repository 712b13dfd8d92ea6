"""What the tests of causal tracing share: facts that a tiny random model knows, and traces by whole passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer
from torch import nn

from steer.edits import Fact, TraceResult, causal_trace
from steer.edits.tracing import trace

TOKENIZER = tiny_tokenizer()
FIRST, LATER = ("red cat dog sat on the", "red cat"), ("the house in blue fire sat on a mat is", "blue fire")  # prompts and subjects


def known(model: nn.Module, prompt: str, subject: str) -> Fact:
    """What the model says after the prompt, as a fact."""
    with torch.no_grad():
        said = model(torch.tensor([TOKENIZER(prompt).input_ids])).logits[0, -1].argmax()
    return Fact(prompt, subject, TOKENIZER.decode([said]))


def facts_of(model: nn.Module) -> list[Fact]:
    """One whose subject comes first, and one whose subject comes behind three tokens."""
    return [known(model, *FIRST), known(model, *LATER)]


def traced(model: nn.Module, facts: list[Fact], **options: Any) -> TraceResult:
    return causal_trace(model, TOKENIZER, facts, **{"samples": 2, "window": 2, "progress": False, **options})


def traced_plainly(model: nn.Module, facts: list[Fact], **options: Any) -> TraceResult:
    """By one whole pass for each cell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "record_for_fast", lambda *_: None)
        found = traced(model, facts, **options)
    assert found.about["whole_passes"] == len(found)
    return found


def apart(a: TraceResult, b: TraceResult) -> float:
    """The largest difference of any probability or logit difference."""
    return max(float((x.restored - y.restored).abs().max()) for x, y in zip(a, b, strict=True))
