"""The folders of dictionary_learning: `ae.pt` and `config.json`."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from steer.features.activation import Activation
from steer.features.activations.batchtopk import BatchTopK
from steer.features.activations.gated import Gated
from steer.features.activations.jumprelu import JumpReLU
from steer.features.activations.relu import ReLU
from steer.features.activations.topk import TopK
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.dictionary import Dictionary
from steer.features.encoder import Encoder
from steer.features.format import FORMATS, Format, Tensors, Wanted, incomplete, k_in, origin_of, unsupported
from steer.place import Place
from steer.tensor_files import read_torch


class Kind(NamedTuple):
    """How one of its classes holds its tensors.

    Attributes:
        bias: name of the bias of the decoder, which is subtracted from the input where `is_subtracted`.
        of_linear: matrices of torch.nn.Linear, [out, in], instead of [in, out].
    """

    bias: str
    is_subtracted: bool
    of_linear: bool
    activation: Callable[[Tensors, int], Activation]


def _gated(tensors: Tensors, width: int) -> Activation:
    return Gated(tensors.get("gate_bias", width), tensors.get("mag_bias", width), tensors.get("r_mag", width))


def _topk(tensors: Tensors, width: int) -> Activation:
    tensors.optional("threshold")  # which it has, and does not use
    return TopK(_k(tensors, width))


def _batchtopk(tensors: Tensors, width: int) -> Activation:
    threshold = tensors.get("threshold")
    if threshold.numel() != 1:
        raise incomplete(tensors.place, "'threshold', one number for all features", list(threshold.shape))
    return BatchTopK(threshold, _k(tensors, width))


def _k(tensors: Tensors, width: int) -> int:
    numbers = tensors.whole_numbers("k")
    return k_in(tensors.place, {"k": numbers[0] if len(numbers) == 1 else numbers}, width)


_KINDS = {
    "AutoEncoder": Kind("bias", True, True, lambda tensors, width: ReLU()),
    "AutoEncoderNew": Kind("decoder.bias", False, True, lambda tensors, width: ReLU()),
    "GatedAutoEncoder": Kind("decoder_bias", True, True, _gated),
    "JumpReluAutoEncoder": Kind("b_dec", False, False, lambda tensors, width: JumpReLU(tensors.get("threshold", width))),
    "AutoEncoderTopK": Kind("b_dec", True, True, _topk),
    "BatchTopKSAE": Kind("b_dec", True, True, _batchtopk),
    "MatryoshkaBatchTopKSAE": Kind("b_dec", True, False, _batchtopk),
}


@FORMATS.register("dictionary_learning")
class DictionaryLearning(Format):
    """`ae.pt`, `config.json`: all seven classes; BatchTopK and Matryoshka with their one threshold, features in the units of the file.

    The library's own loader divides the decoder rows of `AutoEncoder` by their lengths, and multiplies the features with these.
    """

    looks_for = "ae.pt and config.json"

    @staticmethod
    def recognises(place: Place) -> bool:
        return place.has("ae.pt", "config.json") and place.file in (None, "ae.pt")

    @staticmethod
    def read(place: Place, wanted: Wanted) -> Dictionary:
        trainer = place.json("config.json").get("trainer")
        if not isinstance(trainer, dict):
            raise incomplete(place, "'trainer' in config.json, an object", trainer)
        name = trainer.get("dict_class")
        if name not in _KINDS:
            raise unsupported(place, "a class that is not read", f"one of {', '.join(_KINDS)}", name)
        kind = _KINDS[name]
        path = place.path("ae.pt")
        tensors = Tensors.in_memory(place, read_torch(path), path)
        width, d_in = trainer.get("dict_size"), trainer.get("activation_dim")
        if kind.of_linear:
            encoder_rows = tensors.rows("encoder.weight", width, d_in)
            decoder = tensors.rows("decoder.weight", d_in, width, axis=1)
        else:
            encoder_rows, decoder = tensors.rows("W_enc", d_in, width, axis=1), tensors.rows("W_dec", width, d_in)
        width, d_in = encoder_rows.shape
        bias = None if name == "GatedAutoEncoder" else tensors.get("encoder.bias" if kind.of_linear else "b_enc", width)
        decoder_bias = tensors.get(kind.bias, d_in)
        activation = kind.activation(tensors, width)
        groups = tensors.whole_numbers("group_sizes") if "group_sizes" in tensors else []
        tensors.check_all_taken()
        encoder = Encoder(encoder_rows, bias, activation, shift=decoder_bias if kind.is_subtracted else None)
        hook = str(trainer.get("submodule_name"))
        is_residual = hook == "None" or re.match(r"resid(_post)?(?!_mid|_pre)", hook) is not None
        origin = origin_of(
            "dictionary_learning",
            place,
            wanted,
            reads=f"layers.{trainer['layer']}.output" if is_residual and isinstance(trainer.get("layer"), int) else None,
            hooks=[hook],
            paths=tensors.paths,
            model=trainer.get("lm_name"),
        )
        prefixes = list(accumulate(groups))
        return SparseAutoencoder(encoder, decoder, decoder_bias, origin, prefixes)
