"""Files that hold vectors and nothing else: one vector, or one for each layer. The caller says where they belong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steer.directions.direction import Directions
from steer.directions.importer import IMPORTERS, Importer, Source, gathered, incomplete
from steer.errors import ConfigError
from steer.model.site import Site

_FORMS = ("torch", "npy", "npz", "safetensors")
_NUMBER = re.compile(r"(?:(?<![A-Za-z])-)?\d+")  # the hyphen of "layer-3" is no sign


@IMPORTERS.register("bare")
class Bare(Importer):
    """Nothing but vectors (`.pt`, `.npy`, `.npz`, safetensors): one, or {layer: vector} -> `site=`, which has to be given.

    One vector goes to the site as it is written, e.g. `layers.15.output`. Of several, the layer is the number in the key (15, "15",
    "layer_15"), and takes the place of `{layer}`.
    """

    looks_for = "with site=, one vector (.pt, .npy, safetensors) or one for each layer ({layer: vector} in .pt, .npz, safetensors)"
    is_last = True

    @staticmethod
    def recognises(source: Source) -> bool:
        if source.form not in _FORMS:
            return False
        content = source.content
        if isinstance(content, Mapping):
            return bool(content) and all(map(_is_vector, content.values()))
        return _is_vector(content)

    @staticmethod
    def read(source: Source) -> Directions:
        vectors: Mapping[Any, Tensor] = source.content if isinstance(source.content, Mapping) else {None: source.content}
        pattern = source.asked_site(*_asked(vectors))
        if len(vectors) == 1 and pattern.format(layer=0) == pattern:
            return gathered(source, {Site.parse(pattern): next(iter(vectors.values())).flatten()}, method="imported")
        placed: dict[Site, Tensor] = {}
        for key, vector in vectors.items():
            site = source.place(_layer(source, key), pattern)
            if site in placed:
                raise incomplete(source, "one vector for each layer", f"two for '{site}'")
            placed[site] = vector.flatten()
        return gathered(source, placed, method="imported")


def _asked(vectors: Mapping[Any, Tensor]) -> tuple[str, str]:
    """What is found where no site is given, and the site to give."""
    if list(vectors) == [None]:
        return "one vector, and nothing else", "layers.15.output"
    keys = ", ".join(map(repr, list(vectors)[:3])) + ", ..." * (len(vectors) > 3)
    why = f"vectors under {keys}: a number may be a block, or an entry of `hidden_states`, which comes one block earlier"
    return why, "layers.{layer}.output' for outputs of blocks of these numbers; of hidden_states, site='layers.{layer}.input"


def _is_vector(value: Any) -> bool:
    """[width], or [1, width] and likewise, of floating point."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0 and value.numel() == value.shape[-1] > 0


def _layer(source: Source, key: Any) -> int:
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    numbers = _NUMBER.findall(key) if isinstance(key, str) else []
    if len(numbers) != 1:
        raise _no_layer(source, key)
    return int(numbers[0])


# ---- errors


def _no_layer(source: Source, key: Any) -> ConfigError:
    return ConfigError(
        f"'{source.path.name}' does not say to which layer a vector belongs",
        expected="a key with one number in it, e.g. 15 or 'layer_15', or one vector and a site without {layer}",
        found="one vector without a key" if key is None else f"the key {key!r}",
        remedy="write the layer into site=, e.g. site='layers.15.output', or save {layer: vector}",
    )
