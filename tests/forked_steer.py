"""`steer` in processes that can be killed and started again at once: a server imports torch and the rest, and forks."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess

PRELOADED = ["steer.commands.ab", "transformers.models.llama.modeling_llama"]


def start(arguments: Sequence[str]) -> BaseProcess:
    """Starts `steer <arguments>`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_steer, args=(list(arguments),), daemon=True)
    process.start()
    return process


def _steer(arguments: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from steer.cli import main

    sys.exit(main(arguments))
