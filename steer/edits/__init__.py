"""Edits of facts: low-rank changes of weights that make a model say something else, and what they rest on."""

from steer.edits.answers import already_said
from steer.edits.contexts import WEIGHTINGS, Contexts, FirstTokenSubjectWarning, SubjectTokenWarning, sample_contexts
from steer.edits.covariance import Covariance
from steer.edits.default_layers import candidate_layers, choose_layers, default_layers
from steer.edits.edit import Edit, WeightDelta
from steer.edits.edit_adapter import from_adapter, to_adapter
from steer.edits.edit_facts import edit_facts
from steer.edits.edited_map import EditedMap, edited_maps
from steer.edits.edited_weights import EditedWeights
from steer.edits.editor import EDITORS, CollinearKeysWarning, EditBench, Editor, Solution, ValueEditor, WeakValueWarning
from steer.edits.evaluate import evaluate_edits, readings_before
from steer.edits.evaluation import EditEvaluation
from steer.edits.fact import Fact, distinct_facts
from steer.edits.factor import Factor
from steer.edits.guards import GuardReading, Guards, GuardWarning
from steer.edits.keys import FactKeys, fact_keys, read_keys
from steer.edits.layer_sweep import LayerSweep, layer_sweep
from steer.edits.locate import Located, locate, target_ids
from steer.edits.measure import EDIT_MEASURES, EditMeasure
from steer.edits.preparation import Preparation, prepare
from steer.edits.record import FactRecord, Probe
from steer.edits.record_format import RECORD_FORMATS, RecordFormat
from steer.edits.records import known_facts, load_records
from steer.edits.sequence import SequenceResult, apply_in_sequence
from steer.edits.tracing import TraceResult, causal_trace
from steer.edits.value import Value, ValueSettings, solve_values
from steer.edits.value_cache import ValueStore

__all__ = [
    "CollinearKeysWarning",
    "Contexts",
    "Covariance",
    "EDITORS",
    "EDIT_MEASURES",
    "Edit",
    "EditBench",
    "EditEvaluation",
    "EditMeasure",
    "EditedMap",
    "EditedWeights",
    "Editor",
    "Fact",
    "FactKeys",
    "FactRecord",
    "Factor",
    "FirstTokenSubjectWarning",
    "GuardReading",
    "GuardWarning",
    "Guards",
    "LayerSweep",
    "Located",
    "Preparation",
    "Probe",
    "RECORD_FORMATS",
    "RecordFormat",
    "SequenceResult",
    "Solution",
    "SubjectTokenWarning",
    "TraceResult",
    "Value",
    "ValueEditor",
    "ValueSettings",
    "ValueStore",
    "WEIGHTINGS",
    "WeakValueWarning",
    "WeightDelta",
    "already_said",
    "apply_in_sequence",
    "candidate_layers",
    "causal_trace",
    "choose_layers",
    "default_layers",
    "distinct_facts",
    "edit_facts",
    "edited_maps",
    "evaluate_edits",
    "fact_keys",
    "from_adapter",
    "known_facts",
    "layer_sweep",
    "load_records",
    "locate",
    "prepare",
    "read_keys",
    "readings_before",
    "sample_contexts",
    "solve_values",
    "target_ids",
    "to_adapter",
]
