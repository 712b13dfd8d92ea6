"""Causal tracing: which states of a model bring a fact back when its subject is corrupted."""

from steer.edits.tracing.averages import ROLES, AverageEffects, Mean
from steer.edits.tracing.cells import KINDS
from steer.edits.tracing.corruption import CORRUPTIONS, CorruptedSubject, Corruption, NoCorruption
from steer.edits.tracing.result import MEASURES, FactTrace, LeftOut, TraceResult
from steer.edits.tracing.trace import causal_trace

__all__ = [
    "CORRUPTIONS",
    "KINDS",
    "MEASURES",
    "ROLES",
    "AverageEffects",
    "CorruptedSubject",
    "Corruption",
    "FactTrace",
    "LeftOut",
    "Mean",
    "NoCorruption",
    "TraceResult",
    "causal_trace",
]
