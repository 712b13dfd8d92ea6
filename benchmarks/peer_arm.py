"""An arm of a benchmark in a process of its own, which keeps its model between rounds; on one thread, and without the hub."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Arm:
    """A process that works when it is told to, by a line on its standard input, and answers with a line of JSON."""

    def __init__(self, name: str, command: Sequence[str | Path]) -> None:
        self.name = name
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended without an answer")

    def run(self, told: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{told}\n")
        self.process.stdin.flush()
        return self.answer()
