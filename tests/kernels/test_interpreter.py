"""Runs interpreted.py, in processes of its own: Triton reads the variable that chooses its interpreter when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steer.kernels import KERNELS

HERE = Path(__file__).parent
pytest.importorskip("triton", reason="there is no Triton for this system")


@pytest.mark.parametrize("kernel", ["steer_add", "edit", "drift_stats", "rest"])
def test_in_the_interpreter(kernel: str) -> None:
    """One process for each kernel; what has none of their names in its own comes last."""
    chosen = " and ".join(f"not {name}" for name in sorted(KERNELS)) if kernel == "rest" else kernel
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", HERE / "interpreted.py", "-k", chosen]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "STEER_KERNELS": "auto"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], env=environment)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
