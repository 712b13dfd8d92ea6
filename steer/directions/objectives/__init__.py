"""Objectives of trained directions, one a file. See `steer.directions.trained`."""
