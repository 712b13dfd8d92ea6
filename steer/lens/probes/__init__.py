"""Probes, one a file: from activations of texts and their labels to weights and an intercept. See `steer.lens.probe`."""
