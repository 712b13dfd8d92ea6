"""What is wrong with a configuration, in terms of its keys. Hydra and OmegaConf find typos; wrong kinds of value are found here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

from steer.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

OF_ANY_KIND = ("trainer",)  # sections whose values go to Lightning, which takes several kinds of each and checks them itself
OF_ONES_OWN = ("experiment.arms", "experiment.outcomes")  # sections whose keys are names; what lies below is checked where it is read

# kinds of value, in the words of the error messages
TEXT = "text"
WHOLE_NUMBER = "a whole number"
NUMBER = "a number"
SWITCH = "true or false"
LIST = "a list"
SECTION = "a section of keys"
KINDS = {DictConfig: SECTION, ListConfig: LIST, bool: SWITCH, int: WHOLE_NUMBER, float: NUMBER}  # in this order: True is an int
ALSO_ACCEPTED = {TEXT: (WHOLE_NUMBER, NUMBER, SWITCH), NUMBER: (WHOLE_NUMBER,)}  # kind of the default -> other kinds that will do


def dtype_named(name: str) -> torch.dtype:
    """`float32`, `bfloat16`, ... Raises ConfigError."""
    import torch  # takes seconds, and this module is read for --help too

    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"unknown dtype '{name}'", expected="float32, bfloat16 or float16", found=name, remedy="set model.dtype=float32")
    return dtype


def listed(value: Any) -> list[str] | None:
    """A list of texts; one text alone counts as a list of it, null and an empty list as nothing.

    Raises:
        ConfigError: a null, or anything else that is no text, within the list.
    """
    if value is not None and not isinstance(value, ListConfig):
        return [str(value)]
    for text in value or ():
        if text is None or isinstance(text, (ListConfig, DictConfig)):
            raise _no_text(text)
    return [str(text) for text in value or ()] or None


def check_kinds(config: Any, command: str) -> None:
    """Compares every value with its default: there must be one, and a number, list or section must stay one; null may stand anywhere.

    Args:
        config: of the running job.

    Raises:
        ConfigError: names the key.
    """
    job = HydraConfig.get()
    groups = {group: choice for group, choice in job.runtime.choices.items() if choice and not group.startswith("hydra")}
    added = {override.split("=")[0] for override in job.overrides.task}  # +group=choice, for a group that the command does not have
    chosen = [f"{'+' if f'+{group}' in added else ''}{group}={choice}" for group, choice in groups.items()]
    _check_section(config, _composed(command, chosen), command, "")


def as_typed(config: DictConfig, key: str) -> str | None:
    """A text of the command line as it was typed, though Hydra reads `true`, `1_000` and the like as values; None where it is null."""
    value = config[key]
    if value is None or isinstance(value, str):
        return value
    for override in reversed(HydraConfig.get().overrides.task if HydraConfig.initialized() else []):  # the last one counts
        name, _, text = override.partition("=")
        if name.lstrip("+") == key:
            return text.strip()
    return str(value)


def config_error(command: str, error: Exception) -> ConfigError:
    """Turns a complaint of Hydra or OmegaConf into one that names the nearest key."""
    message = str(error).splitlines()[0]
    if isinstance(error, OverrideParseException):
        return _unreadable_override(error)
    if message.startswith("Ambiguous value for argument"):  # commas outside of brackets and quotes; Hydra knows them as a sweep
        return _several_values(message)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _unknown_choice(command, str(error.missing_cfg_file), error.options)
    if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
        return _missing_key(command, message.rpartition(": ")[2])
    if named := re.search(r"[Cc]ould not override '([^']+)'", message):
        return _unknown_key(command, named[1])
    wanted = "known keys, each with a value that can be read"
    return ConfigError(f"the configuration of 'steer {command}' is wrong", expected=wanted, found=message, remedy=_see_help(command))


# ---- kinds of value


def _check_section(config: Any, defaults: Any, command: str, prefix: str) -> None:
    is_named = prefix.removesuffix(".").startswith(OF_ONES_OWN)
    for key in config:
        if not is_named and len(defaults) and key not in defaults.keys():  # noqa: SIM118 - `in` says no of a mandatory key; + and ++ add keys
            raise _unknown_key(command, f"{prefix}{key}")
    for key in defaults:
        name = f"{prefix}{key}"
        value = _value(config, key)
        default = _value(defaults, key)
        if value is None or default is None or prefix.removesuffix(".") in OF_ANY_KIND:
            continue
        kind = _kind(value)
        wanted = _kind(default)
        if kind != wanted and kind not in ALSO_ACCEPTED.get(wanted, ()):
            expected = f"{wanted}, such as {default}"
            raise ConfigError(f"'{name}' cannot be {value!r}", expected=expected, found=f"{kind}: {value}", remedy=_see_help(command))
        if wanted == SECTION:
            _check_section(value, default, command, f"{name}.")


def _value(section: Any, key: str) -> Any:
    return None if key not in section or OmegaConf.is_missing(section, key) else section[key]


def _kind(value: Any) -> str:
    return next((kind for cls, kind in KINDS.items() if isinstance(value, cls)), TEXT)


# ---- keys near a misspelt one


def _near_keys(wrong: str, command: str) -> list[str]:
    """Keys with a similar path, then keys whose last part is similar."""
    keys = _keys(_composed(command, []))
    by_last_part = {key.rpartition(".")[2]: key for key in keys}
    last_parts = difflib.get_close_matches(wrong.rpartition(".")[2], by_last_part, n=1)
    return list(dict.fromkeys([*difflib.get_close_matches(wrong, keys, n=2), *(by_last_part[part] for part in last_parts)]))


def _keys(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        value = _value(config, key)
        keys += [f"{prefix}{key}", *(_keys(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else [])]
    return keys


def _composed(command: str, overrides: list[str]) -> DictConfig:
    name = command.replace(" ", "_")  # of a verb, such as `features train`
    if GlobalHydra.instance().is_initialized():
        return compose(name, overrides)
    with initialize_config_module("steer.conf", version_base="1.3"):
        return compose(name, overrides)


# ---- errors


def _see_help(command: str) -> str:
    return f"'steer {command} --help' lists every key"


def _no_text(entry: object) -> ConfigError:
    found = "null" if entry is None else entry
    return ConfigError("an entry of a list is no text", expected="text", found=found, remedy="leave it out, or quote it: '[\"null\"]'")


def _unreadable_override(error: OverrideParseException) -> ConfigError:
    key, equals, _ = str(error.override).partition("=")
    remedy = f"quote a value with special characters twice: '{key}=\"a value\"'" if equals else f"add '=' and a value: {key}=..."
    return ConfigError(f"cannot read '{error.override}'", expected="key=value", found=error.message.splitlines()[0], remedy=remedy)


def _several_values(message: str) -> ConfigError:
    key = message.partition("'")[2].partition("=")[0]
    remedy = f"quote a text with commas twice: '{key}=\"a, b\"', write a list in brackets: '{key}=[a,b]', or sweep over them with -m"
    return ConfigError(f"'{key}' has several values", expected="one value", found=message.partition(" argument ")[2], remedy=remedy)


def _unknown_choice(command: str, config_file: str, options: Sequence[str]) -> ConfigError:
    group, _, wrong = config_file.rpartition("/")
    remedy = did_you_mean(wrong, options) or _see_help(command)
    return ConfigError(f"no {group} is called '{wrong}'", expected=f"one of {', '.join(options)}", found=wrong, remedy=remedy)


def _missing_key(command: str, key: str) -> ConfigError:
    return ConfigError(f"'steer {command}' needs the key '{key}'", expected=f"{key}=...", found="nothing", remedy=_see_help(command))


def _unknown_key(command: str, wrong: str) -> ConfigError:
    near = _near_keys(wrong, command)
    return ConfigError(
        f"'steer {command}' has no key '{wrong}'",
        expected=f"near it: {', '.join(near)}" if near else "a key of the configuration",
        found=wrong,
        remedy=f"did you mean '{near[0]}'? {_see_help(command)}" if near else _see_help(command),
    )
