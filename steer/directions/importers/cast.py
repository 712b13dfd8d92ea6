"""The `.svec` files of conditional activation steering, CAST (IBM/activation-steering): JSON."""

from __future__ import annotations

from collections.abc import Mapping

from steer.directions.direction import Directions
from steer.directions.hidden_states import after_block
from steer.directions.importer import IMPORTERS, Importer, Source, by_layer, gathered, incomplete


@IMPORTERS.register("cast")
class Cast(Importer):
    """CAST `.svec` (JSON): direction L -> `layers.L.output`, read off `hidden_states[L + 1]`; the last one -> `final_norm`.

    CAST itself adds direction L one block earlier, to what goes *into* block L. Steer at `layers.L.input` to do as it does. The last
    entry of `hidden_states` comes after the final norm, so the number of blocks has to be known.
    """

    looks_for = "JSON with 'model_type', 'directions' and 'explained_variances'"

    @staticmethod
    def recognises(source: Source) -> bool:
        content = source.content if source.form == "json" else None
        return isinstance(content, Mapping) and {"model_type", "directions", "explained_variances"} <= content.keys()

    @staticmethod
    def read(source: Source) -> Directions:
        vectors = {after_block(source, layer): vector for layer, vector in by_layer(source, "directions").items()}
        try:
            variances = {str(layer): float(share) for layer, share in by_layer(source, "explained_variances").items()}
        except (TypeError, ValueError, OverflowError) as error:
            raise incomplete(source, "a number for each layer in explained_variances", str(error)) from error
        return gathered(source, vectors, method="cast pca", model_type=str(source.content["model_type"]), explained_variances=variances)
