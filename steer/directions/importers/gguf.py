"""GGUF control vectors of repeng, llama.cpp and `steer.to_gguf`."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from steer.directions.direction import Directions
from steer.directions.importer import IMPORTERS, Importer, Source, gathered, incomplete
from steer.errors import WrongKindError
from steer.intervene.deploy.control_vector import ARCHITECTURE
from steer.tensor_files import gguf_tensor, open_gguf

_NAME = re.compile(r"direction\.(\d+)")


@IMPORTERS.register("gguf")
class Gguf(Importer):
    """GGUF control vector (repeng, llama.cpp): `direction.N` -> `layers.N.output`, where both programs add it.

    Every type of number that the package gguf unpacks is read, bfloat16 and the quantised ones too. N is the block, counted from 0, whose
    output gets the vector. Where it was read is not in the file, and the writers differ: repeng reads `hidden_states[N + 1]`, the generator
    of llama.cpp the output of block N - 1.
    """

    looks_for = "a GGUF file of the architecture 'controlvector'"

    @staticmethod
    def recognises(source: Source) -> bool:
        return source.form == "gguf"

    @staticmethod
    def read(source: Source) -> Directions:
        reader = open_gguf(source.path)
        architecture, hint = (_text(reader, key) for key in ("general.architecture", f"{ARCHITECTURE}.model_hint"))
        if architecture != ARCHITECTURE:
            raise _architecture_error(source, architecture)
        by_layer: dict[int, Tensor] = {}
        for tensor in reader.tensors:
            if match := _NAME.fullmatch(tensor.name):
                if re.fullmatch(r"I\d+", tensor.tensor_type.name):
                    raise incomplete(source, f"{tensor.name} in floating point", tensor.tensor_type.name)
                layer = int(match[1])
                if layer in by_layer:
                    raise incomplete(source, "one direction for each layer", f"two for layer {layer}")
                by_layer[layer] = gguf_tensor(tensor, source.path)
        if not by_layer:
            raise incomplete(source, "tensors direction.<n>", [tensor.name for tensor in reader.tensors] or "no tensors")
        vectors = {source.place(layer, "layers.{layer}.output"): vector for layer, vector in sorted(by_layer.items())}
        return gathered(source, vectors, method="gguf control vector", model_hint=hint)


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
