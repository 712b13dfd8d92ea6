"""Gemma Scope 2 (2025): `params.safetensors` for Gemma 3, and a file for each layer of crosscoders and cross-layer transcoders."""

from __future__ import annotations

import re
from typing import Any

import torch

from steer.features.activations.jumprelu import JumpReLU
from steer.features.architectures.cross_layer_transcoder import CrossLayerTranscoder
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.architectures.transcoder import Transcoder
from steer.features.dictionary import Dictionary
from steer.features.encoder import Encoder
from steer.features.format import FORMATS, Format, Tensors, Wanted, incomplete, origin_of, unsupported
from steer.features.hooks import of_gemma
from steer.place import Place

_LAYER_FILE = r"params_layer_(\d+)\.safetensors"


@FORMATS.register("gemma_scope_2")
class GemmaScope2(Format):
    """`config.json`, `params.safetensors` of Gemma Scope 2: autoencoders, transcoders (affine skip), crosscoders, cross-layer transcoders.

    The last two have a file for each layer, whose features read that layer and write all of them: a crosscoder of this kind is a
    cross-layer transcoder of the residual stream.
    """

    looks_for = "params.safetensors, or params_layer_<n>.safetensors, with config.json"

    @staticmethod
    def recognises(place: Place) -> bool:
        return place.has("params.safetensors") or bool(place.matching(_LAYER_FILE))

    @staticmethod
    def read(place: Place, wanted: Wanted) -> Dictionary:
        config = place.json("config.json") if place.has("config.json") else {}
        if config.get("architecture", "jump_relu") != "jump_relu":
            raise unsupported(place, "an architecture that is not read", "jump_relu", config["architecture"])
        if place.has("params.safetensors"):
            return _single(place, wanted, config)
        return _several(place, wanted, config)


def _single(place: Place, wanted: Wanted, config: dict[str, Any]) -> Dictionary:
    tensors = Tensors.of_safetensors(place, "params.safetensors")
    encoder = _encoder(tensors)
    decoder = tensors.rows("w_dec", encoder.width, None)
    decoder_bias = tensors.get("b_dec", decoder.shape[-1])
    skip = tensors.optional("affine_skip_connection", encoder.rows.shape[1], decoder.shape[-1])
    tensors.check_all_taken()
    hooks = [str(config.get(key)) for key in ("hf_hook_point_in", "hf_hook_point_out") if config.get(key)]
    is_transcoder = config.get("type") == "transcoder" or len(set(hooks)) > 1 or skip is not None or wanted.writes is not None
    sites = [of_gemma(hook) for hook in hooks]
    origin = origin_of(
        "gemma_scope_2",
        place,
        wanted,
        reads=sites[0] if sites else None,
        writes=sites[-1] if sites else None,
        is_transcoder=is_transcoder,
        hooks=hooks,
        paths=tensors.paths,
        model=config.get("model_name"),
        first=_untrained(config, is_transcoder),
    )
    if is_transcoder:
        return Transcoder(encoder, decoder, decoder_bias, origin, None if skip is None else skip.mT.contiguous())
    return SparseAutoencoder(encoder, decoder, decoder_bias, origin)


def _several(place: Place, wanted: Wanted, config: dict[str, Any]) -> Dictionary:
    names = sorted((int(match[1]), match[0]) for match in place.matching(_LAYER_FILE))
    if [number for number, _ in names] != list(range(len(names))):
        raise incomplete(place, f"params_layer_0.safetensors to params_layer_{len(names) - 1}.safetensors", [name for _, name in names])
    hooks = [str(config.get(key)) for key in ("hf_hook_point_in", "hf_hook_point_out") if config.get(key)]
    sites = [_expanded(place, hook, len(names)) for hook in hooks] or [None]
    of_layers = [Tensors.of_safetensors(place, name) for _, name in names]
    encoders = [_encoder(tensors) for tensors in of_layers]
    d_in = encoders[0].rows.shape[1]
    decoders = [
        tensors.rows("w_dec", encoder.width, len(names), None) for tensors, encoder in zip(of_layers, encoders, strict=True)
    ]  # [features, layers, width]
    d_out = decoders[0].shape[-1]
    bias = torch.stack([tensors.get("b_dec", d_out) for tensors in of_layers])
    skips = [tensors.optional("affine_skip_connection", d_in, d_out) for tensors in of_layers]
    for tensors in of_layers:
        tensors.check_all_taken()
    if any(skip is None for skip in skips) and not all(skip is None for skip in skips):
        raise incomplete(place, "a skip connection in every layer or in none", [skip is not None for skip in skips])
    stacked = None if skips[0] is None else torch.stack([skip.mT for skip in skips if skip is not None])
    is_autoencoder = len(set(hooks)) == 1 and wanted.writes is None
    origin = origin_of(
        "gemma_scope_2",
        place,
        wanted,
        reads=sites[0],
        writes=sites[-1],
        is_transcoder=not is_autoencoder,
        hooks=hooks,
        paths=[path for tensors in of_layers for path in tensors.paths],
        model=config.get("model_name"),
        first=_untrained(config, not is_autoencoder),
    )
    return CrossLayerTranscoder(encoders, decoders, [range(len(names))] * len(names), bias, origin, stacked)


def _encoder(tensors: Tensors) -> Encoder:
    rows = tensors.rows("w_enc", None, None, axis=1)
    width = rows.shape[0]
    return Encoder(rows, tensors.get("b_enc", width), JumpReLU(tensors.get("threshold", width)))


def _expanded(place: Place, hook: str, count: int) -> list[str] | None:
    """The sites of `model.layers.{5,9,12,15}.output` or `model.layers.{all}.output`."""
    match = re.fullmatch(r"(.*)\{(all|\d+(?:,\d+)*)\}(.*)", hook)
    if match is None:
        return None
    layers = list(range(count)) if match[2] == "all" else [int(layer) for layer in match[2].split(",")]
    if len(layers) != count:
        raise incomplete(place, f"{len(layers)} files, one for each layer of '{hook}'", f"{count} files")
    sites = [of_gemma(f"{match[1]}{layer}{match[3]}") for layer in layers]
    return [site for site in sites if site is not None] if None not in sites else None


def _untrained(config: dict[str, Any], is_transcoder: bool) -> int:
    """The first token, and of instruction-tuned models those of the chat template, which transcoders did not see in training."""
    return 4 if is_transcoder and str(config.get("model_name")).endswith("-it") else 1
