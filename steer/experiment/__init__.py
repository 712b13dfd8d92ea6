"""Experiments: data, arms, measures, paired statistics."""
