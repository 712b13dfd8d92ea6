"""Lenses: the residual stream at any depth, read as the model's own next token; probes: what it says of labels and numbers."""

from steer.lens.labelled import ANSWER_TOKENS, LabelledTexts
from steer.lens.lens import LENSES, Lens, load_lens
from steer.lens.lenses.jacobian import JacobianLens
from steer.lens.lenses.logit import LogitLens
from steer.lens.lenses.tuned import TunedLens
from steer.lens.probe import PROBES, Probe, fit_probe
from steer.lens.reading import Reading, lens_reading
from steer.lens.readout import Readout

__all__ = [
    "ANSWER_TOKENS",
    "LENSES",
    "PROBES",
    "JacobianLens",
    "LabelledTexts",
    "Lens",
    "LogitLens",
    "Probe",
    "Reading",
    "Readout",
    "TunedLens",
    "fit_probe",
    "lens_reading",
    "load_lens",
]
