"""The folders of SAELens (`cfg.json` and `sae_weights.safetensors`), of all versions; read and written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.features.activation import ACTIVATIONS, Activation
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.architectures.transcoder import Transcoder
from steer.features.dictionary import Dictionary, probe
from steer.features.encoder import Encoder
from steer.features.format import FORMATS, Format, Tensors, Wanted, k_in, needs, noted, number_in, origin_of, unsupported
from steer.features.hooks import WITHOUT_GAIN, of_transformer_lens, to_transformer_lens
from steer.features.rows import Scaled, norms
from steer.files import atomic_write
from steer.place import Place
from steer.reading import place_of

_WEIGHTS, _CONFIG = "sae_weights.safetensors", "cfg.json"
_MAX_NORM = "untrained_max_norm"  # a key of ours in the metadata, where SAELens keeps whatever it does not know
# architecture in the file -> activation; transcoders are named after theirs
_ACTIVATIONS = {
    "standard": "relu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "abstopk": "abstopk",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
# repositories whose files do not say that they were trained on a model with centred writing weights, as SAELens knows of them
_CENTRED = ("gpt2-small-mlp-out-saes", "GPT2-Small-SAEs-Reformatted", "GPT2-Small-Feature-Splitting-Experiment-Layer-8")
_NORMS = {None: "none", "none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}


@FORMATS.register("saelens")
class SAELens(Format):
    """`cfg.json`, `sae_weights.safetensors`: b_dec subtracted where the file says so; norms, `hook_z` and centred weights applied.

    Activations that were scaled in training (`expected_average_only_in`) need `norm_factor=`, which the file does not hold.
    """

    looks_for = "cfg.json and sae_weights.safetensors"
    writes = True

    @staticmethod
    def recognises(place: Place) -> bool:
        return place.has(_CONFIG, _WEIGHTS)

    @staticmethod
    def read(place: Place, wanted: Wanted) -> Dictionary:
        config = current_config(place.json(_CONFIG))
        architecture = config["architecture"]
        if architecture not in _ACTIVATIONS:
            raise unsupported(place, "an architecture that is not read", f"one of {', '.join(_ACTIVATIONS)}", architecture)
        tensors = Tensors.of_safetensors(place, _WEIGHTS)
        d_in, width = number_in(place, config, "d_in"), number_in(place, config, "d_sae")
        is_transcoder = "transcoder" in architecture
        d_out = number_in(place, config, "d_out") if is_transcoder else d_in
        encoder_rows, decoder = tensors.rows("W_enc", d_in, width, axis=1), tensors.rows("W_dec", width, d_out)
        bias = None if architecture == "gated" else tensors.get("b_enc", width)
        decoder_bias = tensors.get("b_dec", d_out)
        shift = decoder_bias if config.get("apply_b_dec_to_input", True) and not is_transcoder else None
        activation = _activation(place, config, tensors, width)
        skip = tensors.get("W_skip", d_out, d_in) if "skip" in architecture else None
        _check_scaling(place, tensors)
        tensors.check_all_taken("sparsity", "scaling_factor")
        origin = _origin(place, wanted, config, tensors, is_transcoder)
        encoder = Encoder(encoder_rows, bias, activation, shift=shift, norm=_norm(place, config))
        if is_transcoder:
            transcoder = Transcoder(encoder, decoder, decoder_bias, origin, skip)
            read: SparseAutoencoder = _with_gain(place, wanted, config, transcoder)
        else:
            prefixes = config.get("matryoshka_widths") or ()
            read = SparseAutoencoder(encoder, decoder, decoder_bias, origin, prefixes)
        if config.get("normalize_activations") == "expected_average_only_in":
            if wanted.norm_factor is None:
                raise needs(
                    place, "norm_factor", "activations that were scaled to the length sqrt(d_in) by a number not in the file", "0.3"
                )
            read = noted(read.scaled(wanted.norm_factor), f"activations times {wanted.norm_factor:g}")
        return _with_decoder_norm(read) if config.get("rescale_acts_by_decoder_norm") else read

    @staticmethod
    def write(dictionary: Dictionary, path: str | Path, dtype: str) -> Path:
        """Raises ConfigError for what SAELens has no architecture for: crosscoders, cross-layer transcoders, group-wise maxima, int8."""
        config, tensors = _for_saelens(dictionary, dtype)
        folder = place_of(path)
        atomic_write(folder / _WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))
        atomic_write(folder / _CONFIG, json.dumps(config, indent=2) + "\n")
        return folder


def current_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as version 6 writes it, flat: older ones have other names, and say by an activation function that it is top-k."""
    flat = {**config, **(config.get("metadata") or {})}
    for old, new in (("hook_point", "hook_name"), ("hook_point_head_index", "hook_head_index"), ("activation_fn", "activation_fn_str")):
        if old in flat:
            flat.setdefault(new, flat[old])
    flat.setdefault("architecture", "standard")
    arguments = flat.get("activation_fn_kwargs") or {}
    if flat.get("activation_fn_str") == "topk" and arguments.get("k") is not None:
        flat.update(architecture="topk", k=arguments["k"])
    if isinstance(flat.get("normalize_activations"), bool):
        flat["normalize_activations"] = "expected_average_only_in" if flat["normalize_activations"] else "none"
    return flat


