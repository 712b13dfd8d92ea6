"""Operators that edit features of a dictionary, one a file. See `steer.features.feature_edit`."""
