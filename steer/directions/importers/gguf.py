"""GGUF control vectors of repeng, llama.cpp and `steer.to_gguf`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.directions.direction import Directions
from steer.directions.importer import IMPORTERS, Importer, Source, gathered, incomplete
from steer.errors import WrongKindError
from steer.intervene.deploy.control_vector import ARCHITECTURE, gguf_package

_NAME = re.compile(r"direction\.(\d+)")


@IMPORTERS.register("gguf")
class Gguf(Importer):
    """GGUF control vector (repeng, llama.cpp): `direction.N` -> `layers.N.output`, where both programs add it.

    N is the block, counted from 0, whose output gets the vector. Where it was read is not in the file, and the writers differ: repeng reads
    `hidden_states[N + 1]`, the generator of llama.cpp the output of block N - 1.
    """

    looks_for = "a GGUF file of the architecture 'controlvector'"

    @staticmethod
    def recognises(source: Source) -> bool:
        return source.head[:4] == b"GGUF"

    @staticmethod
    def read(source: Source) -> Directions:
        reader = _reader(source)
        architecture, hint = (_text(reader, key) for key in ("general.architecture", f"{ARCHITECTURE}.model_hint"))
        if architecture != ARCHITECTURE:
            raise _architecture_error(source, architecture)
        by_layer: dict[int, Tensor] = {}
        for tensor in reader.tensors:
            if match := _NAME.fullmatch(tensor.name):
                if tensor.data.dtype.kind != "f":
                    raise incomplete(source, f"{tensor.name} in floating point", tensor.tensor_type.name)
                by_layer[int(match[1])] = torch.from_numpy(tensor.data.copy()).flatten()
        if not by_layer:
            raise incomplete(source, "tensors direction.<n>", [tensor.name for tensor in reader.tensors] or "no tensors")
        vectors = {source.place(layer, "layers.{layer}.output"): vector for layer, vector in sorted(by_layer.items())}
        return gathered(source, vectors, method="gguf control vector", model_hint=hint)


def _reader(source: Source) -> Any:
    package = gguf_package(f"cannot read {source.path}")
    try:
        return package.GGUFReader(Path(source.path))
    except (ValueError, IndexError, KeyError, OSError) as error:  # depends on where the damage is
        raise incomplete(source, "a whole GGUF file", f"{type(error).__name__}: {error}") from error


def _text(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None or not len(field.parts) else bytes(field.parts[-1]).decode("utf-8", "replace")


def _architecture_error(source: Source, architecture: str | None) -> WrongKindError:
    return WrongKindError(
        f"'{source.path}' is no control vector",
        expected=f"the architecture '{ARCHITECTURE}'",
        found=f"'{architecture}'",
        remedy="a model in GGUF is loaded with steer.load",
    )
