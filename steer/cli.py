"""`steer <command> [overrides]`: one Hydra entry point for every command.

A command's module, and with it torch, is imported when the command runs: help, versions and misspelt keys need only the configuration.
"""

from __future__ import annotations

import errno
import importlib
import os
import select
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from steer import __version__
from steer.commands.verbs import VERBS
from steer.errors import ConfigError, SteerError, StorageFullError, did_you_mean

# command -> (what it does, an example); a module of the same name in steer.commands has run(config)
COMMANDS = {
    "train": ("fine-tune the arms of an experiment, track drift, write a report", "steer train experiment=tone seed=1"),
    "ab": ("compare edits in cells of arms, controls and seeds, resumable, on one page", "steer ab experiment=tone seeds=[0,1,2,3,4]"),
    "generate": (
        "show completions of an experiment's arms side by side",
        "steer generate run=outputs/tone/<date> 'prompts=[How do I boil an egg?]'",
    ),
    "say": (
        "show answers of the plain model and of one steered by a text side by side",
        """steer say 'steer="0.4 warm@response"' directions.warm=<folder> 'prompts=[How do I boil an egg?]'""",
    ),
    "show": (
        "open a local page with a plan's sliders, answers side by side and coloured tokens",
        """steer show 'steer="0.4 warm@response"' directions.warm=<folder>""",
    ),
    "features": (
        "train, search, read and measure dictionaries of a model's activations",
        "steer features train data=book.txt 'width=[4096]'",
    ),
    "bias": (
        "find the circuit of a bias, ablate it, measure bias and cost beside the standard baselines, on one page",
        "steer bias experiment=gender_pronoun",
    ),
    "edit": (
        "write facts into a model, measured before and after, kept as an edit and as an adapter",
        "steer edit 'prompt=The mother tongue of Danielle Darrieux is' 'subject=Danielle Darrieux' target=English",
    ),
    "trace": (
        "trace facts: which states bring an answer back when the subject of its prompt is corrupted",
        "steer trace 'prompt=The Eiffel Tower is in the city of' 'subject=Eiffel Tower'",
    ),
    "info": ("versions, devices, kernels and the registered methods", "steer info"),
}
USER_NAMED_SECTIONS = {  # sections of a command whose keys are names of the user's own
    "say": ("directions.", "gates.", "dictionaries."),
    "show": ("directions.", "gates.", "dictionaries."),
    "edit": ("options.",),
    "trace": ("settings.",),
    "features find": ("concepts.", "labelled.", "settings."),
    "features evaluate": ("labelled.",),
    "features page": ("settings.", "neuronpedia."),
}
RUNS = ("run", "plan", "lock", "report")
ACTIONS = {"ab": RUNS, "features": RUNS, "bias": RUNS}  # of a command, said as a word behind it: steer ab plan experiment=tone
MULTIRUN = ("-m", "--multirun")
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
    """Runs a command; errors of the user's making are printed without a traceback, exit status 2, and 130 after Ctrl-C. It ends quietly
    with 141, as a shell reports it, when whoever reads the output stops reading, as `head` does."""
    try:
        status = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return 128 + 13  # the number of SIGPIPE


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        flags = [word for word in arguments if word in MULTIRUN]  # argparse takes no overrides on both sides of a flag
        command, *overrides = [word for word in arguments if word not in MULTIRUN] or flags
        if command not in COMMANDS:
            raise _unknown_command(command)
        if overrides and overrides[0] in VERBS.get(command, ()):
            command = f"{command} {overrides.pop(0)}"
        elif overrides and overrides[0] in ACTIONS.get(command, ()):
            action = f"do={overrides.pop(0)}"
            overrides.insert(len(overrides) if overrides and overrides[0].startswith("-") else 0, action)  # beside other overrides, again
        _run_with_hydra(command, [*flags, *overrides])
    except SteerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{stop}" if str(stop) else "\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _stdout_is_closed() -> bool:
    """True when nobody reads the output any more; what is left of it then goes nowhere, so that Python does not try again when it ends."""
    out = sys.stdout.fileno()
    poll = select.poll()
    poll.register(out, 0)  # asks for errors alone
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return True


