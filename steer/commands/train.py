"""`steer train`: an experiment with one seed and one draw of each control, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from steer.commands import ab
from steer.commands.experiment_config import ExperimentConfig
from steer.commands.experiment_run import ExperimentRun
from steer.commands.train_checks import check_seed, check_unused


def run(config: DictConfig) -> None:
    """Runs every arm and writes metrics.json, scores, the page, and for each cell its plan, adapter and drift records."""
    ab.quieten_libraries()
    out = Path(HydraConfig.get().runtime.output_dir)
    check_unused(out)
    check_seed(config.seed)
    with open_dict(config):  # seeds is a key of `steer ab`
        config.update(seeds=[config.seed], folder=str(out))
    ab.run_all(ExperimentRun(ExperimentConfig(config), out))


def what_is_left(out: Path) -> str:
    """What an interrupted run leaves in its folder, in a line."""
    return ab.what_is_left(out).replace("the same command", f"the same command with 'hydra.run.dir={out}'")
