"""Bias data sets, one file each."""
