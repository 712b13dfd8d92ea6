"""Kinds of gates; importing registers them."""

from steer.intervene.gates.call import CallGate
from steer.intervene.gates.cosine import CosineGate
from steer.intervene.gates.feature import FeatureGate
from steer.intervene.gates.probe import ProbeGate

__all__ = ["CallGate", "CosineGate", "FeatureGate", "ProbeGate"]
