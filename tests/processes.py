"""Processes that begin with what this one has imported: forked, where a new interpreter would first import for seconds.

They inherit what the test has set up, patches too. A test of what a new interpreter does (imports, output, torchrun) starts one instead.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from typing import Any

FORK = multiprocessing.get_context("fork")


def started(run: Callable[..., int | None], *arguments: Any) -> ForkProcess:
    """A process that runs a function; it exits with the number that the function returns, and with 1 after an exception."""
    process = FORK.Process(target=lambda: sys.exit(run(*arguments)), daemon=True)
    process.start()
    return process


def ended(processes: list[ForkProcess], timeout: float = 300) -> list[int | None]:
    """Exit codes, None of a process that had to be killed after `timeout` seconds; what they printed is what pytest captured."""
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def run_on_ranks(run: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """Runs a function in as many processes, each with the environment that torchrun gives to a rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    codes = ended([started(_run_on_rank, rank, ranks, port, run, arguments) for rank in range(ranks)])
    assert codes == [0] * ranks


def _run_on_rank(rank: int, ranks: int, port: int, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    given = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "ROLE_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    given |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ.update({name: str(value) for name, value in given.items()})
    run(*arguments)
