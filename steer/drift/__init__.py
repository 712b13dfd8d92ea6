"""Drift: how far a model moves along directions while it is post-trained, and whether that is real and about those directions."""

from steer.drift.feature_groups import TrackedFeatures
from steer.drift.metric import METRICS
from steer.drift.records import DriftRecord
from steer.drift.stages import StageComparison, compare_features, compare_text_means, text_means
from steer.drift.store import DriftStore
from steer.drift.tracker import DriftTracker

__all__ = [
    "METRICS",
    "DriftRecord",
    "DriftStore",
    "DriftTracker",
    "StageComparison",
    "TrackedFeatures",
    "compare_features",
    "compare_text_means",
    "text_means",
]
