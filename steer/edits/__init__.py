"""Edits of facts: low-rank changes of weights that make a model say something else, and what they rest on."""

from steer.edits.answers import already_said
from steer.edits.contexts import WEIGHTINGS, Contexts, FirstTokenSubjectWarning, SubjectTokenWarning, sample_contexts
from steer.edits.covariance import Covariance
from steer.edits.edit_facts import edit_facts, editors
from steer.edits.edited_map import EditedMap, edited_maps
from steer.edits.editor import EDITORS, CollinearKeysWarning, EditBench, Editor, Solution, WeakValueWarning
from steer.edits.fact import Fact, distinct_facts
from steer.edits.factor import Factor
from steer.edits.guards import GuardReading, Guards, GuardWarning
from steer.edits.keys import FactKeys, fact_keys, read_at, read_keys
from steer.edits.locate import Located, answer_row, locate, target_ids, text_ids
from steer.edits.sequence import SequenceResult, apply_in_sequence
from steer.edits.value import Value, ValueSettings, solve_values
from steer.edits.value_cache import ValueStore

__all__ = [
    "CollinearKeysWarning",
    "Contexts",
    "Covariance",
    "EDITORS",
    "EditBench",
    "EditedMap",
    "Editor",
    "Fact",
    "FactKeys",
    "Factor",
    "FirstTokenSubjectWarning",
    "GuardReading",
    "GuardWarning",
    "Guards",
    "Located",
    "SequenceResult",
    "Solution",
    "SubjectTokenWarning",
    "Value",
    "ValueSettings",
    "ValueStore",
    "WEIGHTINGS",
    "WeakValueWarning",
    "already_said",
    "apply_in_sequence",
    "answer_row",
    "distinct_facts",
    "edit_facts",
    "edited_maps",
    "editors",
    "fact_keys",
    "locate",
    "read_at",
    "read_keys",
    "sample_contexts",
    "solve_values",
    "target_ids",
    "text_ids",
]
