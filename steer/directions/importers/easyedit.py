"""The folders of EasyEdit (`steer/`): one `layer_<n>.pt` for each layer."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from steer.directions.direction import Directions
from steer.directions.importer import IMPORTERS, Importer, Source, gathered, incomplete
from steer.errors import ConfigError, WidthError
from steer.tensor_files import read_torch

_FILE = re.compile(r"layer_(\d+)(_.+)?\.pt")


@IMPORTERS.register("easyedit")
class EasyEdit(Importer):
    """EasyEdit folder of `layer_<L>.pt` (or one such file): L -> `layers.L.output`, which its block wrapper reads and steers."""

    looks_for = "files layer_<n>.pt"

    @staticmethod
    def recognises(source: Source) -> bool:
        folder = source.path.is_dir() and any(_FILE.fullmatch(file.name) for file in source.path.iterdir())
        return folder or source.is_torch and _FILE.fullmatch(source.path.name) is not None

    @staticmethod
    def read(source: Source) -> Directions:
        entries = sorted(source.path.iterdir()) if source.path.is_dir() else [source.path]
        files = [(int(match[1]), file) for file in entries if (match := _FILE.fullmatch(file.name))]
        if not files:
            raise incomplete(source, "files layer_<n>.pt", "none")
        layers = [layer for layer, _ in files]
        if twice := sorted({layer for layer in layers if layers.count(layer) > 1}):
            raise _several_error(source, [file.name for layer, file in files if layer == twice[0]])
        vectors = {}
        for layer, file in sorted(files):
            vector = read_torch(file)
            if not isinstance(vector, Tensor):
                kind = type(vector).__name__
                raise incomplete(source, "a vector", f"a {kind} in {file.name}: the weights of another intervention method")
            if vector.ndim != 1:
                raise _concepts_error(file, vector)
            vectors[source.place(layer, "layers.{layer}.output")] = vector
        return gathered(source, vectors, method="easyedit")


def _several_error(source: Source, names: list[str]) -> ConfigError:
    return ConfigError(
        f"'{source.path}' has several vectors for one layer",
        expected="one file for each layer",
        found=", ".join(names),
        remedy="import the file that you mean",
    )


def _concepts_error(file: Path, vector: Tensor) -> WidthError:
    return WidthError(
        f"'{file.name}' holds several concepts",
        expected="the shape [width]",
        found=list(vector.shape),
        remedy="save the one you mean: torch.save(torch.load(path)[concept], path)",
    )
