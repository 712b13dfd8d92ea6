"""The dataclass `SteeringVector` of the package steering-vectors, saved as its attributes.

The package has no file format; users pickle the object, which is refused here. `torch.save(vars(vector), path)` keeps everything in it.
"""

from __future__ import annotations

from collections.abc import Mapping

from steer.directions.direction import Directions
from steer.directions.importer import IMPORTERS, Importer, Source, by_layer, gathered

_OTHERS = "'layers.{layer}.attn.output' or 'layers.{layer}.mlp.output' in a family without norms after attention and MLP"


@IMPORTERS.register("steering-vectors")
class SteeringVectors(Importer):
    """Attributes of a SteeringVector (torch.save): decoder block L -> `layers.L.output`; other layer types need `site=`.

    The package hooks the module that its regular expression finds. For `decoder_block` that is the block. What `self_attn`, `mlp` and the
    two norms put out is a site of its own in some families (gemma2, olmo2: before the norms that follow), and the file does not name the
    family.
    """

    looks_for = "a torch file with 'layer_activations' and 'layer_type'"

    @staticmethod
    def recognises(source: Source) -> bool:
        return source.is_torch and isinstance(source.content, Mapping) and {"layer_activations", "layer_type"} <= source.content.keys()

    @staticmethod
    def read(source: Source) -> Directions:
        kind = source.content["layer_type"]
        pattern = "layers.{layer}.output"
        if str(kind) != "decoder_block":
            why = f"layer_type '{kind}', which in some families is the tensor before a norm; elsewhere {_OTHERS}"
            pattern = source.asked_site(why, "module:layers.{layer}.self_attn:output")
        vectors = {source.place(layer, pattern): vector for layer, vector in by_layer(source, "layer_activations").items()}
        return gathered(source, vectors, method="steering-vectors", layer_type=str(kind))
