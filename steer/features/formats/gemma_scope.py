"""Gemma Scope (Lieberum et al. 2024, arXiv 2408.05147): `params.npz` for Gemma 2."""

from __future__ import annotations

import re

from steer.features.activations.jumprelu import JumpReLU
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.architectures.transcoder import Transcoder
from steer.features.dictionary import Dictionary
from steer.features.encoder import Encoder
from steer.features.format import FORMATS, Format, Tensors, Wanted, noted, origin_of
from steer.features.formats.saelens import takes_gain, with_gain
from steer.features.rows import Scaled
from steer.place import Place
from steer.tensor_files import read_npz

_NAME = re.compile(r"gemma-scope-(\w+)-(\w+)-(res|mlp|att|transcoders)")
_PARTS = {"res": "output", "mlp": "mlp.output", "att": "attn.z"}


@FORMATS.register("gemma_scope")
class GemmaScope(Format):
    """`params.npz` of Gemma Scope 1: JumpReLU, nothing subtracted; embedding scaled, transcoders with the gain of the norm (`gain=`).

    The site is in the name of the repository and the folder (`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`); of files that lie
    elsewhere, `reads=` says it.
    """

    looks_for = "params.npz"

    @staticmethod
    def recognises(place: Place) -> bool:
        return place.has("params.npz") and place.file in (None, "params.npz")

    @staticmethod
    def read(place: Place, wanted: Wanted) -> Dictionary:
        path = place.path("params.npz")
        tensors = Tensors.in_memory(place, read_npz(path), path)
        encoder_rows = tensors.rows("W_enc", None, None, axis=1)
        width, d_in = encoder_rows.shape
        decoder = tensors.rows("W_dec", width, None)
        activation = JumpReLU(tensors.get("threshold", width))
        encoder = Encoder(encoder_rows, tensors.get("b_enc", width), activation)
        decoder_bias = tensors.get("b_dec", decoder.shape[1])
        tensors.check_all_taken("scaling_factor")
        kind, layer, model = _named(place, wanted)
        site = "embed" if kind == "embedding" else f"layers.{layer}.{_PARTS[kind]}" if kind in _PARTS and layer is not None else None
        if kind == "transcoders" or wanted.writes is not None:
            reads = None if layer is None else f"layers.{layer}.mlp.input"
            writes = None if layer is None else f"layers.{layer}.mlp.output"
            sites = {"reads": reads, "writes": writes, "is_transcoder": True}
            origin = origin_of("gemma_scope", place, wanted, **sites, paths=[path], model=model, first=1)  # type: ignore[arg-type]
            transcoder = Transcoder(encoder, decoder, decoder_bias, origin)
            return with_gain(place, wanted, transcoder) if takes_gain(wanted) else transcoder
        origin = origin_of("gemma_scope", place, wanted, reads=site, paths=[path], model=model, first=1)
        if kind != "embedding":
            return SparseAutoencoder(encoder, decoder, decoder_bias, origin)
        # trained on plain embeddings, of which the residual stream has sqrt(width) times as much
        scale = d_in**0.5
        encoder = Encoder(Scaled(encoder_rows, 1 / scale), encoder.bias, activation)
        return noted(SparseAutoencoder(encoder, Scaled(decoder, scale), decoder_bias * scale, origin), "the scale of the embedding")


def _named(place: Place, wanted: Wanted) -> tuple[str, int | None, str | None]:
    """(kind, layer, model) as the names of repository and folder say."""
    name = _NAME.search(place.name)
    layer = re.search(r"layer_(\d+)", place.name)
    kind = "embedding" if "/embedding/" in f"{place.name}/" else "" if name is None else name[3]
    model = None if name is None else f"google/gemma-2-{name[1]}{'' if name[2] == 'pt' else f'-{name[2]}'}"
    return kind, wanted.layer if layer is None else int(layer[1]), model
