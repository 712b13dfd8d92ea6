"""Formats of dictionaries, one a file. See `steer.features.format`."""
