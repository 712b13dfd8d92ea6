"""The folders of pyvene and pyreft: config.json and one `intkey_<key>.bin` (torch.save) for each intervention."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steer.directions.importer import IMPORTERS, Importer, Source, incomplete, mapping_of
from steer.errors import ConfigError, WrongKindError
from steer.intervene import Intervention, Operator, Plan
from steer.intervene.operators.add import Add
from steer.intervene.operators.loreft import LoReFT
from steer.model.site import Site
from steer.reading import damage_of, read_json
from steer.tensor_files import read_torch

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
        return Plan([_intervention(source, representation) for representation in _representations(source)])


def _representations(source: Source) -> list[Representation]:
    """Raises DamagedFileError when the configuration lacks a part."""
    config = mapping_of(source, read_json(source.path / CONFIG), CONFIG)
    representations = []
    seen = Counter[str]()
    with damage_of(source.path, "representations and intervention_types, one for one", f"'{source.path}' lacks a part"):
        for spec, kind in zip(config["representations"], config["intervention_types"], strict=True):
            fields: dict[str, Any] = spec if isinstance(spec, dict) else dict(zip(_FIELDS, spec, strict=False))
            component = str(fields["component"])
            unit = str(fields["unit"])
            partition = fields.get("subspace_partition")
            where = f"comp_{component.replace('.', '_')}" if "." in component else f"layer_{fields['layer']}_comp_{component}"
            key = f"{where}_unit_{unit.replace('.', '_')}_nunit_{fields['max_number_of_units']}"
            representations.append(
                Representation(
                    layer=int(fields["layer"]),
                    component=component,
                    kind=str(kind).rstrip("'>").split(".")[-1],
                    file=f"intkey_{key}#{seen[key]}.bin",
                    parts=unit if partition is None else f"{unit} in {partition}",
                )
            )
            seen[key] += 1
    return representations


def _intervention(source: Source, representation: Representation) -> Intervention:
    if representation.parts != "pos":
        raise _parts_error(source, representation)
    make = OPERATORS.get(representation.kind)
    if make is None:
        raise _operator_error(source, representation)
    if not source.has(representation.file):
        files = sorted(file.name for file in source.path.glob("*.bin"))
        raise incomplete(source, representation.file, ", ".join(files) or "no .bin file")
    state = mapping_of(source, read_torch(source.path / representation.file), representation.file)
    expected = f"the tensors of a {representation.kind} in {representation.file}"
    with damage_of(source.path, expected, f"'{source.path}' lacks a part"):
        operator = make(dict(state))
        dimensions = int(state.get("interchange_dim", operator.width))
    if dimensions != operator.width:
        raise _dimensions_error(representation, operator.width, dimensions)
    if source.scope is None:
        raise _scope_error(source)
    return Intervention(operator, _site(source, representation), scope=source.scope)


def _site(source: Source, representation: Representation) -> Site:
    component = representation.component
    if match := _BLOCK.fullmatch(component):
        return source.place(int(match[1]), f"layers.{{layer}}.{match[2]}")
    if "." in component and (match := _MODULE.fullmatch(component)):
        path = re.sub(r"\[(\d+)\]", r".\1", match[1])
        return source.place(representation.layer, f"module:{path}:{match[2]}")
    pattern = _COMPONENTS.get(component)
    if pattern is None:
        pattern = source.asked_site(f"component '{component}'", "layers.{layer}.mlp.output")
    return source.place(representation.layer, pattern)


def _parts_error(source: Source, representation: Representation) -> ConfigError:
    return ConfigError(
        f"'{source.path}' acts on parts of a token",
        expected="the unit 'pos', and no subspace partition",
        found=representation.parts,
        remedy="make the operator by hand from the tensors of its .bin file",
    )


def _operator_error(source: Source, representation: Representation) -> WrongKindError:
    return WrongKindError(
        f"'{source.path}' holds a {representation.kind}",
        expected=", ".join(OPERATORS),
        found=representation.kind,
        remedy="train it as an operator of steer, or keep it in pyvene",
    )


def _dimensions_error(representation: Representation, width: int, dimensions: int) -> ConfigError:
    return ConfigError(
        f"'{representation.file}' edits a part of the activation",
        expected=f"all {width} dimensions",
        found=f"the first {dimensions}",
        remedy="make the vector by hand, with zeros in the other dimensions",
    )


def _scope_error(source: Source) -> ConfigError:
    return ConfigError(
        f"'{source.path}' does not say on which tokens it acts",
        expected="scope=",
        found="none",
        remedy="e.g. scope='prompt[:4]|prompt[-4:]' for positions f4+l4 of pyreft",
    )
