"""The `.pt` files of hidden-directions: vectors of all blocks, and the biases that it bakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steer.directions.direction import Directions
from steer.directions.hidden_states import after_block
from steer.directions.importer import IMPORTERS, Importer, Source, gathered, integer_of, matrix_of
from steer.errors import WidthError


@IMPORTERS.register("hidden-directions")
class HiddenDirections(Importer):
    """hidden-directions, [layers, width] (torch.save): row L -> `layers.L.output`, the last -> `final_norm`; a baked bias -> `mlp.output`.

    Row L is read off `hidden_states[L + 1]`, of which the last entry comes after the final norm; the program steers with all of them at the
    outputs of blocks. `advocate_bias.pt` is a bias of the down projection of one block, which adds it at `layers.L.mlp.output`.
    """

    looks_for = "a torch file with one matrix of n_layers rows, or with 'bias', 'layer' and 'base_model'"

    @staticmethod
    def recognises(source: Source) -> bool:
        content = source.content if source.is_torch else None
        if isinstance(content, Mapping):
            return {"bias", "layer", "base_model"} <= content.keys()
        return isinstance(content, Tensor) and content.ndim == 2 and source.n_layers in (None, len(content))

    @staticmethod
    def read(source: Source) -> Directions:
        if isinstance(source.content, Mapping):
            baked: Mapping[str, Any] = source.content
            site = source.place(integer_of(source, baked["layer"], "layer"), "layers.{layer}.mlp.output")
            return gathered(source, {site: baked["bias"]}, method="baked bias", base_model=str(baked["base_model"]))
        rows = matrix_of(source)
        source.n_layers = len(rows) if source.n_layers is None else source.n_layers
        if len(rows) != source.n_layers:
            raise _rows_error(source, len(rows))
        return gathered(source, {after_block(source, layer): row for layer, row in enumerate(rows)}, method="hidden-directions")


def _rows_error(source: Source, rows: int) -> WidthError:
    return WidthError(
        f"'{source.path.name}' has a row for other layers than the model's",
        expected=f"{source.n_layers} rows, one for each block",
        found=rows,
        remedy="check n_layers; with one row more the format is 'persona'",
    )
