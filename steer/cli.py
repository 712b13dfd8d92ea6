"""`steer <command> [overrides]`: one Hydra entry point for every command."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from steer import __version__
from steer.errors import ConfigError, SteerError

# command -> (what it does, an example); a module of the same name in steer.commands has run(config)
COMMANDS = {
    "train": ("fine-tune the arms of an experiment, track drift, write a report", "steer train experiment=tone seed=1"),
    "generate": (
        "show completions of an experiment's arms side by side",
        "steer generate run=outputs/tone/<date> 'prompts=[How do I boil an egg?]'",
    ),
    "info": ("versions, devices, kernels and the registered methods", "steer info"),
}
USAGE = "\n".join(
    [
        f"steer {__version__}: model editing and steering inside training and generation",
        "",
        "usage: steer <command> [key=value ...]",
        "",
        *(f"  {name:<10}{what}\n  {'':<10}e.g. {example}" for name, (what, example) in COMMANDS.items()),
        "",
        "steer <command> --help shows every key of a command; -m runs a command once per combination (steer train -m seed=1,2,3).",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; errors of the user's making are printed without a traceback, exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        command = arguments[0]
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            raise ConfigError(
                f"unknown command '{command}'", expected=", ".join(COMMANDS), remedy=f"did you mean '{near[0]}'?" if near else None
            )
        _run(command, arguments[1:])
    except SteerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _run(command: str, overrides: list[str]) -> None:
    import hydra
    from hydra.errors import HydraException

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us as exceptions, not as printed text
    task = importlib.import_module(f"steer.commands.{command}").run
    before = sys.argv
    sys.argv = [f"steer {command}", *overrides]
    try:
        hydra.main(version_base="1.3", config_path="pkg://steer.conf", config_name=command)(task)()
    except HydraException as error:
        raise config_error(command, error) from error
    finally:
        sys.argv = before


def config_error(command: str, error: Exception) -> ConfigError:
    """Turns Hydra's complaint about an override into one that names the nearest key."""
    said = str(error)
    wrong = re.search(r"[Kk]ey '([^']+)'", said) or re.search(r"Could not override '([^']+)'", said) or re.search(r"'([^']+)'", said)
    near = difflib.get_close_matches(wrong[1], _keys(command), n=2, cutoff=0.5) if wrong else []
    return ConfigError(
        f"configuration of 'steer {command}' is wrong: {said.splitlines()[0]}",
        expected=f"near it: {', '.join(near)}" if near else None,
        found=wrong[1] if wrong else None,
        remedy=f"steer {command} --help lists every key",
    )


def _keys(command: str) -> list[str]:
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_module("steer.conf", version_base="1.3"):
        config: Any = OmegaConf.to_container(compose(command), resolve=False)

    def walk(node: Any, prefix: str = "") -> list[str]:
        if not isinstance(node, dict):
            return []
        return [name for key, value in node.items() for name in (key, f"{prefix}{key}", *walk(value, f"{prefix}{key}."))]

    return walk(config)


if __name__ == "__main__":
    sys.exit(main())
