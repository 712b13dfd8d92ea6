"""Extractors, one a file: from contrast moments to a direction. See `steer.directions.extractor`."""
