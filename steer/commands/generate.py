"""`steer generate`: what the arms of a finished experiment say to the same prompts, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from steer.commands.cell_run import as_measured
from steer.commands.config import listed
from steer.commands.experiment_config import BASE, ExperimentConfig
from steer.commands.experiment_run import ExperimentRun
from steer.commands.side_by_side import side_by_side
from steer.errors import ConfigError, DamagedFileError, NonFiniteError, WrongKindError
from steer.experiment.analysis import SCHEMA
from steer.experiment.arms import Arm
from steer.experiment.cells import CellFolder
from steer.experiment.complete import check_completions, complete
from steer.files import SEAL, check_seal, contents
from steer.reading import damage_of, read_json


def run(config: DictConfig) -> None:
    """Prints the completions of a finished run, arm beside arm."""
    prompts = listed(config.prompts)
    folder = Path(config.run)
    answers = completions(folder, prompts, listed(config.arms), config.max_new_tokens)
    side_by_side(Console(), prompts or finished_run(folder).config.prompts, answers)


def read_run(folder: Path) -> dict[str, Any]:
    """metrics.json of a finished run.

    Raises:
        ConfigError: there is none. DamagedFileError: it cannot be read. WrongKindError: another version wrote it.
    """
    file = folder / "metrics.json"
    if not file.is_file():
        raise _no_run(folder)
    try:
        metrics = read_json(file)
    except (DamagedFileError, NonFiniteError) as error:
        raise _damaged_metrics(file, error.found) from error
    if not isinstance(metrics, dict) or "schema" not in metrics:
        raise _damaged_metrics(file, metrics)
    if metrics["schema"] != SCHEMA:
        raise _other_schema(file, metrics["schema"])
    check_seal(metrics, file, is_required=True)
    metrics.pop(SEAL, None)
    return metrics


def finished_run(folder: Path) -> ExperimentRun:
    """A finished run, with the configuration that it was made with. Raises as `read_run`."""
    config = read_run(folder).get("config")
    if config is None:
        raise _no_configuration(folder)
    file = folder / "metrics.json"
    with damage_of(file, "the JSON that `steer train` wrote", f"'{file}' is damaged", "run the experiment again"):
        return ExperimentRun(ExperimentConfig(cast(DictConfig, OmegaConf.create(config))), folder)


def completions(folder: Path, prompts: list[str] | None, names: list[str] | None, max_new_tokens: int) -> dict[str, list[str]]:
    """Greedy answers of the base model and of each arm, of the first seed and draw.

    Args:
        folder: output of `steer train` or `steer ab`.
        prompts: user messages, None for those of the experiment.
        names: arms, None for all.

    Raises:
        ConfigError: no such run or arm, or no room for an answer. DamagedFileError: an adapter of the run is missing or damaged.
    """
    check_completions(["?"] if prompts is None else prompts, max_new_tokens)
    run = finished_run(folder)
    if unknown := set(names or ()) - {arm.name for arm in run.config.arms}:
        raise _unknown_arms(unknown, run.config.arms, names)
    prompts = prompts or run.config.prompts
    cells = CellFolder(folder / "cells")
    answers = {BASE: complete(run.model, run.tokenizer, prompts, max_new_tokens=max_new_tokens)}
    for arm in run.config.arms:
        if names and arm.name not in names:
            continue
        cell = next(cell for cell in run.config.cells() if cell.arm == arm.name)
        with as_measured(run, cell, cells) as (model, system):
            asked = [{"prompt": prompt, "system": system} for prompt in prompts]
            answers[arm.name] = complete(model, run.tokenizer, asked, max_new_tokens=max_new_tokens)
    return answers


# ---- errors


def _no_run(folder: Path) -> ConfigError:
    return ConfigError(
        f"'{folder}' is no finished run",
        expected="the output folder of `steer train` or `steer ab`, with metrics.json in it",
        found=contents(folder),
        remedy="give the folder that `steer train` printed as its last line, without the name of the report",
    )


def _no_configuration(folder: Path) -> ConfigError:
    return ConfigError(
        f"'{folder}' holds a comparison without the model and the adapters that it was made with",
        expected="the output folder of `steer train` or `steer ab`",
        found="a result of steer.compare",
        remedy="generate in Python, with the model and the plans of the comparison",
    )


def _damaged_metrics(file: Path, found: object) -> DamagedFileError:
    remedy = "restore it from a backup, or run the experiment again"
    return DamagedFileError(f"'{file}' is damaged", expected="the JSON that `steer train` wrote", found=f"{found!r:.80}", remedy=remedy)


def _other_schema(file: Path, schema: Any) -> WrongKindError:
    remedy = "read it with the library version that wrote it"
    return WrongKindError(f"'{file}' is of another schema", expected=f"schema {SCHEMA}", found=f"schema {schema}", remedy=remedy)


def _unknown_arms(unknown: set[str], arms: list[Arm], names: list[str] | None) -> ConfigError:
    return ConfigError(
        f"no arm is called {', '.join(sorted(unknown))}",
        expected=f"some of {', '.join(arm.name for arm in arms)}",
        found=names,
        remedy="name arms of this run in arms=[...], or leave it out to see all of them",
    )
