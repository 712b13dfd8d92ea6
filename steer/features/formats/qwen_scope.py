"""Qwen-Scope (2026, arXiv 2605.11887): `layer<n>.sae.pt`, top-k dictionaries of the residual stream after every block."""

from __future__ import annotations

import re

from steer.errors import ConfigError
from steer.features.activations.topk import TopK
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.dictionary import Dictionary
from steer.features.encoder import Encoder
from steer.features.format import FORMATS, Format, Tensors, Wanted, incomplete, k_in, needs, origin_of
from steer.place import Place
from steer.tensor_files import read_torch

_FILE = r"layer(\d+)\.sae\.pt"


@FORMATS.register("qwen_scope")
class QwenScope(Format):
    """`layer<n>.sae.pt` (`layer=`): top-k, nothing subtracted; k from config.json or the name of the repository, `...-L0_50`."""

    looks_for = "files layer<n>.sae.pt"

    @staticmethod
    def recognises(place: Place) -> bool:
        return bool(place.matching(_FILE))

    @staticmethod
    def read(place: Place, wanted: Wanted) -> Dictionary:
        files = {int(match[1]): match[0] for match in place.matching(_FILE)}
        layer = next(iter(files)) if wanted.layer is None and len(files) == 1 else wanted.layer
        if layer not in files:
            found = f"layer {layer}" if layer is not None else f"files for the layers {', '.join(map(str, sorted(files)))}"
            raise needs(place, "layer", found, str(min(files)))
        config = place.json_or_nothing("config.json")
        path = place.path(files[layer])
        tensors = Tensors.in_memory(place, read_torch(path), path)
        encoder_rows = tensors.rows("W_enc", None, None)
        width, d_in = encoder_rows.shape
        decoder = tensors.rows("W_dec", d_in, width, axis=1)
        encoder = Encoder(encoder_rows, tensors.get("b_enc", width), TopK(_k(place, wanted, config, width)))
        decoder_bias = tensors.get("b_dec", d_in)
        tensors.check_all_taken()
        model = config.get("base_model") or (match[1] if (match := re.search(r"SAE-Res-(.+?)-W\d+K", place.name)) else None)
        origin = origin_of("qwen_scope", place, wanted, reads=f"layers.{layer}.output", paths=[path], model=model)
        return SparseAutoencoder(encoder, decoder, decoder_bias, origin)


def _k(place: Place, wanted: Wanted, config: dict[str, object], width: int) -> int:
    """Features per token, as the caller, the configuration or the name says, which also says how many features there are."""
    if "d_sae" in config and config["d_sae"] != width:
        raise incomplete(place, f"{config['d_sae']} features, as config.json says", width)
    if wanted.k is not None:
        if wanted.k > width:
            raise _too_many(place, wanted.k, width)
        return wanted.k
    if "k" in config:
        return k_in(place, config, width)
    match = re.search(r"-W(\d+)K-L0_(\d+)", place.name)
    if match is None:
        raise needs(place, "k", "a top-k dictionary whose k is in the name of its repository alone", "50")
    if int(match[1]) * 1024 != width:
        raise incomplete(place, f"{int(match[1]) * 1024} features, as the name says", width)
    return k_in(place, {"k": int(match[2])}, width)


# ---- errors


def _too_many(place: Place, k: int, width: int) -> ConfigError:
    what = f"`k` is more than '{place.name}' has features"
    return ConfigError(what, expected=f"1 to {width}", found=k, remedy="pass the k that it was trained with, which its model card says")
