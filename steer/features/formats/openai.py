"""The files of OpenAI's sparse_autoencoder (Gao et al. 2024, arXiv 2406.04093): a `.pt` for each layer of GPT-2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from steer.errors import SteerError
from steer.features.activation import Activation
from steer.features.activations.relu import ReLU
from steer.features.activations.topk import TopK
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.dictionary import Dictionary
from steer.features.encoder import Encoder
from steer.features.format import FORMATS, Format, Tensors, Wanted, k_in, origin_of, unsupported
from steer.place import Place
from steer.tensor_files import read_torch

# where a file lies below the name of the model: <location>[_<version>]/autoencoders/<layer>.pt
_LOCATIONS = {"resid_post_mlp": "output", "resid_delta_mlp": "mlp.output", "resid_delta_attn": "attn.output", "mlp_post_act": "mlp.neurons"}


@FORMATS.register("openai")
class OpenAI(Format):
    """`<layer>.pt`: ReLU or top-k with `pre_bias` subtracted; top-k files take each token normalised, and give its norm back."""

    looks_for = "a .pt file with 'pre_bias', 'latent_bias' and 'encoder.weight'"

    @staticmethod
    def recognises(place: Place) -> bool:
        names = [match[0] for match in place.matching(r"[^/]+\.pt")]
        if len(names) != 1 or re.fullmatch(r"ae\.pt|layer\d+\.sae\.pt", names[0]):
            return False
        try:
            content = read_torch(place.path(names[0]))
        except SteerError:
            return place.files == names or place.file == names[0]  # nothing else could be meant, and `read` says what is wrong with it
        known = {"pre_bias", "latent_bias", "encoder.weight"}
        return isinstance(content, Mapping) and len(known & content.keys()) > 1  # one may be missing

    @staticmethod
    def read(place: Place, wanted: Wanted) -> Dictionary:
        (name,) = [match[0] for match in place.matching(r"[^/]+\.pt")]
        path = place.path(name)
        content = read_torch(path)
        tensors = Tensors.in_memory(place, content, path)
        encoder_rows = tensors.rows("encoder.weight", None, None)
        width, d_in = encoder_rows.shape
        # a tied decoder is the transposed encoder
        decoder = tensors.rows("decoder.weight", d_in, width, axis=1) if "decoder.weight" in tensors else encoder_rows
        shift, bias = tensors.get("pre_bias", d_in), tensors.get("latent_bias", width)
        tensors.check_all_taken("stats_", "latents_", "decoder.linear.")
        activation = _activation(place, content, width)
        encoder = Encoder(encoder_rows, bias, activation, shift=shift, norm="layer_norm" if isinstance(activation, TopK) else "none")
        match = re.search(r"([a-z_]+?)(?:_v\d+\w*)?/autoencoders/(\d+)\.pt$", f"{place.name}/{name}" if place.file is None else place.name)
        part = None if match is None else _LOCATIONS.get(match[1])
        reads = None if match is None or part is None else f"layers.{match[2]}.{part}"
        hooks = [] if match is None else [match[1]]
        origin = origin_of("openai", place, wanted, reads=reads, hooks=hooks, paths=[path])
        return SparseAutoencoder(encoder, decoder, shift, origin)


def _activation(place: Place, content: Mapping[str, Any], width: int) -> Activation:
    name = content.get("activation", "ReLU")
    if name == "ReLU":
        return ReLU()
    settings = content.get("activation_state_dict")
    if name != "TopK" or not isinstance(settings, Mapping) or settings.get("postact_fn", "ReLU") not in ("ReLU", "Identity"):
        raise unsupported(place, "an activation that is not read", "ReLU, or TopK with ReLU or Identity", f"{name} {settings}")
    return TopK(k_in(place, settings, width), rectified=settings.get("postact_fn", "ReLU") == "ReLU")
