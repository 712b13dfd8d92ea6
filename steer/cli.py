"""`steer <command> [overrides]`: one Hydra entry point for every command."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from steer import __version__
from steer.errors import ConfigError, SteerError, StorageFullError, did_you_mean

# command -> (what it does, an example); a module of the same name in steer.commands has run(config)
COMMANDS = {
    "train": ("fine-tune the arms of an experiment, track drift, write a report", "steer train experiment=tone seed=1"),
    "generate": (
        "show completions of an experiment's arms side by side",
        "steer generate run=outputs/tone/<date> 'prompts=[How do I boil an egg?]'",
    ),
    "say": (
        "show answers of the plain model and of one steered by a text side by side",
        """steer say 'steer="0.4 warm@response"' directions.warm=<folder> 'prompts=[How do I boil an egg?]'""",
    ),
    "info": ("versions, devices, kernels and the registered methods", "steer info"),
}
NAMED = {"say": ("directions.", "gates.")}  # sections whose keys are names of the user's own
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
    """Runs a command; errors of the user's making are printed without a traceback, exit status 2, and 130 after Ctrl-C."""
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
            remedy = did_you_mean(command, COMMANDS) or "'steer --help' says what each of them does"
            raise ConfigError(f"unknown command '{command}'", expected=", ".join(COMMANDS), found=command, remedy=remedy)
        _run(command, arguments[1:])
    except SteerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{stop}" if str(stop) else "\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _run(command: str, overrides: list[str]) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from steer.commands.config import check_kinds, config_error

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us as exceptions, not as printed text
    module = importlib.import_module(f"steer.commands.{command}")
    run, left_by = module.run, getattr(module, "left_by", None)
    failed: list[SteerError] = []
    others: list[OSError] = []

    @wraps(run)
    def task(config: Any) -> None:
        try:
            check_kinds(config, command)
            run(config)
        except SteerError as error:
            failed.append(error)  # through Hydra it would come with a line of noise
        except OmegaConfBaseException as error:
            failed.append(config_error(command, error))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*([left_by(Path(HydraConfig.get().runtime.output_dir))] if left_by else [])) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                others.append(error)
                raise
            failed.append(
                StorageFullError(
                    f"no room to write {error.filename or 'the output'}",
                    expected="free space on the disk, and in your quota on it",
                    found=str(error),
                    remedy="free some space and run it again",
                )
            )

    before = sys.argv
    own = NAMED.get(command, ())
    sys.argv = [f"steer {command}", *(f"++{one}" if one.startswith(own) else one for one in overrides)]  # Hydra's sign for a new key
    try:
        hydra.main(version_base="1.3", config_path="pkg://steer.conf", config_name=command)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise config_error(command, error) from error
    except OSError as error:  # where it was not the command, it was Hydra, which makes the folder for it
        if error in others:
            raise
        raise ConfigError(
            "the output folder cannot be made",
            expected="hydra.run.dir (with -m hydra.sweep.dir) at a place where folders can be made",
            found=str(error),
            remedy="choose another place, or leave the key out",
        ) from error
    except SystemExit as done:  # --help and the like
        if done.code:
            raise
    finally:
        sys.argv = before
    if failed:
        raise failed[0]


if __name__ == "__main__":
    sys.exit(main())
