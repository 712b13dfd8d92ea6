"""Measures of edits, one file each."""
