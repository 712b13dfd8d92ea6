"""The `<trait>_<part>_diff.pt` files of persona vectors (Chen et al. 2025, arXiv 2507.21509)."""

from __future__ import annotations

import re

from torch import Tensor

from steer.directions.direction import Directions
from steer.directions.hidden_states import after_block
from steer.directions.importer import IMPORTERS, Importer, Source, gathered, matrix_of
from steer.errors import WidthError
from steer.model.site import Site

_PART = re.compile(r"(prompt_avg|prompt_last|response_avg)_diff$")
_SPANS = {"prompt_avg": "prompt", "prompt_last": "prompt_last", "response_avg": "response"}


@IMPORTERS.register("persona")
class Persona(Importer):
    """Persona vectors, [layers + 1, width] (torch.save): row 0 -> `embed`, row L -> `layers.{L-1}.output`, the last -> `final_norm`.

    Row L is the mean difference of `hidden_states[L]`. The program steers with row L at the output of block L - 1, with the last one too,
    although that was read after the final norm.
    """

    looks_for = "a torch file with one matrix of n_layers + 1 rows"

    @staticmethod
    def recognises(source: Source) -> bool:
        matrix = source.content if source.is_torch else None
        return isinstance(matrix, Tensor) and matrix.ndim == 2 and source.n_layers in (None, len(matrix) - 1)

    @staticmethod
    def read(source: Source) -> Directions:
        rows = matrix_of(source)
        source.n_layers = len(rows) - 1 if source.n_layers is None else source.n_layers
        if len(rows) != source.n_layers + 1:
            raise _rows_error(source, source.n_layers, len(rows))
        sites = [Site("embed"), *(after_block(source, layer) for layer in range(len(rows) - 1))]
        part = _PART.search(source.path.stem)
        span = _SPANS[part[1]] if part else "unknown"
        return gathered(source, dict(zip(sites, rows, strict=True)), method="mean_difference", span=span)


def _rows_error(source: Source, n_layers: int, rows: int) -> WidthError:
    return WidthError(
        f"'{source.path.name}' has a row for other layers than the model's",
        expected=f"{n_layers + 1} rows, one for each entry of hidden_states",
        found=rows,
        remedy="check n_layers; with one row for each block the format is 'hidden-directions'",
    )
