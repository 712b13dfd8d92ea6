"""Hints for misspelt sites: what a name that other programs, or slips, use is called here."""

from __future__ import annotations

import re
from collections.abc import Collection

from steer.errors import did_you_mean

_NUMBER = re.compile(r"\*|(?<!\d)(?:(?:(?<=[.\[(])|^)-)?\d+(?:-\d+)?")  # of a layer, or the layers of a pattern
_BLOCKS = {"", "layer", "layers", "block", "blocks", "blk", "h", "resid", "residual", "stream", "state", "states"}
_WORDS = {  # a word of transformers, TransformerLens and others: the word here; those that say nothing here are empty
    **dict.fromkeys(("attention", "selfattn", "selfattention", "attns"), "attn"),
    **dict.fromkeys(("ffn", "ff", "feed", "feedforward", "mlps"), "mlp"),
    **dict.fromkeys(("out", "outputs", "result", "post", "o", "down", "c"), "output"),
    **dict.fromkeys(("in", "inputs", "pre"), "input"),
    **dict.fromkeys(("act", "acts", "neuron", "intermediate"), "neurons"),
    **{"query": "q", "queries": "q", "key": "k", "keys": "k", "value": "v", "values": "v"},
    **dict.fromkeys(("hook", "self", "forward", "proj", "resid", "residual", "stream", "hidden", "state", "states"), ""),
}
_OF_MODEL = {
    **dict.fromkeys(("embedding", "embeddings", "embedtokens", "wte", "hookembed", "tokenembedding"), "embed"),
    **dict.fromkeys(("norm", "lnf", "lnfinal", "finallayernorm", "outputnorm"), "final_norm"),
    **dict.fromkeys(("head", "lmhead", "unembed", "unembedding", "logit"), "logits"),
}


_STACKS = ("encoder", "decoder", "vision", "audio", "text")  # which a site of theirs begins with


def site_hint(text: str, layer_parts: Collection[str], model_parts: Collection[str]) -> str | None:
    """`did you mean '<site>'?`, or None where nothing is near.

    Args:
        layer_parts, model_parts: the parts that there are.
    """
    if text.startswith("module:"):
        path = text.removeprefix("module:").split(":")[0]
        return f"did you mean 'module:{path}:output'?" if path else None
    number = _NUMBER.search(text)
    if number is None:
        last = re.sub(r"[\W_]", "", text.split(".")[-1]).lower()
        return f"did you mean '{_OF_MODEL[last]}'?" if last in _OF_MODEL else did_you_mean(text, model_parts)
    before = text[: number.start()].lower()
    stack = next((f"{name}." for name in _STACKS if before.startswith(f"{name}.")), "")
    after = text[number.end() :].lower()
    part = _part(after, layer_parts)
    if part is None or not re.search(r"\w", after) and _words(before)[-1:] and _words(before)[-1] not in _BLOCKS:
        return None
    if not re.search(r"\w", after) and "hidden" in before:  # entry L of hidden_states is what comes into block L
        part = "input"
    return f"did you mean '{stack}layers.{number[0]}.{part}'?"


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", text) if word]


def _part(text: str, layer_parts: Collection[str]) -> str | None:
    """The part of a layer that is meant; the output of the block where nothing is said."""
    words = [translated for word in _words(text) if (translated := _WORDS.get(word, word))]
    meant = ".".join(words)
    for part in (meant, f"{meant}.output", f"attn.{meant}") if meant else ("output",):
        if part in layer_parts:
            return part
    near = did_you_mean(meant, layer_parts)
    return None if near is None else near.split("'")[1]
