"""Architectures of dictionaries, one a file. See `steer.features.dictionary`."""
