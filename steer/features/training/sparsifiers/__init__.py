"""Sparsifiers, one a file. See `steer.features.training.sparsifier`."""
