"""What keys depend on: the model, the weights of the blocks up to theirs, and the tokenizer, as digests that a file can carry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from steer.edits.edited_map import edited_maps, without_wrappers
from steer.errors import EditError, TokenizerError, WrongModelError
from steer.model.anatomy import Anatomy
from steer.model.fingerprint import CASTS, DIGEST, bits_digest
from steer.model.tokens import check_tokenizer

_SAMPLE = "The Eiffel Tower, built in 1889, isn't in \u00c5rhus; \u6771\u4eac has one, too.\n"


def weights_digests(anatomy: Anatomy, layers: Sequence[int], *, with_edited: bool) -> dict[int, str]:
    """By layer, a digest of the embedding and of all blocks up to that layer.

    Args:
        with_edited: with the down projections, which edits change. Without them one covariance serves a whole sequence of edits.
    """
    digest = hashlib.sha256()
    if anatomy.embedding is not None:
        _add(digest, anatomy.embedding, "embedding", None)
    digests = {}
    for number in range(max(layers) + 1):
        _add(digest, anatomy.blocks[number], str(number), None if with_edited else _edited_weight(anatomy, number))
        if number in layers:
            digests[number] = digest.hexdigest()[:16]
    return digests


def tokenizer_digest(tokenizer: Any) -> str:
    """Of what a tokenizer makes of a sentence, special tokens included. Raises ConfigError for what is none."""
    check_tokenizer(tokenizer)
    ids = list(tokenizer(_SAMPLE).input_ids)
    return hashlib.sha256(json.dumps([len(tokenizer), ids]).encode()).hexdigest()[:16]


def key_source(anatomy: Anatomy, layers: Sequence[int], tokenizer: Any) -> dict[str, Any]:
    """JSON-able facts about where keys come from: `model`, `weights` by layer, `tokenizer`."""
    digests = weights_digests(anatomy, layers, with_edited=False)
    return {
        "model": anatomy.fingerprint(),
        "weights": {str(layer): digest for layer, digest in digests.items()},
        "tokenizer": tokenizer_digest(tokenizer),
    }


def check_source(known: dict[str, Any], found: dict[str, Any], what: str) -> None:
    """Raises WrongModelError, or TokenizerError, where keys came from somewhere else.

    Args:
        known, found: as `key_source` gives them; entries that one lacks are not compared.
        what: that was made of the keys, for the error.
    """
    model, other = known["model"], found["model"]
    names = [name for name in model if name in other and name not in (DIGEST, CASTS)]  # the digests of weights have all of the embedding
    if differing := {name: (model[name], other[name]) for name in names if model[name] != other[name]}:
        raise _other_model(what, differing)
    changed = [layer for layer, digest in known["weights"].items() if found["weights"].get(layer, digest) != digest]
    if changed:
        raise _other_weights(what, changed)
    if found.get("tokenizer", known["tokenizer"]) != known["tokenizer"]:
        raise _other_tokenizer(what)


def _add(digest: Any, module: nn.Module, name: str, left_out: nn.Parameter | None) -> None:
    for path, parameter in sorted(_parameters(module)):
        if parameter is left_out:
            continue
        if parameter.is_meta:
            raise _offloaded(f"{name}.{path}")
        digest.update(json.dumps([name, path, str(parameter.dtype), list(parameter.shape), bits_digest(parameter)]).encode())


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named as without wrappers; adapters of PEFT that were not trained yet, and change nothing, are left out."""
    named = [(without_wrappers(path), parameter) for path, parameter in module.named_parameters()]
    is_trained = any("lora_B" in path and bool(parameter.any()) for path, parameter in named)
    return ((path, parameter) for path, parameter in named if is_trained or "lora_" not in path)


def _edited_weight(anatomy: Anatomy, layer: int) -> nn.Parameter | None:
    """The weight that an edit of a layer would change; None where it has none."""
    try:
        (edited,) = edited_maps(anatomy, [layer])
    except EditError:
        return None
    weight = edited.module._parameters.get("weight")
    return weight if isinstance(weight, nn.Parameter) else None


# ---- errors


def _other_model(what: str, differing: dict[str, tuple[Any, Any]]) -> WrongModelError:
    return WrongModelError(
        f"{what} is that of another model",
        expected=", ".join(f"{name} {found}" for name, (_, found) in differing.items()),
        found=", ".join(f"{name} {known}" for name, (known, _) in differing.items()),
        remedy="fit it on this model: Covariance.fit(model, tokenizer, texts, layers)",
    )


def _other_weights(what: str, layers: list[str]) -> WrongModelError:
    return WrongModelError(
        f"{what} was fitted on other weights of this architecture",
        expected="the weights, and the dtype, of all blocks up to its layer as they were, apart from edited down projections",
        found=f"other ones for layer {', '.join(layers)}: the model was trained since, or loaded from elsewhere",
        remedy="fit it on the model as it is now: Covariance.fit(model, tokenizer, texts, layers)",
    )


def _other_tokenizer(what: str) -> TokenizerError:
    return TokenizerError(
        f"{what} was fitted with another tokenizer",
        expected="the same tokens for the same text, the start-of-text token included",
        found="other ones for a sample sentence",
        remedy="use the tokenizer of the model for both",
    )


def _offloaded(name: str) -> EditError:
    return EditError(
        "a digest of the weights needs them in memory",
        expected="a model that is not offloaded",
        found=f"'{name}' on the meta device",
        remedy="load the model without offloading (device_map=None, or one with room for all layers)",
    )
