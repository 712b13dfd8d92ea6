"""Further processes for an experiment that trains nothing: each takes cells whose arm is ready and on which nobody works."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import OmegaConf

from steer.checks import whole_number
from steer.commands import cell_ranks
from steer.commands.cell_run import run_cell
from steer.commands.experiment_config import BASE, ExperimentConfig
from steer.commands.experiment_run import ExperimentRun
from steer.commands.noise import quieten_libraries
from steer.errors import ConfigError
from steer.experiment.cells import Cell, CellFolder, run_missing
from steer.experiment.treatment import NEVER
from steer.model.restoring import restoring
from steer.model.shared_blocks import sharing_lower_blocks


@contextmanager
def further_processes(config: ExperimentConfig, root: Path) -> Iterator[None]:
    """Lets all but one of `processes` run cells beside this one, for the block of code; the cores are shared out.

    They begin with the arms that need nothing of what this process makes for all, such as circuits. A cell on which one of them fails is
    left to this process, which meets the fault itself; when this process fails or is interrupted, they end.

    Raises:
        ConfigError: a number of processes that is none, or several for arms that are trained (`steer ab -m` spreads their seeds).
    """
    threads = torch.get_num_threads()
    may_share = not config.trains and cell_ranks.world_size() == 1
    count = config.values.processes
    if count is None:
        count = 2 if may_share and threads > 1 and not torch.cuda.is_available() else 1
    whole_number(count, "processes", least=1)
    if count > 1 and not may_share:
        raise _are_trained(count)
    share = max(1, threads // count)
    context = multiprocessing.get_context("spawn")
    told = (OmegaConf.to_yaml(config.values, resolve=True), root, share)
    workers = [context.Process(target=_work, args=told, daemon=True) for _ in range(count - 1)]

    def end() -> None:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()
        torch.set_num_threads(threads)

    with restoring(end):
        torch.set_num_threads(share if workers else threads)
        for worker in workers:
            worker.start()
        yield


def _work(values: str, root: Path, threads: int) -> None:
    """A further process: runs the cells that are ready, until all are done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one ends the others
    torch.set_num_threads(threads)
    quieten_libraries()
    job = ExperimentRun(ExperimentConfig(OmegaConf.create(values)), root)
    job.console.quiet = True
    job.prepare(treatments=False)
    cells = CellFolder(root / "cells")
    with sharing_lower_blocks(job.model):
        for _ in run_missing(job.config.cells(), cells, lambda cell: run_cell(job, cell, cells), lambda cell: _is_ready(job, cell, cells)):
            pass


def _is_ready(job: ExperimentRun, cell: Cell, cells: CellFolder) -> bool:
    """All but the base, whose cell says what the first process has made for all, and what waits for it."""
    first = multiprocessing.parent_process()
    if first is not None and not first.is_alive():  # killed: nobody would make what is waited for
        raise SystemExit(1)
    if cell.arm == BASE:
        return False
    arm = job.config.arm_of(cell)
    if arm.when == NEVER:
        return cells.is_done(next(other for other in job.config.cells() if other.arm == BASE))
    return arm.treatment.is_ready(job.bench)


# ---- errors


def _are_trained(count: int) -> ConfigError:
    return ConfigError(
        f"{count} processes cannot share the cells of an experiment that trains",
        expected="processes=1",
        found=count,
        remedy="spread its seeds: steer ab -m hydra/launcher=joblib seeds=[0],[1]",
    )
