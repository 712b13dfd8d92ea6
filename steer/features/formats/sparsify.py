"""The folders of sparsify (EleutherAI): `cfg.json` and `sae.safetensors`, in a folder named after the hook point."""

from __future__ import annotations

from pathlib import PurePath

from steer.features.activation import Activation
from steer.features.activations.groupmax import GroupMax
from steer.features.activations.topk import TopK
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.architectures.transcoder import Transcoder
from steer.features.dictionary import Dictionary
from steer.features.encoder import Encoder
from steer.features.format import FORMATS, Format, Tensors, Wanted, incomplete, k_in, number_in, origin_of, unsupported
from steer.features.hooks import of_sparsify
from steer.place import Place


@FORMATS.register("sparsify")
class Sparsify(Format):
    """`cfg.json`, `sae.safetensors`: top-k or group-wise maximum, transcoders, skip; b_dec subtracted unless the file says `transcode`.

    The folder is named after the hook point: `layers.5` is what the block puts out, `layers.5.mlp` a module. A file with a skip connection
    that does not say `transcode` is a transcoder of an older version, which subtracted b_dec.
    """

    looks_for = "cfg.json and sae.safetensors"

    @staticmethod
    def recognises(place: Place) -> bool:
        return place.has("cfg.json", "sae.safetensors")

    @staticmethod
    def read(place: Place, wanted: Wanted) -> Dictionary:
        config = place.json("cfg.json")
        if config.get("signed"):
            raise unsupported(place, "features with a sign, which versions before 1.0 had", "signed: false", "signed: true")
        tensors = Tensors.of_safetensors(place, "sae.safetensors")
        d_in = number_in(place, config, "d_in")
        width = config.get("num_latents") or d_in * number_in(place, config, "expansion_factor")
        encoder_rows, decoder = tensors.rows("encoder.weight", width, d_in), tensors.rows("W_dec", width, d_in)
        bias, decoder_bias = tensors.get("encoder.bias", width), tensors.get("b_dec", d_in)
        skip = tensors.get("W_skip", d_in, d_in) if config.get("skip_connection") else None
        tensors.check_all_taken()
        is_transcoder = bool(config.get("transcode")) or skip is not None or wanted.writes is not None
        shift = None if config.get("transcode") else decoder_bias
        encoder = Encoder(encoder_rows, bias, _activation(place, config, width), shift=shift)
        hook = PurePath(place.name).name
        origin = origin_of(
            "sparsify",
            place,
            wanted,
            reads=of_sparsify(hook, "input" if is_transcoder else "output"),
            writes=of_sparsify(hook, "output"),
            is_transcoder=is_transcoder,
            hooks=[hook],
            paths=tensors.paths,
        )
        return (
            Transcoder(encoder, decoder, decoder_bias, origin, skip)
            if is_transcoder
            else SparseAutoencoder(encoder, decoder, decoder_bias, origin)
        )


def _activation(place: Place, config: dict[str, object], width: int) -> Activation:
    k, name = k_in(place, config, width), config.get("activation", "topk")
    if name == "topk":
        return TopK(k)
    if name != "groupmax":
        raise unsupported(place, "an activation that is not read", "topk or groupmax", name)
    if width % k:
        raise incomplete(place, f"a number of features that {k} groups share", width)
    return GroupMax(k)
