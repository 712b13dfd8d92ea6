"""Records: fields, metrics as attributes, and what goes to a logger."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import fields, replace

import pytest

from steer.drift.metric import METRICS, RECORD_FIELDS
from steer.drift.records import DriftRecord, log_values

RECORD = DriftRecord(10, "probe", "rude", "layers.1.output", "named", 8, {"effect_sd": 1.5, "p": math.nan, "of_another_package": 2.0})


def test_the_names_that_metrics_may_not_have_are_the_fields() -> None:
    assert tuple(field.name for field in fields(DriftRecord)) == RECORD_FIELDS
    assert not set(RECORD_FIELDS) & set(METRICS)


def test_metrics_are_attributes() -> None:
    assert RECORD.effect_sd == 1.5 and math.isnan(RECORD.p) and RECORD.of_another_package == 2.0
    assert RECORD.z_controls is None, "registered, but not of this record"
    with pytest.raises(AttributeError, match="no 'effect_sdd'; its metrics are effect_sd, p"):
        _ = RECORD.effect_sdd


def test_records_can_be_copied_hashed_and_pickled() -> None:
    for twin in (copy.copy(RECORD), copy.deepcopy(RECORD), replace(RECORD), pickle.loads(pickle.dumps(RECORD))):
        assert repr(twin) == repr(RECORD) and hash(twin) == hash(RECORD)


def test_a_logger_gets_logged_metrics_of_named_directions_where_they_are_numbers() -> None:
    control = replace(RECORD, direction="random-00", kind="control")
    stream = replace(RECORD, mode="stream", metrics={"effect_sd": 0.5, "mean": 3.0})
    values = log_values([RECORD, control, stream])
    assert values == {"drift/rude/layers.1.output/effect_sd": 1.5, "drift_stream/rude/layers.1.output/effect_sd": 0.5}
