"""Runs the interpreted*.py, in a process of its own: Triton reads the variable that chooses its interpreter when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest.importorskip("triton", reason="there is no Triton for this system")


def test_in_the_interpreter() -> None:
    files = sorted(HERE.glob("interpreted*.py"))
    assert len(files) == 3
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "STEER_KERNELS": "auto"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], env=environment)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
