"""Attention heads: what they look at, what they write, and what changes without them."""

from steer.circuits.heads.names import Head
from steer.circuits.heads.scores import PATTERN_KINDS, HeadScores, head_scores, repeated_tokens

__all__ = ["PATTERN_KINDS", "Head", "HeadScores", "head_scores", "repeated_tokens"]
