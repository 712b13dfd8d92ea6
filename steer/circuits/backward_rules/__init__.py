"""Backward rules, one file each."""
