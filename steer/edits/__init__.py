"""Edits of facts: low-rank changes of weights that make a model say something else, and what they rest on."""

from steer.edits.answers import already_said
from steer.edits.contexts import WEIGHTINGS, Contexts, FirstTokenSubjectWarning, SubjectTokenWarning, sample_contexts
from steer.edits.edited_map import EditedMap, edited_maps
from steer.edits.fact import Fact, distinct_facts
from steer.edits.keys import FactKeys, fact_keys, read_at, read_keys
from steer.edits.locate import Located, answer_row, locate, target_ids, text_ids
from steer.edits.tracing import TraceResult, causal_trace

__all__ = [
    "WEIGHTINGS",
    "Contexts",
    "EditedMap",
    "Fact",
    "FactKeys",
    "FirstTokenSubjectWarning",
    "Located",
    "SubjectTokenWarning",
    "TraceResult",
    "already_said",
    "answer_row",
    "causal_trace",
    "distinct_facts",
    "edited_maps",
    "fact_keys",
    "locate",
    "read_at",
    "read_keys",
    "sample_contexts",
    "target_ids",
    "text_ids",
]
