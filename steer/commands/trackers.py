"""Experiment trackers: one run for each cell, grouped by experiment. They get copies; the files of the cells are the source."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers import Logger

from steer.errors import ConfigError, did_you_mean
from steer.experiment.cells import Cell

KINDS = ("none", "tensorboard", "wandb", "mlflow")
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def check_tracker(spec: Mapping[str, Any] | None) -> None:
    """Raises ConfigError for a tracker that is not known, or whose package is missing."""
    kind = (spec or {}).get("kind", "none")
    if kind not in KINDS:
        raise _unknown(kind)
    if kind != "none":
        try:
            importlib.import_module(_PACKAGES[kind])
        except ImportError as error:
            raise _missing(kind, error) from error


def tracker_of(spec: Mapping[str, Any] | None, experiment: str, cell: Cell) -> Logger | None:
    """The logger of a cell; None without a tracker.

    Weights & Biases: group = experiment, job type = arm. MLflow: experiment = experiment, tags arm, draw and seed.
    """
    spec = spec or {}
    kind = spec.get("kind", "none")
    if kind == "tensorboard":
        from pytorch_lightning.loggers import TensorBoardLogger

        return TensorBoardLogger(spec["folder"], name=experiment, version=cell.name)
    if kind == "wandb":
        from pytorch_lightning.loggers import WandbLogger

        return WandbLogger(
            project=spec["project"], group=experiment, job_type=cell.arm, name=cell.name, save_dir=spec["folder"], mode=spec["mode"]
        )
    if kind == "mlflow":
        from pytorch_lightning.loggers import MLFlowLogger

        tags = {"arm": cell.arm, "draw": str(cell.draw), "seed": str(cell.seed)}
        return MLFlowLogger(experiment_name=experiment, run_name=cell.name, tracking_uri=spec["uri"], tags=tags)
    return None


def log_result(logger: Logger | None, result: Mapping[str, Any]) -> None:
    """Sends the means of the outcomes, and closes the run."""
    if logger is None:
        return
    means = {f"outcome/{name}": sum(values.values()) / len(values) for name, values in result["scores"].items()}
    logger.log_metrics(means)
    logger.finalize("success")
    if type(logger).__name__ == "WandbLogger":
        logger.experiment.finish()  # type: ignore[attr-defined]  # or the next cell goes on with this run


# ---- errors


def _unknown(kind: Any) -> ConfigError:
    remedy = did_you_mean(str(kind), KINDS) or "set tracker to one of these"
    return ConfigError(f"unknown tracker '{kind}'", expected=", ".join(KINDS), found=kind, remedy=remedy)


def _missing(kind: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"the tracker '{kind}' is not installed", expected=f"the package {kind}", found=str(error), remedy=f"pip install {kind}"
    )
