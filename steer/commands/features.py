"""`steer features experiment=...`: an experiment with features, as `steer ab` runs it. The verbs (`steer features train`, ...) have modules
of their own, `features_<verb>`."""

from __future__ import annotations

from omegaconf import DictConfig

from steer.commands import ab
from steer.commands.verbs import VERBS
from steer.errors import ConfigError

what_is_left = ab.what_is_left


def run(config: DictConfig) -> None:
    """Runs, plans, locks or reports an experiment, as `do` says. Raises ConfigError where none is named."""
    if "experiment" not in config:
        raise _nothing_to_do()
    ab.run(config)


# ---- errors


def _nothing_to_do() -> ConfigError:
    verbs = ", ".join(VERBS["features"])
    return ConfigError(
        "'steer features' was not told what to do",
        expected=f"a verb ({verbs}) or experiment=<name>",
        found="neither",
        remedy="'steer features --help' says what each of them does",
    )
