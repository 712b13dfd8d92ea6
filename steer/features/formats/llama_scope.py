"""Llama Scope (He et al. 2024, arXiv 2410.20526): `hyperparams.json` and `checkpoints/final.safetensors`."""

from __future__ import annotations

from typing import Any

import torch

from steer.features.activation import Activation
from steer.features.activations.jumprelu import JumpReLU
from steer.features.activations.relu import ReLU
from steer.features.activations.topk import TopK
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.architectures.transcoder import Transcoder
from steer.features.dictionary import Dictionary
from steer.features.encoder import Encoder
from steer.features.format import FORMATS, Format, Tensors, Wanted, incomplete, k_in, noted, number_in, origin_of, unsupported
from steer.features.formats.saelens import takes_gain, with_gain
from steer.features.hooks import WITHOUT_GAIN, of_transformer_lens
from steer.features.rows import Rows, Scaled, norms
from steer.place import Place

_CONFIG, _WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"


@FORMATS.register("llama_scope")
class LlamaScope(Format):
    """`hyperparams.json`, `checkpoints/final.safetensors`: JumpReLU with one threshold, ReLU or top-k; the norms of the data set folded in.

    Features are chosen by pre-activation times length of their decoder row, where the file says so; their values stay as they are.
    """

    looks_for = "hyperparams.json and checkpoints/final.safetensors"

    @staticmethod
    def recognises(place: Place) -> bool:
        return place.has(_CONFIG, _WEIGHTS)

    @staticmethod
    def read(place: Place, wanted: Wanted) -> Dictionary:
        config = place.json(_CONFIG)
        if config.get("use_glu_encoder"):
            raise unsupported(place, "an encoder with a second matrix", "use_glu_encoder: false", True)
        tensors = Tensors.of_safetensors(place, _WEIGHTS)
        d_in, width = number_in(place, config, "d_model"), number_in(place, config, "d_sae")
        encoder_rows = tensors.rows("encoder.weight", width, d_in)
        decoder = tensors.rows("decoder.weight", d_in, width, axis=1)
        bias = tensors.optional("encoder.bias", width)
        decoder_bias = tensors.optional("decoder.bias", d_in)
        tensors.check_all_taken("dataset_average_activation_norm")
        decoder_bias = torch.zeros(d_in) if decoder_bias is None else decoder_bias
        shift = decoder_bias if config.get("apply_decoder_bias_to_pre_encoder") else None
        hooks = [str(config.get(key)) for key in ("hook_point_in", "hook_point_out")]
        is_transcoder = hooks[0] != hooks[1]
        activation, factor = _activation(place, config, decoder, bool(config.get("sparsity_include_decoder_norm", True)))
        encoder = Encoder(encoder_rows, bias, activation, shift=shift)
        if factor is not None:  # top-k by the scaled pre-activations, whose values the features then have
            scaled_bias = None if bias is None else bias * factor.to(bias.dtype)
            encoder = Encoder(Scaled(encoder_rows, factor[:, None]), scaled_bias, activation, shift=shift)
            decoder = Scaled(decoder, 1 / factor[:, None])
        without_gain = WITHOUT_GAIN.fullmatch(hooks[0])
        origin = origin_of(
            "llama_scope",
            place,
            wanted,
            reads=f"layers.{without_gain[1]}.mlp.input" if without_gain else of_transformer_lens(hooks[0]),
            writes=of_transformer_lens(hooks[1]),
            is_transcoder=is_transcoder,
            hooks=hooks,
            paths=tensors.paths,
            model="meta-llama/Llama-3.1-8B" if "Llama3_1-8B-Base" in place.name else config.get("model_name"),
        )
        read = _Folded(place, config, d_in)
        if not is_transcoder:
            return noted(SparseAutoencoder(encoder, decoder, decoder_bias, origin).scaled(read.factor_in), read.said)
        transcoder = Transcoder(encoder, decoder, decoder_bias, origin).scaled(read.factor_in, read.factor_out)
        folded = with_gain(place, wanted, transcoder) if without_gain and takes_gain(wanted) else transcoder
        return noted(folded, read.said)


class _Folded:
    """The numbers that activations were multiplied with in training. Raises DamagedFileError, WrongKindError where there is none."""

    def __init__(self, place: Place, config: dict[str, Any], d_in: int) -> None:
        mode = config.get("norm_activation", "dataset-wise")
        if mode == "inference":
            self.factor_in = self.factor_out = 1.0
        elif mode == "dataset-wise":
            lengths = config.get("dataset_average_activation_norm")
            if not isinstance(lengths, dict) or not all(
                isinstance(lengths.get(key), int | float) and lengths[key] > 0 for key in ("in", "out")
            ):
                raise incomplete(place, "'dataset_average_activation_norm' with two numbers above 0, 'in' and 'out'", lengths)
            self.factor_in, self.factor_out = d_in**0.5 / lengths["in"], d_in**0.5 / lengths["out"]
        else:
            raise unsupported(place, "activations normalised token by token", "dataset-wise or inference", mode)
        self.said = f"activations times {self.factor_in:g}, reconstructions times {1 / self.factor_out:g}"


def _activation(place: Place, config: dict[str, Any], decoder: Rows, by_length: bool) -> tuple[Activation, torch.Tensor | None]:
    """The activation, and for top-k the lengths by which the features are scaled before they are chosen."""
    name = str(config.get("act_fn", "jumprelu")).lower()
    if name == "relu":
        return ReLU(), None
    if name == "topk":
        return TopK(k_in(place, config, decoder.shape[0], "top_k")), norms(decoder) if by_length else None
    if name != "jumprelu":
        raise unsupported(place, "an activation that is not read", "jumprelu, relu or topk", name)
    threshold = config.get("jump_relu_threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise incomplete(place, "'jump_relu_threshold', a number", threshold)
    per_feature = torch.full((decoder.shape[0],), float(threshold))
    return JumpReLU(per_feature / norms(decoder).float() if by_length else per_feature), None
