"""`steer ab`: the cells of an experiment, run where they are missing, and the page of those that are done."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from steer.commands import cell_ranks
from steer.commands.cell_run import ADAPTER, STORE, run_cell, train_cell
from steer.commands.experiment_config import BASE, ExperimentConfig
from steer.commands.experiment_run import ExperimentRun
from steer.commands.forecast import Forecast
from steer.commands.info import versions
from steer.commands.side_by_side import side_by_side
from steer.errors import ConfigError, did_you_mean
from steer.experiment.analysis import analyse
from steer.experiment.cells import Cell, CellFolder, run_missing, state
from steer.experiment.lock import check_lock, write_lock
from steer.experiment.question import Question, question_of
from steer.experiment.result import Result, drift_records
from steer.experiment.scores import Place, Scores
from steer.files import atomic_write
from steer.model.shared_blocks import sharing_lower_blocks
from steer.report import summary_table

# Said by libraries about one another; a reader of our output can do nothing about them.
NOISE = (
    "`isinstance\\(treespec",
    "`is_gradient_checkpointing` is deprecated",
    "The 'train_dataloader' does not have many workers",
    "Checkpoint directory .* exists and is not empty",
)
ACTIONS = ("run", "plan", "lock", "report")


def run(config: DictConfig) -> None:
    """Runs, plans, locks or reports, as `do` says."""
    quieten_libraries()
    if config.do not in ACTIONS:
        raise _unknown_action(config.do)
    job = ExperimentRun(ExperimentConfig(config), Path(config.folder))
    {"run": run_all, "plan": plan, "lock": lock, "report": report}[config.do](job)


def run_all(job: ExperimentRun) -> Result | None:
    """Runs the cells that are missing, then writes the page; None on the other ranks of a run of torchrun."""
    if job.config.trains:
        cell_ranks.check_trainer(job.config.values.trainer)
    with cell_ranks.process_group(job.config.values.trainer.accelerator):
        return _run_all(job)


def _run_all(job: ExperimentRun) -> Result | None:
    question = asked(job.config)
    if cell_ranks.is_first():
        write_config(job)
        job.config.keep_precision(job.root)
    job.prepare()
    cells = CellFolder(job.root / "cells")
    wanted = job.config.cells()
    if not cell_ranks.is_first():
        cell_ranks.follow(wanted, lambda cell: train_cell(job, cell, cells))
        return None
    done = [cell for cell in wanted if cells.is_done(cell)]
    forecast = Forecast(done, cells, trains=job.config.trains)
    if len(done) < len(wanted):
        job.say("cells", f"{len(done)} of {len(wanted)} are done{_left(forecast, wanted, done)}")
    # arms of models that are not trained differ from the first block on where they act
    with nullcontext() if job.config.trains else sharing_lower_blocks(job.model):
        for cell in run_missing(wanted, cells, lambda cell: _announced(job, cell, cells)):
            forecast.add(cell)
            done.append(cell)
            job.say("done", f"{cell.name}: {len(done)} of {len(wanted)}{_left(forecast, wanted, done)}")
    cell_ranks.announce(None)
    with FileLock(cells.root / ".page.lock"):  # of several jobs the last one in sees the cells of all, and its page stays
        return write_page(job, question, cells)


def what_is_left(out: Path) -> str:
    """What an interrupted run leaves in its folder, in a line."""
    done = sorted(file.parent.name for file in out.glob("cells/*/done.json"))
    kept = f"{len(done)} finished cell{'s' * (len(done) > 1)}" if done else "what was begun"
    return f"interrupted: '{out}' keeps {kept}; the same command goes on from there"


def _announced(job: ExperimentRun, cell: Cell, cells: CellFolder) -> dict[str, Any]:
    job.say("cell", f"[cyan]{cell.name}[/]")
    return run_cell(job, cell, cells)


def plan(job: ExperimentRun) -> None:
    """Prints the cells, what they cost as far as cells of their kind were run, and the smallest effect that they can show."""
    question = asked(job.config)
    cells = CellFolder(job.root / "cells")
    wanted = job.config.cells()
    done = [cell for cell in wanted if cells.is_done(cell)]
    forecast = Forecast(done, cells, trains=job.config.trains)
    table = Table(title=f"{job.config.experiment.name}: {question.text}")
    for column in ("arm", "draws", "seeds", "done", "running", "seconds a cell"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name in (BASE, *(arm.name for arm in job.config.arms)):
        own = [cell for cell in wanted if cell.arm == name]
        states = [state(cell, cells) for cell in own]
        draws, seeds = len({cell.draw for cell in own}), len({cell.seed for cell in own})
        seconds = forecast.of_arm(name)
        known = "not known yet" if seconds is None else f"{seconds:.0f}"
        table.add_row(name, str(draws), str(seeds), str(states.count("done")), str(states.count("running")), known)
    job.console.print(table)
    if len(done) < len(wanted):
        left = _left(forecast, wanted, done) or "; run one seed to learn what a cell costs"
        job.say("cost", f"{len(wanted) - len(done)} cells are missing{left}")
    for pair in (question.primary, *question.secondary):
        job.say("contrast", f"{pair.outcome}: {pair.arm} - {pair.against}{' (primary)' if pair == question.primary else ''}")
    whole = _seeds_done(job, wanted, cells)
    if whole:
        metrics = _analysed(job, question, cells, [cell for cell in wanted if cell.arm == BASE or cell.seed in whole])
        effect = metrics["power"]["smallest_effect"]
        job.say("power", f"{len(whole)} seeds like these show an effect of {effect:.3g} {metrics['contrasts'][0]['unit']} in 4 of 5 runs")
    else:
        job.say("power", "not known before a seed is done")


def lock(job: ExperimentRun) -> None:
    """Writes prereg.json."""
    job.config.keep_precision(job.root)
    design = _design(job.config, asked(job.config), job.config.cells())
    job.say("locked", str(write_lock(job.root, design, CellFolder(job.root / "cells").first_begun())))


def report(job: ExperimentRun) -> None:
    """Reads the cells that are done, and writes the page."""
    others = [Path(folder) / "cells" for folder in job.config.values.get("folders") or ()]
    cells = CellFolder(job.root / "cells", others)
    cells.check_others(job.config.cells()[0].spec)
    write_page(job, asked(job.config), cells)


def write_page(job: ExperimentRun, question: Question, cells: CellFolder) -> Result:
    """metrics.json, the table of scores and the page of the seeds whose cells are all done, what other jobs ran here too."""
    wanted = job.config.cells(cells.seeds())
    done = _seeds_done(job, wanted, cells)
    if not done:
        raise _nothing_done(job, wanted, cells)
    chosen = [cell for cell in wanted if cell.arm == BASE or cell.seed in done]
    metrics = _analysed(job, question, cells, chosen)
    result = Result(metrics, metrics.pop("_scores"), drift_records(job.root, metrics))
    result.save(job.root)
    job.console.print(summary_table(metrics))
    if job.config.prompts:
        said = {name: [answer["text"] for answer in answers[:1]] for name, answers in metrics["completions"].items()}
        side_by_side(job.console, job.config.prompts[:1], said)
    job.say("report", str(job.root / "report.html"))
    return result


def asked(config: ExperimentConfig) -> Question:
    """The question of the configuration."""
    spec = config.settings["experiment"]
    return question_of(
        config.arms, config.outcomes, text=spec.get("question") or "", primary=spec.get("primary"), secondary=spec.get("secondary")
    )


def _analysed(job: ExperimentRun, question: Question, cells: CellFolder, chosen: Sequence[Cell]) -> dict[str, Any]:
    scores = Scores()
    results = {cell: cells.result(cell) for cell in chosen}
    before: dict[str, dict[str, float]] = {}
    for cell, result in results.items():
        if cell.arm == BASE:
            before = result["scores"]
            continue
        for outcome, values in result["scores"].items():
            scores.add(Place(outcome, cell.arm, cell.draw, cell.seed), values)
    sizes = {arm.name: [results[cell]["size"] for cell in _draws(chosen, arm.name)] for arm in job.config.arms}
    metrics = analyse(scores, question, job.config.arms, job.config.outcomes, before=before, sizes=sizes)
    first = {name: next(cell for cell in chosen if cell.arm == name) for name in (BASE, *(arm.name for arm in job.config.arms))}
    trained = [cell for cell in chosen if results[cell].get("training")]
    return metrics | {
        "experiment": job.config.experiment.name,
        "config": job.config.settings,
        "design": {
            "trained": job.config.trains,
            "precision": job.config.precision,
            "seeds": sorted({cell.seed for cell in chosen if cell.arm != BASE}),
            **_lock_state(job, question, chosen),
        },
        "model": {"name": job.config.values.model.name},
        "direction": next(result["direction"] for cell, result in results.items() if cell.arm == BASE),
        "features": next(result.get("features") for cell, result in results.items() if cell.arm == BASE),
        "circuits": next(result.get("circuits") for cell, result in results.items() if cell.arm == BASE),
        "versions": versions(),
        "command": _command(),
        "started": CellFolder(job.root / "cells").first_begun(),
        "seconds": sum(result["timing"]["seconds"] for result in results.values()),
        "completions": {name: results[cell]["completions"] for name, cell in first.items()},
        "projections": _projections(job),
        "training": {cell.name: {"arm": cell.arm, "draw": cell.draw, "seed": cell.seed, **results[cell]["training"]} for cell in trained},
        "overhead": {
            cell.arm: {"median": cost["callback_overhead"], "range": cost["callback_overhead_range"]}
            for cell in trained
            if "callback_overhead" in (cost := results[cell]["timing"])
        },
        "cells": {cell.name: {"arm": cell.arm, "draw": cell.draw, "seed": cell.seed, "key": cell.key} for cell in chosen},
        "drift": {"stores": {cell.name: _relative(job, cells, cell, STORE) for cell in trained if results[cell]["training"]["store"]}},
        "artifacts": {"adapters": {cell.name: _relative(job, cells, cell, ADAPTER) for cell in trained}},
        "_scores": scores,
    }


def _draws(cells: Sequence[Cell], arm: str) -> list[Cell]:
    """The cells of an arm in its first seed, one for each draw."""
    own = [cell for cell in cells if cell.arm == arm]
    return [cell for cell in own if cell.seed == own[0].seed]


def _projections(job: ExperimentRun) -> dict[str, Any] | None:
    """What the values of the tokens of completions are; None where no direction was read."""
    trait = job.config.settings["experiment"].get("trait")
    return None if trait is None else {"direction": trait["name"], "site": trait.get("site"), "unit": "class gaps"}


def _relative(job: ExperimentRun, cells: CellFolder, cell: Cell, name: str) -> str:
    """Where a file of a cell is, from the folder of metrics.json."""
    return os.path.relpath(cells.of(cell) / name, job.root)


def _design(config: ExperimentConfig, question: Question, cells: Sequence[Cell]) -> dict[str, Any]:
    """What a lock holds."""
    return {
        "question": question.to_dict(),
        "outcomes": config.settings["experiment"]["outcomes"],
        "arms": {arm.name: {"when": arm.when, "control_of": arm.control_of, "draws": arm.draws, "uses": arm.uses} for arm in config.arms},
        "seeds": sorted({cell.seed for cell in cells if cell.arm != BASE}),
        "cells": {f"{cell.arm}.{cell.draw}.{cell.seed}": cell.key for cell in cells},
    }


def _lock_state(job: ExperimentRun, question: Question, chosen: Sequence[Cell]) -> dict[str, Any]:
    return {"lock": check_lock(job.root, _design(job.config, question, chosen), CellFolder(job.root / "cells").first_begun())}


def _seeds_done(job: ExperimentRun, wanted: Sequence[Cell], cells: CellFolder) -> list[int]:
    """Seeds of which every cell is done, when the base is, too."""
    if not all(cells.is_done(cell) for cell in wanted if cell.arm == BASE):
        return []
    seeds = dict.fromkeys(cell.seed for cell in wanted if cell.arm != BASE)
    return [seed for seed in seeds if all(cells.is_done(cell) for cell in wanted if cell.seed == seed and cell.arm != BASE)]


def _left(forecast: Forecast, wanted: Sequence[Cell], done: Sequence[Cell]) -> str:
    """How long the cells that are missing take, as the end of a sentence; nothing where that is not known."""
    seconds = forecast.of([cell for cell in wanted if cell not in done])
    return "" if not seconds else f", about {_duration(seconds)} left in one process"


def write_config(job: ExperimentRun) -> None:
    """The resolved configuration, beside the cells."""
    atomic_write(job.root / "config" / "config.yaml", OmegaConf.to_yaml(job.config.values, resolve=True))


def quieten_libraries() -> None:
    """Keeps from the output what libraries say about one another."""
    for package in ("pytorch_lightning", "lightning.pytorch"):  # where both are installed, one speaks by the logger of the other
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


def _command() -> str:
    program, *arguments = sys.argv[0].split()
    return shlex.join([Path(program).name, *arguments, *sys.argv[1:]])


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


# ---- errors


def _unknown_action(action: Any) -> ConfigError:
    remedy = did_you_mean(str(action), ACTIONS) or "say 'steer ab', 'steer ab plan', 'steer ab lock' or 'steer ab report'"
    return ConfigError(f"'steer ab' cannot do '{action}'", expected=", ".join(ACTIONS), found=action, remedy=remedy)


def _nothing_done(job: ExperimentRun, wanted: Sequence[Cell], cells: CellFolder) -> ConfigError:
    done = sum(cells.is_done(cell) for cell in wanted)
    return ConfigError(
        "no seed of this experiment is done",
        expected=f"every cell of a seed in '{job.root / 'cells'}'",
        found=f"{done} of {len(wanted)} cells",
        remedy="run it: steer ab, with the same experiment, seeds and folder",
    )
