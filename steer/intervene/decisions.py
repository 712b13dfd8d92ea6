"""Decisions of gates, and what becomes of them when gates are combined."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.model.context import Decision


def closed(decision: Decision) -> Tensor:
    """How far a gate is closed, in the shape of how far it is open."""
    return 1 - decision.opened if decision.closed is None else decision.closed


def negation(decision: Decision) -> Decision:
    """Open where the other is closed."""
    return Decision(closed(decision), None if decision.closed is None else decision.opened)


def conjunction(a: Decision, b: Decision) -> Decision:
    """Open as far as both are, closed as far as either is."""
    opened = a.opened * b.opened.to(a.opened.device)
    if a.closed is None and b.closed is None:
        return Decision(opened)
    return Decision(opened, 1 - (1 - closed(a)) * (1 - closed(b).to(a.opened.device)))


def decided_where(has_tokens: Tensor, decision: Decision) -> Decision:
    """Neither open nor closed where there was no token to decide by. has_tokens: [batch, texts]."""
    has_tokens = has_tokens.unsqueeze(-1)
    return Decision(torch.where(has_tokens, decision.opened, 0.0), torch.where(has_tokens, closed(decision), 0.0))


def as_pair(decision: Decision) -> Tensor:
    """[batch, tokens, 2]: how far open, how far closed."""
    return torch.cat((decision.opened, closed(decision)), -1)
