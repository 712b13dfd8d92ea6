"""Steering from a configuration: a plan's text, and where its directions and gates come from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from steer.directions.direction import Directions
from steer.directions.foreign import import_directions
from steer.directions.text import direction_at, plan_from_text, plan_to_text
from steer.errors import ConfigError, SteerError, did_you_mean
from steer.features.dictionary import Dictionary
from steer.features.load import load_dictionary
from steer.intervene import GATES, Gate, Plan
from steer.intervene.gate import SiteGate
from steer.intervene.source import OperatorSource
from steer.model.site import Site

_IMPORT_OPTIONS = ("path", "site", "n_layers", "format")


def plan_from_config(
    text: str,
    directions: Mapping[str, str | Mapping[str, Any]],
    gates: Mapping[str, Mapping[str, Any]],
    dictionaries: Mapping[str, str | Mapping[str, Any]] | None = None,
) -> tuple[Plan, str]:
    """Reads a plan.

    Args:
        text: see `steer.directions.text`.
        directions: name -> path of saved `Directions`, or the arguments of `import_directions`: `path` of a file of another program, and
            `site`, `n_layers` or `format` as it needs them.
        gates: name -> `gate` (its kind), `direction` (name of the vector that it compares with) and the options of that kind. It reads
            where its direction was read; `site` chooses one of several.
        dictionaries: name -> place of a dictionary of features, or `path` and further arguments of `steer.load_dictionary`.

    Returns:
        The plan, and its text with every site and scope spelt out.

    Raises:
        ConfigError, FileError, WrongModelError.
    """
    sources, named_gates = sources_from_config(directions, gates, dictionaries)
    plan = plan_from_text(text, sources, named_gates)
    return plan, plan_to_text(plan, sources, named_gates)


def sources_from_config(
    directions: Mapping[str, str | Mapping[str, Any]],
    gates: Mapping[str, Mapping[str, Any]],
    dictionaries: Mapping[str, str | Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Directions | OperatorSource], dict[str, Gate]]:
    """Loads what a plan as text may name: directions and dictionaries, and gates. Arguments and errors as of `plan_from_config`."""
    if twice := sorted(directions.keys() & (dictionaries or {}).keys()):
        raise _named_twice(twice[0])
    loaded = {name: _directions(name, source) for name, source in directions.items()}
    named_gates = {name: _gate(name, spec, loaded) for name, spec in gates.items()}
    return {**loaded, **{name: _dictionary(name, source) for name, source in (dictionaries or {}).items()}}, named_gates


def _directions(name: str, source: str | Mapping[str, Any]) -> Directions:
    if not isinstance(source, Mapping):
        return Directions.load(source)
    if "path" not in source:
        raise _no_path(name, source)
    if unknown := sorted(source.keys() - _IMPORT_OPTIONS):
        raise _unknown_import_option(name, unknown[0])
    return import_directions(**source)


def _dictionary(name: str, source: str | Mapping[str, Any]) -> Dictionary:
    if not isinstance(source, Mapping):
        return load_dictionary(source)
    known = [option for option in inspect.signature(load_dictionary).parameters if option not in ("where", "gain", "untrained")]
    options = dict(source)
    if "path" not in options:
        raise _no_dictionary_path(name, source)
    if unknown := sorted(options.keys() - {"path", *known}):
        raise _unknown_dictionary_option(name, unknown[0], known)
    return load_dictionary(options.pop("path"), **options)


def _gate(name: str, spec: Mapping[str, Any], directions: Mapping[str, Directions]) -> Gate:
    """The gate that a section of the configuration describes."""
    if not isinstance(spec, Mapping) or not {"gate", "direction"} <= spec.keys():
        raise _incomplete_gate(name, spec)
    options = dict(spec)
    kind = options.pop("gate")
    kinds = [known for known in GATES if known != "call"]  # which takes a function
    if kind not in kinds:
        raise _unknown_gate(name, kind, kinds)
    direction_name = options.pop("direction")
    if direction_name not in directions:
        raise _unknown_direction(name, direction_name, directions)
    gate_class: Any = GATES.get(kind)
    known_options = _option_names(gate_class)
    if unknown := sorted(set(options) - set(known_options)):
        raise _unknown_option(name, unknown[0], known_options)
    site = options.get("site")
    direction, options["site"] = direction_at(directions[direction_name], None if site is None else Site.parse(site))
    try:
        return gate_class(direction.vector, **options)
    except SteerError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise _impossible_gate(name, error) from error


def _option_names(gate_class: Any) -> list[str]:
    """Arguments of a kind of gate and of all gates, but for the vector and what the base class is given by its kinds."""
    of_its_own = list(inspect.signature(gate_class).parameters)[1:]
    return [name for name in (*of_its_own, *inspect.signature(SiteGate).parameters) if name not in ("options", "tensors", "width")]


# ---- errors


def _example(name: str) -> str:
    return f"e.g. gates.{name}.gate=cosine gates.{name}.direction=harm gates.{name}.threshold=0.1"


def _no_path(name: str, source: Mapping[str, Any]) -> ConfigError:
    expected = f"directions.{name}=<saved directions>, or directions.{name}.path=<file of another program>"
    remedy = f"e.g. directions.{name}.path=vector.npy directions.{name}.site=layers.15.output"
    return ConfigError(f"direction '{name}' has no file", expected=expected, found=", ".join(source) or "nothing", remedy=remedy)


def _unknown_import_option(name: str, option: str) -> ConfigError:
    remedy = did_you_mean(option, _IMPORT_OPTIONS) or f"leave directions.{name}.{option} out"
    expected = ", ".join(_IMPORT_OPTIONS)
    return ConfigError(f"direction '{name}' has no option '{option}'", expected=expected, found=option, remedy=remedy)


def _named_twice(name: str) -> ConfigError:
    remedy = f"rename dictionaries.{name}"
    return ConfigError(f"'{name}' is both a direction and a dictionary", expected="one of them", found="both", remedy=remedy)


def _no_dictionary_path(name: str, source: Mapping[str, Any]) -> ConfigError:
    remedy = f"e.g. dictionaries.{name}=smollm2-135m-sae-12, or dictionaries.{name}.path=<folder or repository> and its options"
    return ConfigError(f"dictionary '{name}' has no place", expected="path", found=", ".join(source) or "nothing", remedy=remedy)


def _unknown_dictionary_option(name: str, option: str, known: list[str]) -> ConfigError:
    remedy = did_you_mean(option, known) or f"leave dictionaries.{name}.{option} out"
    return ConfigError(f"dictionary '{name}' has no option '{option}'", expected=", ".join(known), found=option, remedy=remedy)


def _incomplete_gate(name: str, spec: Any) -> ConfigError:
    expected = f"gates.{name}.gate=<kind> and gates.{name}.direction=<name>"
    found = ", ".join(spec) if isinstance(spec, Mapping) else spec
    return ConfigError(f"gate '{name}' is incomplete", expected=expected, found=found, remedy=_example(name))


def _unknown_gate(name: str, kind: Any, kinds: list[str]) -> ConfigError:
    remedy = did_you_mean(str(kind), kinds) or "choose one of these; a gate of your own is made in Python"
    return ConfigError(f"gate '{name}': unknown gate '{kind}'", expected=f"one of {', '.join(kinds)}", found=kind, remedy=remedy)


def _unknown_direction(name: str, wanted: Any, directions: Mapping[str, Directions]) -> ConfigError:
    expected = f"one of {', '.join(directions)}" if directions else "a direction, but none was given"
    remedy = did_you_mean(str(wanted), directions) or f"give its file with directions.{wanted}=<path>"
    return ConfigError(f"gate '{name}': no direction is called '{wanted}'", expected=expected, found=wanted, remedy=remedy)


def _unknown_option(name: str, option: str, known: list[str]) -> ConfigError:
    remedy = did_you_mean(option, known) or f"leave gates.{name}.{option} out"
    return ConfigError(f"gate '{name}' has no option '{option}'", expected=", ".join(known), found=option, remedy=remedy)


def _impossible_gate(name: str, error: Exception) -> ConfigError:
    expected = "a kind that compares with a vector, and values that it can take"
    return ConfigError(f"gate '{name}' cannot be made", expected=expected, found=error, remedy=_example(name))
