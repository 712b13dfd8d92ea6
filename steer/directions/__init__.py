"""Directions: reading a concept off activations."""

from steer.directions import mean_difference, pca  # noqa: F401  (importing registers them)
from steer.directions.contrast import ContrastSet
from steer.directions.direction import Direction, Directions
from steer.directions.extract import extract, extract_all
from steer.directions.extractor import EXTRACTORS

__all__ = ["EXTRACTORS", "ContrastSet", "Direction", "Directions", "extract", "extract_all"]
