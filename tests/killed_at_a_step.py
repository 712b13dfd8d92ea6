"""`steer <arguments>` that is killed, as by kill -9, when a training step begins: python killed_at_a_step.py <step> <arguments>."""

from __future__ import annotations

import os
import signal
import sys

from steer.cli import main
from steer.experiment.sft import SFTModule

if __name__ == "__main__":
    step, *arguments = sys.argv[1:]
    original = SFTModule.training_step

    def killed(module: SFTModule, *batch: object) -> object:
        if module.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(module, *batch)  # type: ignore[arg-type]

    SFTModule.training_step = killed  # type: ignore[assignment, method-assign]
    sys.exit(main(arguments))
