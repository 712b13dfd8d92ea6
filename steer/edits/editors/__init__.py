"""Editors of facts, one file each."""
