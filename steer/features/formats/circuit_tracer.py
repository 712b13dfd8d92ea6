"""The folders of circuit-tracer: `config.yaml`, with per-layer transcoders or a cross-layer transcoder in safetensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.features.activation import Activation
from steer.features.activations.jumprelu import JumpReLU
from steer.features.activations.relu import ReLU
from steer.features.architectures.cross_layer_transcoder import CrossLayerTranscoder
from steer.features.architectures.transcoder import Transcoder
from steer.features.dictionary import Dictionary
from steer.features.encoder import Encoder
from steer.features.format import FORMATS, Format, Tensors, Wanted, incomplete, needs, origin_of, unsupported
from steer.features.formats.saelens import takes_gain, with_gain
from steer.features.hooks import WITHOUT_GAIN, of_transformer_lens
from steer.features.rows import Rows
from steer.place import Place

_LAYER_FILE, _ENCODER_FILE = r"layer_(\d+)\.safetensors", r"W_enc_(\d+)\.safetensors"


@FORMATS.register("circuit_tracer")
class CircuitTracer(Format):
    """`config.yaml` with `layer_<n>.safetensors` (`layer=`), `W_enc_<n>`, `W_dec_<n>` or a list of files on the hub; ReLU or JumpReLU.

    The decoders of a cross-layer transcoder reach from their own layer to the last. `hook_resid_mid` is no site of its own: it is the input
    of the norm in front of the MLP, which `reads=` names.
    """

    looks_for = "config.yaml with model_kind"

    @staticmethod
    def recognises(place: Place) -> bool:
        return place.has("config.yaml") and "model_kind" in place.yaml("config.yaml")

    @staticmethod
    def read(place: Place, wanted: Wanted) -> Dictionary:
        config = place.yaml("config.yaml")
        kind = config["model_kind"]
        if kind == "cross_layer_transcoder" and "transcoders" not in config:
            return _cross_layer(place, wanted, config)
        if kind != "transcoder_set":
            raise unsupported(place, "a kind that is not read", "transcoder_set, or cross_layer_transcoder with its own files", kind)
        return _of_layer(place, wanted, config)


def _of_layer(place: Place, wanted: Wanted, config: dict[str, Any]) -> Dictionary:
    listed = config.get("transcoders")
    files = {int(match[1]): match[0] for match in place.matching(_LAYER_FILE)} if listed is None else dict(enumerate(listed))
    layer = next(iter(files)) if wanted.layer is None and len(files) == 1 else wanted.layer
    if layer is None or layer not in files:
        raise needs(
            place, "layer", f"transcoders for the layers {', '.join(map(str, sorted(files))) or 'of no file'}", str(min(files, default=0))
        )
    if listed is not None:
        return _elsewhere(place, wanted, str(files[layer]))
    tensors = Tensors.of_safetensors(place, files[layer])
    encoder_rows = tensors.rows("W_enc", None, None)
    width, d_in = encoder_rows.shape
    decoder = tensors.rows("W_dec", width, None)
    d_out = decoder.shape[1]
    encoder = Encoder(encoder_rows, tensors.get("b_enc", width), _activation(tensors, "activation_function.threshold", width))
    decoder_bias, skip = tensors.get("b_dec", d_out), tensors.optional("W_skip", d_out, d_in)
    tensors.check_all_taken()
    hook_in, hook_out = (f"blocks.{layer}.{config.get(f'feature_{side}_hook')}" for side in ("input", "output"))
    without_gain = WITHOUT_GAIN.fullmatch(hook_in) is not None
    origin = origin_of(
        "circuit_tracer",
        place,
        wanted,
        reads=f"layers.{layer}.mlp.input" if without_gain else of_transformer_lens(hook_in),
        writes=_written(hook_out, config),
        is_transcoder=True,
        hooks=[hook_in, hook_out],
        paths=tensors.paths,
        model=config.get("model_name"),
        first=1,
    )
    transcoder = Transcoder(encoder, decoder, decoder_bias, origin, skip)
    return with_gain(place, wanted, transcoder) if without_gain and takes_gain(wanted) else transcoder


def _elsewhere(place: Place, wanted: Wanted, address: str) -> Dictionary:
    """A transcoder of Gemma Scope, which the list names by its address on the hub."""
    match = re.fullmatch(r"hf://([^/]+/[^/]+)/(.+)/[^/]+\.(npz|safetensors)(?:\?revision=(.+))?", address)
    if match is None:
        raise unsupported(place, "an entry in the list of transcoders that is not read", "hf://owner/name/folder/params.npz", address)
    format = FORMATS.get("gemma_scope" if match[3] == "npz" else "gemma_scope_2")
    return format.read(Place.find(match[1], match[2], match[4], what="dictionary"), wanted)


def _cross_layer(place: Place, wanted: Wanted, config: dict[str, Any]) -> Dictionary:
    count = len(place.matching(_ENCODER_FILE))
    missing = [
        name for layer in range(count) for name in (f"W_enc_{layer}.safetensors", f"W_dec_{layer}.safetensors") if not place.has(name)
    ]
    if missing or not count:
        raise incomplete(
            place, f"W_enc_0.safetensors, W_dec_0.safetensors and so on to {count - 1}", f"no {', '.join(missing) or 'such file'}"
        )
    encoders: list[Encoder] = []
    decoders: list[Rows] = []
    biases: list[Tensor] = []
    paths: list[Path] = []
    for layer in range(count):
        tensors = Tensors.of_safetensors(place, f"W_enc_{layer}.safetensors", f"W_dec_{layer}.safetensors")
        rows = tensors.rows(f"W_enc_{layer}", None, None)
        width, d_in = rows.shape
        bias = tensors.get(f"b_enc_{layer}", width)
        encoders.append(Encoder(rows, bias, _activation(tensors, f"threshold_{layer}", width)))
        decoders.append(tensors.rows(f"W_dec_{layer}", width, count - layer, None))  # [features, layers from this one on, width]
        biases.append(tensors.get(f"b_dec_{layer}", decoders[-1].shape[-1]))
        tensors.check_all_taken()
        paths += tensors.paths
    hooks = [f"blocks.{{layer}}.{config.get(f'feature_{side}_hook')}" for side in ("input", "output")]
    reads = [of_transformer_lens(hooks[0].format(layer=layer)) for layer in range(count)]
    writes = [_written(hooks[1].format(layer=layer), config) for layer in range(count)]
    origin = origin_of(
        "circuit_tracer",
        place,
        wanted.for_layers(count),
        reads=None if None in reads else [site for site in reads if site is not None],
        writes=None if None in writes else [site for site in writes if site is not None],
        is_transcoder=True,
        hooks=hooks,
        paths=paths,
        model=config.get("model_name"),
        first=1,
    )
    return CrossLayerTranscoder(encoders, decoders, [range(layer, count) for layer in range(count)], torch.stack(biases), origin)


def _activation(tensors: Tensors, key: str, width: int) -> Activation:
    if key not in tensors:
        return ReLU()
    threshold = tensors.get(key)
    return JumpReLU(threshold.reshape(-1) if threshold.numel() == width else tensors.get(key, width), rectified=False)


def _written(hook: str, config: dict[str, Any]) -> str | None:
    """The site of the output hook. `mlp.hook_out` comes before the norm that some families have behind the MLP."""
    match = re.fullmatch(r"blocks\.(\d+)\.mlp\.hook_out", hook)
    if match is None:
        return of_transformer_lens(hook)
    has_norm = re.search(r"gemma-[23]|olmo-?[23]|glm-?4", str(config.get("model_name")), re.I)
    return None if has_norm else f"layers.{match[1]}.mlp.output"
