"""Operators on components of circuits, one file each."""