def _activation(place: Place, config: dict[str, Any], tensors: Tensors, width: int) -> Activation:
    name = _ACTIVATIONS[config["architecture"]]
    cls: Any = ACTIVATIONS.get(name)
    if name == "jumprelu":
        if "log_threshold" in tensors:  # of version 6.53 and older
            return cls(threshold=tensors.get("log_threshold", width).exp())
        return cls(threshold=tensors.get("threshold", width))
    if name == "batchtopk":
        return cls(threshold=tensors.get("topk_threshold"), k=config.get("k"))
    if name == "gated":
        biases = {"gate_bias": tensors.get("b_gate", width), "magnitude_bias": tensors.get("b_mag", width)}
        return cls(**biases, log_scale=tensors.get("r_mag", width))
    return cls(k=k_in(place, config, width)) if name in ("topk", "abstopk") else cls()


def _norm(place: Place, config: dict[str, Any]) -> str:
    said = config.get("normalize_activations")
    if said == "expected_average_only_in":
        said = "none"
    if said not in _NORMS:
        raise unsupported(place, "activations normalised by numbers that are not in the file", "none, layer_norm or another one", said)
    is_centred = (config.get("model_from_pretrained_kwargs") or {}).get(
        "center_writing_weights", any(name in place.name for name in _CENTRED)
    )
    if not is_centred or said == "layer_norm":  # which centres by itself
        return _NORMS[said]
    if _NORMS[said] != "none" or not re.search(
        r"hook_(resid_pre|resid_post|resid_mid|attn_out|mlp_out|embed)$", str(config.get("hook_name"))
    ):
        raise unsupported(
            place, "centred writing weights, at a place where that is not a mean taken out", "the residual stream", config["hook_name"]
        )
    return "centred"


def _origin(place: Place, wanted: Wanted, config: dict[str, Any], tensors: Tensors, is_transcoder: bool) -> Any:
    if config.get("hook_head_index") is not None:
        raise unsupported(place, "a dictionary of a single attention head", "one of all heads", f"head {config['hook_head_index']}")
    hook, hook_out = str(config.get("hook_name")), str(config.get("hook_name_out"))
    without_gain = WITHOUT_GAIN.fullmatch(hook)
    site = f"layers.{without_gain[1]}.mlp.input" if without_gain and is_transcoder else of_transformer_lens(hook)
    # a range of positions of which the first ones were left out, as text in some versions
    positions = re.findall(r"-?\d+|None", str(config.get("seqpos_slice") or ""))
    return origin_of(
        "saelens",
        place,
        wanted,
        reads=site,
        writes=of_transformer_lens(hook_out),
        is_transcoder=is_transcoder,
        hooks=[hook, hook_out] if is_transcoder else [hook],
        paths=tensors.paths,
        model=config.get("model_name"),
        first=max(0, int(positions[0])) if len(positions) > 1 and positions[0] != "None" else 0,
        max_norm=config.get(_MAX_NORM),
        notes={key: config[key] for key in ("sae_lens_version", "context_size", "prepend_bos") if config.get(key) is not None},
    )


def _with_gain(place: Place, wanted: Wanted, config: dict[str, Any], transcoder: Transcoder) -> Transcoder:
    without_gain = WITHOUT_GAIN.fullmatch(str(config.get("hook_name"))) is not None
    return with_gain(place, wanted, transcoder) if without_gain and takes_gain(wanted) else transcoder


def takes_gain(wanted: Wanted) -> bool:
    """Whether the gain is folded in: what `reads` names may come before the gain, as in training, unless the caller gives one."""
    return wanted.gain is not None or wanted.reads is None


def with_gain(place: Place, wanted: Wanted, transcoder: Transcoder) -> Transcoder:
    """The transcoder for the input of the MLP as the model has it. Raises ConfigError where the caller did not give the gain."""
    if wanted.gain is None:
        why = "a transcoder of the MLP's input before the gain of the norm, which no site of the model has"
        raise needs(place, "gain", why, "1 + model.model.layers[12].pre_feedforward_layernorm.weight")
    return noted(transcoder.with_gain(wanted.gain), "the gain of the norm in front of the MLP")


def _with_decoder_norm(read: SparseAutoencoder) -> SparseAutoencoder:
    """Features in units of their decoder rows, which is how these are chosen."""
    encoder, lengths = read.encoder, norms(read.decoder)
    bias = None if encoder.bias is None else encoder.bias * lengths.to(encoder.bias.dtype)
    folded = Encoder(Scaled(encoder.rows, lengths[:, None]), bias, encoder.activation, shift=encoder.shift, norm=encoder.norm)
    decoder = Scaled(read.decoder, 1 / lengths[:, None])
    return noted(SparseAutoencoder(folded, decoder, read.decoder_bias, read.origin, read.prefixes), "lengths of the decoder rows")


