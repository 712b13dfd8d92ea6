"""Directions: reading a concept off activations, and choosing where and how strongly to steer with it."""

from steer.directions.boundary import Boundary, fit_boundary
from steer.directions.contrast import ContrastSet
from steer.directions.direction import Direction, Directions
from steer.directions.dose import DoseCurve, dose_curve
from steer.directions.erasure import Erasure, fit_erasure
from steer.directions.extract import extract, extract_all
from steer.directions.extractor import EXTRACTORS
from steer.directions.foreign import import_directions, import_plan
from steer.directions.importer import IMPORTERS
from steer.directions.screening import Screen, screen
from steer.directions.selection import Selection, select
from steer.directions.trained import OBJECTIVES, train_direction

__all__ = [
    "EXTRACTORS",
    "IMPORTERS",
    "OBJECTIVES",
    "Boundary",
    "ContrastSet",
    "Direction",
    "Directions",
    "DoseCurve",
    "Erasure",
    "Screen",
    "Selection",
    "dose_curve",
    "extract",
    "extract_all",
    "fit_boundary",
    "fit_erasure",
    "import_directions",
    "import_plan",
    "screen",
    "select",
    "train_direction",
]
