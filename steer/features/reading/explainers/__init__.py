"""Explainers of features, one file each."""
