"""Bias metrics, one file each: `metric(items, scorer, **options)` gives columns and rows."""
