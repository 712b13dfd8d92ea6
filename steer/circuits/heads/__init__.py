"""Attention heads: what they look at, what they write, and what changes without them."""

from steer.circuits.heads.attention import AttentionPatterns, attention_patterns
from steer.circuits.heads.effects import ABLATIONS, HeadEffects, head_effects
from steer.circuits.heads.logit_attribution import LogitAttribution, logit_attribution
from steer.circuits.heads.names import Head
from steer.circuits.heads.ov import copy_scores, successor_scores
from steer.circuits.heads.scores import PATTERN_KINDS, HeadScores, head_scores, repeated_tokens

__all__ = [
    "ABLATIONS",
    "PATTERN_KINDS",
    "AttentionPatterns",
    "Head",
    "HeadEffects",
    "HeadScores",
    "LogitAttribution",
    "attention_patterns",
    "copy_scores",
    "head_effects",
    "head_scores",
    "logit_attribution",
    "repeated_tokens",
    "successor_scores",
]
