"""`steer bias`: a bias mitigation run. Circuits are found and ablated in an experiment, which runs as `steer ab` runs it."""

from __future__ import annotations

from steer.commands.ab import run, what_is_left

__all__ = ["run", "what_is_left"]