class _Job:
    """A command as the task function that Hydra calls, once or, with -m, once per combination.

    Attributes:
        failures: errors of the user's making; through Hydra they would come with a line of noise.
        os_errors: errors of the operating system that the command itself raised.
        has_begun: Hydra has read the overrides.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.process = os.getpid()
        self.failures: list[SteerError] = []
        self.os_errors: list[OSError] = []
        self.has_begun = False

    def __call__(self, config: Any) -> None:
        from omegaconf.errors import OmegaConfBaseException

        from steer.commands.config import check_kinds, config_error

        self.has_begun = True
        try:
            check_kinds(config, self.command)
            self._run(config)
        except SteerError as error:
            self._failed(error)
        except OmegaConfBaseException as error:
            self._failed(config_error(self.command, error))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self.os_errors.append(error)
                raise
            self._failed(_storage_full(error))

    def _failed(self, error: SteerError) -> None:
        if os.getpid() != self.process:  # a launcher runs the job in a process of its own, and hands back what is raised alone
            raise error
        self.failures.append(error)

    def _run(self, config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        module = importlib.import_module(f"steer.commands.{_module(self.command)}")
        try:
            module.run(config)
        except KeyboardInterrupt:
            if not hasattr(module, "what_is_left"):
                raise
            out = config.get("folder") or HydraConfig.get().runtime.output_dir  # of one job of a sweep, the latter is its own
            raise KeyboardInterrupt(module.what_is_left(Path(out))) from None


def _run_with_hydra(command: str, overrides: Sequence[str]) -> None:
    """Lets Hydra read the overrides and run the command. Raises SteerError for whatever is wrong with either."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from steer.commands import help_texts
    from steer.commands.config import config_error

    help_texts.register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us as exceptions, not as printed text
    job = _Job(command)

    def task(config: Any) -> None:
        job(config)

    task.__module__ = f"steer.commands.{_module(command)}"  # Hydra names the job after it
    with _command_line(command, overrides), _short_warnings(), _quick_help() if {"-h", "--help"} & set(overrides) else nullcontext():
        try:
            hydra.main(version_base="1.3", config_path="pkg://steer.conf", config_name=_module(command))(task)()
        except (HydraException, OmegaConfBaseException) as error:
            raise config_error(command, error) from error
        except ValueError as error:  # of a group of which something else than a choice is made, such as `trainer=null`
            if job.has_begun:
                raise
            raise config_error(command, error) from error
        except OSError as error:
            if error in job.os_errors or isinstance(error, BrokenPipeError):
                raise
            raise _no_output_folder(error) from error  # Hydra makes the folder
        except SystemExit as done:  # --help and the like
            if done.code:
                raise
    if job.failures:
        raise job.failures[0]


def _module(command: str) -> str:
    """Name of the module and of the configuration of a command, which may have a verb."""
    return command.replace(" ", "_")


@contextmanager
def _command_line(command: str, overrides: Sequence[str]) -> Iterator[None]:
    """Puts `steer <command>` and its overrides where Hydra reads them; keys of the user's own get ++, Hydra's sign for a new key."""
    own_argv = sys.argv
    user_named = USER_NAMED_SECTIONS.get(command, ())
    sys.argv = [f"steer {command}", *(f"++{text}" if text.startswith(user_named) else text for text in overrides)]
    try:
        yield
    finally:
        sys.argv = own_argv


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings are one sentence, without the line of this library that they come from."""
    own = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *_, **__: f"{category.__name__}: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = own


@contextmanager
def _quick_help() -> Iterator[None]:
    """Keeps Hydra from copying its store of built-in settings once for every choice that the help lists, a third of its time."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.__deepcopy__ = lambda store, _: store  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del ConfigStore.__deepcopy__  # type: ignore[attr-defined]


# ---- errors


def _unknown_command(command: str) -> ConfigError:
    remedy = did_you_mean(command, COMMANDS) or "'steer --help' says what each of them does"
    return ConfigError(f"unknown command '{command}'", expected=", ".join(COMMANDS), found=command, remedy=remedy)


def _storage_full(error: OSError) -> StorageFullError:
    return StorageFullError(
        f"no room to write {error.filename or 'the output'}",
        expected="free space on the disk, and in your quota on it",
        found=str(error),
        remedy="free some space and run it again",
    )


def _no_output_folder(error: OSError) -> ConfigError:
    return ConfigError(
        "the output folder cannot be made",
        expected="hydra.run.dir (with -m hydra.sweep.dir) at a place where folders can be made",
        found=str(error),
        remedy="choose another place, or leave the key out",
    )


if __name__ == "__main__":
    sys.exit(main())
