"""The folders of pyvene and pyreft: config.json and one `intkey_<key>.bin` (torch.save) for each intervention."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steer.directions.importer import IMPORTERS, Importer, Source, incomplete, read_json, read_torch
from steer.errors import ConfigError, WrongKindError
from steer.intervene import Intervention, Operator, Plan
from steer.intervene.operators.add import Add
from steer.intervene.operators.loreft import LoReFT
from steer.model.site import Site

CONFIG = "config.json"
# component of pyvene -> site, where both mean the same tensor in every family
_COMPONENTS = {
    "block_input": "layers.{layer}.input",
    "block_output": "layers.{layer}.output",
    "mlp_input": "layers.{layer}.mlp.input",
    "attention_value_output": "layers.{layer}.attn.z",
    "query_output": "layers.{layer}.attn.q",
    "key_output": "layers.{layer}.attn.k",
    "value_output": "layers.{layer}.attn.v",
}
_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h)\[(\d+)\]\.(input|output)")
_MODULE = re.compile(r"(.+)\.(input|output)")
# fields of a RepresentationConfig, by position
_FIELDS = ("layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "type", "intervention", "subspace_partition")


def _loreft(state: dict[str, Tensor]) -> Operator:
    return LoReFT(state["rotate_layer"].mT.float(), state["weight"].float(), state["bias"].float())


OPERATORS: dict[str, Callable[[dict[str, Tensor]], Operator]] = {
    "AdditionIntervention": lambda state: Add(state["source_representation"]),
    "SubtractionIntervention": lambda state: Add(-state["source_representation"]),
    "LoreftIntervention": _loreft,
}


@dataclass
class Representation:
    """One intervention of a folder: where it is, its class, its file, and which parts of a token it is for."""

    layer: int
    component: str
    kind: str
    file: str
    parts: str


@IMPORTERS.register("pyvene")
class Pyvene(Importer):
    """pyvene or pyreft folder (config.json and intkey_*.bin) -> a plan: `block_output` of layer L -> `layers.L.output`, and likewise.

    LoReFT, addition and subtraction of a constant are read; the files of the others do not hold what an operator needs. `mlp_output` and
    `attention_output` are what the modules put out, which in some families a norm follows, and need `site=`; a component that is a path,
    such as `model.layers[3].mlp.output`, becomes a `module:` site. The files do not say on which tokens they act, nor whether LoReFT had
    an activation function other than the default, none.
    """

    looks_for = "a folder with config.json and intkey_*.bin"
    makes = "plan"

    @staticmethod
    def recognises(source: Source) -> bool:
        return source.has(CONFIG) and any(source.path.glob("intkey_*.bin"))

    @staticmethod
    def read(source: Source) -> Plan:
        if not source.has(CONFIG):
            raise incomplete(source, CONFIG, "no such file")
        ones = [_intervention(source, one) for one in _representations(source)]
        return Plan(ones)


def _representations(source: Source) -> list[Representation]:
    """Raises DamagedFileError when the configuration lacks a part."""
    config, made, seen = read_json(source.path / CONFIG), [], Counter[str]()
    try:
        for spec, kind in zip(config["representations"], config["intervention_types"], strict=True):
            one: dict[str, Any] = spec if isinstance(spec, dict) else dict(zip(_FIELDS, spec, strict=False))
            component, unit, partition = str(one["component"]), str(one["unit"]), one.get("subspace_partition")
            where = f"comp_{component.replace('.', '_')}" if "." in component else f"layer_{one['layer']}_comp_{component}"
            key = f"{where}_unit_{unit.replace('.', '_')}_nunit_{one['max_number_of_units']}"
            file, name = f"intkey_{key}#{seen[key]}.bin", str(kind).rstrip("'>").split(".")[-1]
            made.append(Representation(int(one["layer"]), component, name, file, unit if partition is None else f"{unit} in {partition}"))
            seen[key] += 1
    except (KeyError, TypeError, ValueError) as error:
        raise incomplete(source, "representations and intervention_types, one for one", repr(error)) from error
    return made


def _intervention(source: Source, one: Representation) -> Intervention:
    if one.parts != "pos":
        raise ConfigError(
            f"'{source.path}' acts on parts of a token",
            expected="the unit 'pos', and no subspace partition",
            found=one.parts,
            remedy="make the operator by hand from the tensors of its .bin file",
        )
    make = OPERATORS.get(one.kind)
    if make is None:
        raise WrongKindError(
            f"'{source.path}' holds a {one.kind}",
            expected=", ".join(OPERATORS),
            found=one.kind,
            remedy="train it as an operator of steer, or keep it in pyvene",
        )
    if not source.has(one.file):
        raise incomplete(source, one.file, ", ".join(sorted(file.name for file in source.path.glob("*.bin"))) or "no .bin file")
    state = read_torch(source.path / one.file)
    try:
        operator = make(state)
    except (KeyError, AttributeError) as error:
        raise incomplete(source, f"the tensors of a {one.kind} in {one.file}", sorted(state)) from error
    if int(state.get("interchange_dim", operator.width)) != operator.width:
        raise ConfigError(
            f"'{one.file}' edits a part of the activation",
            expected=f"all {operator.width} dimensions",
            found=f"the first {int(state['interchange_dim'])}",
            remedy="make the vector by hand, with zeros in the other dimensions",
        )
    if source.scope is None:
        raise ConfigError(
            f"'{source.path}' does not say on which tokens it acts",
            expected="scope=",
            found="none",
            remedy="e.g. scope='prompt[:4]|prompt[-4:]' for positions f4+l4 of pyreft",
        )
    return Intervention(operator, _site(source, one), scope=source.scope)


def _site(source: Source, one: Representation) -> Site:
    if match := _BLOCK.fullmatch(one.component):
        return source.place(int(match[1]), f"layers.{{layer}}.{match[2]}")
    if "." in one.component and (match := _MODULE.fullmatch(one.component)):
        path = re.sub(r"\[(\d+)\]", r".\1", match[1])
        return source.place(one.layer, f"module:{path}:{match[2]}")
    pattern = _COMPONENTS.get(one.component)
    if pattern is None:
        pattern = source.asked_site(f"component '{one.component}'", "layers.{layer}.mlp.output")
    return source.place(one.layer, pattern)
