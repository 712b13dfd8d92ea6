"""Verbs of the commands that have any. Each is a command of its own: module and configuration `features_train`, ..."""

VERBS = {"features": ("train", "find", "page", "evaluate")}
