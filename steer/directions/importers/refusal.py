"""`direction.pt` and `direction_metadata.json` of refusal_direction (Arditi et al. 2024, arXiv 2406.11717)."""

from __future__ import annotations

from torch import Tensor

from steer.directions.direction import Directions
from steer.directions.importer import IMPORTERS, Importer, Source, gathered, incomplete, integer_of
from steer.reading import read_json
from steer.tensor_files import read_torch

VECTOR, METADATA = "direction.pt", "direction_metadata.json"


@IMPORTERS.register("refusal")
class Refusal(Importer):
    """refusal_direction folder (direction.pt and direction_metadata.json): layer L -> `layers.L.input`, what goes into block L.

    `pos` counts the token from the end, and becomes the span. To ablate as the program does, use the vector at embed and at every
    attn.output and mlp.output.
    """

    looks_for = f"{VECTOR} beside {METADATA}"

    @staticmethod
    def recognises(source: Source) -> bool:
        folder = source.path if source.path.is_dir() else source.path.parent
        return (source.path.is_dir() or source.path.name == VECTOR) and Source(folder).has(VECTOR, METADATA)

    @staticmethod
    def read(source: Source) -> Directions:
        folder = source.path if source.path.is_dir() else source.path.parent
        if not Source(folder).has(VECTOR, METADATA):
            raise incomplete(source, f"{VECTOR} and {METADATA}", "not both")
        metadata, vector = read_json(folder / METADATA), read_torch(folder / VECTOR)
        if not isinstance(vector, Tensor) or not isinstance(metadata, dict) or not {"layer", "pos"} <= metadata.keys():
            raise incomplete(source, "a vector, and its layer and pos", f"{type(vector).__name__} and {metadata}")
        site = source.place(integer_of(source, metadata["layer"], "layer"), "layers.{layer}.input")
        return gathered(source, {site: vector}, method="mean_difference", span=integer_of(source, metadata["pos"], "pos"))