def _check_scaling(place: Place, tensors: Tensors) -> None:
    scaling = tensors.optional("scaling_factor")
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise unsupported(place, "features that were scaled after training", "a scaling_factor of ones", scaling.flatten()[:5].tolist())


# ---- writing


def _for_saelens(dictionary: Dictionary, dtype: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if type(dictionary) not in (SparseAutoencoder, Transcoder) or dtype not in types:
        raise _not_written(dictionary, dtype)
    assert isinstance(dictionary, SparseAutoencoder)
    encoder, is_transcoder = dictionary.encoder, isinstance(dictionary, Transcoder)
    name = encoder.activation.name
    skip = dictionary.skip if isinstance(dictionary, Transcoder) else None
    kinds = {"relu": "standard", "gated": "gated", "jumprelu": "jumprelu", "batchtopk": "jumprelu", "topk": "topk", "abstopk": "abstopk"}
    if (
        name not in kinds
        or is_transcoder
        and kinds[name] not in ("standard", "jumprelu")
        or encoder.activation.settings.get("rectified") is False
    ):
        raise _not_written(dictionary, dtype)
    if is_transcoder:
        architecture = ("jumprelu_" if kinds[name] == "jumprelu" else "") + ("skip_" if skip is not None else "") + "transcoder"
    else:
        architecture = kinds[name]
    is_subtracted = encoder.shift is not None and not is_transcoder and torch.equal(encoder.shift, dictionary.decoder_bias)
    like = probe()
    rows = encoder.rows.all(like)
    moved = None if encoder.shift is None or is_subtracted else -(rows @ encoder.shift.float())  # the shift, as a bias
    tensors: dict[str, Tensor | None] = {
        "W_enc": rows.mT,
        "W_dec": dictionary.decoder.all(like),
        "b_dec": dictionary.decoder_bias,
        "W_skip": skip,
        **_activation_tensors(encoder, moved),
    }
    norm = {"none": "none", "centred": "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}[encoder.norm]
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.width,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": is_subtracted,
        "normalize_activations": norm,
        "reshape_activations": "hook_z" if dictionary.reads[0].part == "attn.z" else "none",
        "metadata": _metadata(dictionary),
    }
    if is_transcoder:
        config["d_out"] = dictionary.d_out
    if name in ("topk", "abstopk"):
        config.update(k=encoder.activation.settings["k"], rescale_acts_by_decoder_norm=False)
    held = {key: tensor.detach().to("cpu", types[dtype], copy=True).contiguous() for key, tensor in tensors.items() if tensor is not None}
    return config, held


def _activation_tensors(encoder: Encoder, moved: Tensor | None) -> dict[str, Tensor]:
    """Biases and thresholds by SAELens' names; moved: [features] to be added to every bias."""
    held = encoder.activation.tensors
    nothing = torch.zeros(encoder.width)
    moved = nothing if moved is None else moved
    if encoder.activation.name == "gated":
        scale = held["log_scale"].float()
        return {"b_gate": held["gate_bias"].float() + moved, "b_mag": held["magnitude_bias"].float() + scale.exp() * moved, "r_mag": scale}
    tensors = {"b_enc": (nothing if encoder.bias is None else encoder.bias.float()) + moved}
    if "threshold" in held:
        tensors["threshold"] = held["threshold"].float().expand(encoder.width)
    return tensors


def _metadata(dictionary: SparseAutoencoder) -> dict[str, Any]:
    first = dictionary.untrained.first
    out = {"hook_name_out": _hook(dictionary, "writes")} if isinstance(dictionary, Transcoder) else {}
    return {
        "sae_lens_version": "6.54.12",  # from 6.0 on the other names are read
        "model_name": dictionary.source.model,
        "hook_name": _hook(dictionary, "reads"),
        **out,
        "prepend_bos": True,
        "seqpos_slice": [first, None] if first else [None],
        _MAX_NORM: dictionary.untrained.max_norm,
        "model_from_pretrained_kwargs": {"center_writing_weights": True} if dictionary.encoder.norm == "centred" else {},
        "source": dictionary.source.place,
    }


def _hook(dictionary: Dictionary, side: str) -> str:
    site = getattr(dictionary, side)[0]
    hook = to_transformer_lens(site)
    if hook is None:
        raise ConfigError(
            f"TransformerLens has no hook for '{site}'",
            expected="residual stream, attention or MLP of a layer that is counted from 0",
            found=str(site),
            remedy="save in the format 'steer'",
        )
    return hook


def _not_written(dictionary: Dictionary, dtype: str) -> ConfigError:
    return ConfigError(
        "SAELens has no architecture for this dictionary",
        expected="an autoencoder, or a transcoder with ReLU or JumpReLU, in float32 or bfloat16",
        found=f"a {dictionary.name} with '{dictionary.activation_name}' in {dtype}",
        remedy="save in the format 'steer'",
    )
