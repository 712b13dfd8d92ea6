"""Our own format: `manifest.json` and `tensors.safetensors`, sealed, in float32, bfloat16 or int8 per row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer import files
from steer.checks import one_of
from steer.errors import DamagedFileError, SteerError
from steer.features.dictionary import ARCHITECTURES, Dictionary, check_sites, probe
from steer.features.format import FORMATS, Format, Wanted
from steer.features.provenance import Origin
from steer.features.rows import InMemory, Int8, LowRank, Rows, as_int8
from steer.features.wanted import overruled
from steer.place import Place
from steer.reading import check_kinds, damage_of, parse_json
from steer.tensor_files import open_safetensors

KIND = "dictionary"
_STATISTICS = ("maxima", "density")  # [width] each, of dictionaries that record them
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_KEYS = {"architecture": str, "settings": dict, "origin": dict, "stored": dict}


@FORMATS.register("steer")
class Own(Format):
    """`manifest.json`, `tensors.safetensors`, or one file of both: what `Dictionary.save` writes, every architecture, sealed by hashes."""

    looks_for = "manifest.json of the kind 'dictionary', or a safetensors file with it"
    writes = True

    @staticmethod
    def recognises(place: Place) -> bool:
        try:
            if place.file is not None:
                return place.file.endswith(".safetensors") and _manifest_of_file(place).get("kind") == KIND
            return place.has(files.MANIFEST) and place.json(files.MANIFEST).get("kind") == KIND
        except SteerError:
            return False

    @staticmethod
    def read(place: Place, wanted: Wanted) -> Dictionary:
        if place.file is not None:
            path = place.path(place.file)
        else:
            place.path(files.TENSORS)
            path = place.path(files.MANIFEST).parent
        return load(path, wanted)

    @staticmethod
    def write(dictionary: Dictionary, path: str | Path, dtype: str) -> Path:
        return save(dictionary, path, dtype)


def check_dtype(dtype: str) -> None:
    """Raises ConfigError unless dictionaries are written in it."""
    one_of(dtype, list(_TYPES), "the dtype of a saved dictionary")


def save(dictionary: Dictionary, path: str | Path, dtype: str) -> Path:
    """Writes a dictionary; biases and thresholds stay in float32. Raises ConfigError for an unknown dtype, and as `save_artifact`."""
    check_dtype(dtype)
    architecture = ARCHITECTURES.name_of(dictionary)
    tensors: dict[str, Tensor] = {}
    stored: dict[str, str] = {}
    for name, part in {**dictionary.parts(), **{name: getattr(dictionary, name) for name in _STATISTICS}}.items():
        if part is not None:
            stored[name], parts = _stored(part, dtype)
            tensors.update({f"{name}{ending}": tensor for ending, tensor in parts.items()})
    manifest = {
        "architecture": architecture,
        "settings": dictionary.settings(),
        "origin": dictionary.origin.described(),
        "stored": stored,
    }
    return files.save_artifact(path, KIND, tensors, manifest)


def load(path: str | Path, wanted: Wanted) -> Dictionary:
    """Reads what `save` wrote; what the caller says goes before what the file says.

    Raises:
        DamagedFileError, UnsafeFileError, WrongKindError, NonFiniteError; SiteError, ConfigError for sites that it cannot be of.
    """
    manifest, tensors = files.load_artifact(path, KIND)
    with damage_of(path, f"a dictionary with {', '.join(_KEYS)}"):
        check_kinds(manifest, _KEYS)
        parts: dict[str, Any] = {name: _restored(how, name, tensors) for name, how in manifest["stored"].items()}
        statistics = {name: parts.pop(name, None) for name in _STATISTICS}
        architecture = ARCHITECTURES.get(manifest["architecture"])
        origin = Origin.from_described(manifest["origin"])
        dictionary = architecture.restore(parts, manifest["settings"], origin)
        for name, values in statistics.items():
            setattr(dictionary, name, values)
    wanted_origin = overruled(origin, wanted)
    check_sites(dictionary.name, len(dictionary.reads), len(dictionary.writes), wanted_origin)
    dictionary.origin = wanted_origin
    return dictionary


def _stored(part: Rows | Tensor, dtype: str) -> tuple[str, dict[str, Tensor]]:
    """How a part is stored, and its tensors by the end of their names."""
    if isinstance(part, Tensor):
        return "tensor", {"": part.float()}
    if isinstance(part, LowRank):
        return "low_rank", {".left": _typed(part.left.all(probe()), dtype), ".right": _typed(part.right, dtype)}
    rows = part.all(probe())
    if dtype != "int8":
        return "rows", {"": rows.to(_TYPES[dtype])}
    numbers, scale = as_int8(rows.detach())
    return "int8", {".numbers": numbers, ".scale": scale}


def _typed(tensor: Tensor, dtype: str) -> Tensor:
    """Factors of a product are small, and stay in bfloat16 where the rest is int8."""
    return tensor.to(torch.bfloat16 if dtype == "int8" else _TYPES[dtype])


def _restored(how: str, name: str, tensors: dict[str, Tensor]) -> Rows | Tensor:
    if how == "tensor":
        return tensors[name]
    if how == "rows":
        return InMemory(tensors[name], name)
    if how == "int8":
        return Int8(tensors[f"{name}.numbers"], tensors[f"{name}.scale"])
    if how == "low_rank":
        return LowRank(InMemory(tensors[f"{name}.left"], name), tensors[f"{name}.right"])
    raise _unknown_storage(name, how)


def _manifest_of_file(place: Place) -> dict[str, Any]:
    assert place.file is not None
    with open_safetensors(place.path(place.file)) as file:
        text = (file.metadata() or {}).get(files.METADATA_KEY)
    manifest = {} if text is None else parse_json(text, f"the manifest of '{place.name}'")
    return manifest if isinstance(manifest, dict) else {}


def _unknown_storage(name: str, how: str) -> DamagedFileError:
    return DamagedFileError(f"the part '{name}' of a dictionary is stored in an unknown way", expected="tensor, rows, int8 or low_rank",
                            found=how, remedy="upgrade torchsteer, or save the dictionary again")  # fmt: skip
