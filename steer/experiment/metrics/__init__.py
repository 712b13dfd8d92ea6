"""Metrics of an experiment; every module here is imported on the first look-up."""
