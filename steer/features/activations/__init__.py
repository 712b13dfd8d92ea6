"""Activations of dictionaries, one a file. See `steer.features.activation`."""
