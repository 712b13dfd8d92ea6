"""What is wrong with a configuration, in terms of its keys. Hydra and OmegaConf find typos; wrong kinds of value are found here."""

from __future__ import annotations

import difflib
import re
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

from steer.errors import ConfigError, did_you_mean

UNCHECKED = ("trainer",)  # goes to Lightning as it is, which takes several kinds of value and checks them itself
TEXT, WHOLE, NUMBER, SWITCH, LIST, SECTION = "text", "a whole number", "a number", "true or false", "a list", "a section of keys"
ALSO = {TEXT: (WHOLE, NUMBER, SWITCH), NUMBER: (WHOLE,)}  # kinds that will do where another one is the default


def dtype_named(name: str) -> torch.dtype:
    """`float32`, `bfloat16`, ... Raises ConfigError."""
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"unknown dtype '{name}'", expected="float32, bfloat16 or float16", found=name, remedy="set model.dtype=float32")
    return dtype


def check_kinds(config: Any, command: str) -> None:
    """Compares every value with its default: a number, list or section must stay one; null may stand anywhere.

    Args:
        config: of the running job.

    Raises:
        ConfigError: names the key.
    """
    job = HydraConfig.get()
    groups = {group: choice for group, choice in job.runtime.choices.items() if choice and not group.startswith("hydra")}
    added = {override.split("=")[0] for override in job.overrides.task}  # +group=choice, for a group that the command does not have
    chosen = [f"{'+' if f'+{group}' in added else ''}{group}={choice}" for group, choice in groups.items()]
    _check(config, _composed(command, chosen), command, "")


def _check(config: Any, defaults: Any, command: str, prefix: str) -> None:
    for key in defaults:
        name = f"{prefix}{key}"
        value, default = (None if key not in node or OmegaConf.is_missing(node, key) else node[key] for node in (config, defaults))
        if value is None or default is None or name in UNCHECKED:
            continue
        if (found := _kind(value)) != (wanted := _kind(default)) and found not in ALSO.get(wanted, ()):
            raise ConfigError(
                f"'{name}' cannot be {value!r}", expected=f"{wanted}, such as {default}", found=f"{found}: {value}", remedy=_listed(command)
            )
        if wanted == SECTION:
            _check(value, default, command, f"{name}.")


def _kind(value: Any) -> str:
    kinds = {DictConfig: SECTION, ListConfig: LIST, bool: SWITCH, int: WHOLE, float: NUMBER}  # in this order: True is an int
    return next((kind for of, kind in kinds.items() if isinstance(value, of)), TEXT)


def config_error(command: str, error: Exception) -> ConfigError:
    """Turns a complaint of Hydra or OmegaConf into one that names the nearest key."""
    said = str(error).splitlines()[0]
    if isinstance(error, OverrideParseException):
        key, given, _ = str(error.override).partition("=")
        remedy = f"quote a value with special characters twice: '{key}=\"a value\"'" if given else f"add '=' and a value: {key}=..."
        return ConfigError(f"cannot read '{error.override}'", expected="key=value", found=error.message.splitlines()[0], remedy=remedy)
    if said.startswith("Ambiguous value for argument"):  # commas outside of brackets and quotes; Hydra knows them as a sweep
        key = said.partition("'")[2].partition("=")[0]
        remedy = f"quote a text with commas twice: '{key}=\"a, b\"', write a list in brackets: '{key}=[a,b]', or sweep over them with -m"
        return ConfigError(f"'{key}' has several values", expected="one value", found=said.partition(" argument ")[2], remedy=remedy)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, wrong = str(error.missing_cfg_file).rpartition("/")
        remedy = did_you_mean(wrong, error.options) or _listed(command)
        return ConfigError(f"no {group} is called '{wrong}'", expected=f"one of {', '.join(error.options)}", found=wrong, remedy=remedy)
    if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
        key = said.rpartition(": ")[2]
        return ConfigError(f"'steer {command}' needs the key '{key}'", expected=f"{key}=...", found="nothing", remedy=_listed(command))
    if (named := re.search(r"[Cc]ould not override '([^']+)'", said)) is None:
        wanted = "known keys, each with a value that can be read"
        return ConfigError(f"the configuration of 'steer {command}' is wrong", expected=wanted, found=said, remedy=_listed(command))
    near = _near(named[1], command)
    return ConfigError(
        f"'steer {command}' has no key '{named[1]}'",
        expected=f"near it: {', '.join(near)}" if near else "a key of the configuration",
        found=named[1],
        remedy=f"did you mean '{near[0]}'? {_listed(command)}" if near else _listed(command),
    )


def _listed(command: str) -> str:
    return f"'steer {command} --help' lists every key"


def _near(wrong: str, command: str) -> list[str]:
    """Keys with a similar path, then keys whose last part is similar."""
    keys = _keys(_composed(command, []))
    last = {key.rpartition(".")[2]: key for key in keys}
    near = difflib.get_close_matches(wrong, keys, n=2)
    return list(dict.fromkeys([*near, *(last[name] for name in difflib.get_close_matches(wrong.rpartition(".")[2], last, n=1))]))


def _keys(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        value = None if OmegaConf.is_missing(config, key) else config[key]
        keys += [f"{prefix}{key}", *(_keys(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else [])]
    return keys


def _composed(command: str, overrides: list[str]) -> DictConfig:
    if GlobalHydra.instance().is_initialized():
        return compose(command, overrides)
    with initialize_config_module("steer.conf", version_base="1.3"):
        return compose(command, overrides)
