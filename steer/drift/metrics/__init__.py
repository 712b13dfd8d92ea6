"""Drift metrics, one a file: from the statistics of a measurement to a value per direction. See `steer.drift.metric`."""
