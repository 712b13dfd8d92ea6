"""Corruptions of subjects, one file each."""
