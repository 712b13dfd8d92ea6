"""Searches for features, one file each."""
