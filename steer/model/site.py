"""Site: the address of one activation tensor.

A bare layer number never says whether the input or the output of a block is meant; a site always does. `hidden_states[L]` of
transformers is `layers.{L}.input`, hence `layers.{L-1}.output`; its last entry comes after the final norm and is `final_norm`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from steer.errors import SiteError
from steer.model.site_hints import site_hint

# part -> what the tensor is; every tensor is [batch, tokens, width]
LAYER_PARTS = {
    "input": "residual stream before the block",
    "output": "residual stream after the block",
    "attn.output": "what attention adds to the residual stream (after a post-norm where the family has one)",
    "attn.z": "input of the output projection W_O, heads concatenated",
    "attn.q": "query projection, before q-norm and rotary embedding, heads concatenated",
    "attn.k": "key projection, likewise, key-value heads concatenated",
    "attn.v": "value projection, key-value heads concatenated",
    "mixer.output": "what mixes tokens adds to the residual stream: attention, state space, convolution",
    "mlp.input": "input of the MLP, after its norm",
    "mlp.neurons": "input of the down projection, one number per neuron",
    "mlp.output": "what the MLP adds to the residual stream (after a post-norm where the family has one)",
}
MODEL_PARTS = {
    "embed": "residual stream entering the first block: token embedding with its scale and learned positions",
    "final_norm": "output of the final norm",
    "logits": "output of the unembedding",
}
GRAMMAR = (
    "layers.<n>.<part> | embed | final_norm | logits, of another stack after its name (encoder.layers.<n>.<part>) | "
    "module:<dotted path>:<input|output>; parts: " + ", ".join(LAYER_PARTS)
)

# in the order in which a pass reaches them
_ORDER = (
    "input",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.z",
    "attn.output",
    "mixer.output",
    "mlp.input",
    "mlp.neurons",
    "mlp.output",
    "output",
)

_STACK = r"(?:([A-Za-z_]\w*(?:\.\w+)*?)\.)?"
_LAYER = re.compile(_STACK + r"layers\.(-?\d+)\.(.+)")
_PATTERN = re.compile(_STACK + r"layers\.(\*|\d+-\d+)\.(.+)")
_MODEL_PART = re.compile(_STACK + "(" + "|".join(MODEL_PARTS) + ")")
_MODULE = re.compile(r"module:(.+):(input|output)")


@dataclass(frozen=True)
class Site:
    """One activation tensor of a model.

    Attributes:
        part: a key of `LAYER_PARTS` or `MODEL_PARTS`; `input` or `output` for a module site.
        layer: index of the block (negative counts from the end), else None.
        module: dotted path of an `nn.Module`, for models that are not decoders.
        stack: name of a stack of blocks (`encoder`, `vision`, a path); None for the one that the tokens of a text go through.

    Example:
        >>> site = steer.Site.parse("layers.12.attn.z")
        >>> site.layer, site.part
        (12, 'attn.z')
    """

    part: str
    layer: int | None = None
    module: str | None = None
    stack: str | None = None

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Reads `layers.12.attn.z`, `final_norm`, `module:encoder.2:output`, ... Raises SiteError with the grammar."""
        if isinstance(text, Site):
            return text
        if not isinstance(text, str):
            number = int(text) if isinstance(text, int) else 12
            raise SiteError(
                f"a site cannot be of type {type(text).__name__}",
                expected=GRAMMAR,
                found=repr(text),
                remedy=f"say as text which tensor of which layer is meant, e.g. 'layers.{number}.output'",
            )
        if match := _MODEL_PART.fullmatch(text):
            return cls(match[2], stack=match[1])
        if (match := _LAYER.fullmatch(text)) and match[3] in LAYER_PARTS:
            return cls(match[3], layer=int(match[2]), stack=match[1])
        if match := _MODULE.fullmatch(text):
            return cls(match[2], module=match[1])
        remedy = site_hint(text, LAYER_PARTS, MODEL_PARTS) or "write it in one of these forms, e.g. 'layers.0.output'"
        raise SiteError(f"unknown site '{text}'", expected=GRAMMAR, found=text, remedy=remedy)

    @property
    def order(self) -> tuple[int, int]:
        """Sorts the sites of a decoder as a forward pass reaches them. The layer must be counted from the start."""
        if self.layer is not None:
            return self.layer, _ORDER.index(self.part)
        return (-1, 0) if self.part == "embed" else (2**31, list(MODEL_PARTS).index(self.part))

    def __repr__(self) -> str:
        return f"Site('{self}')"

    def __str__(self) -> str:
        if self.module is not None:
            return f"module:{self.module}:{self.part}"
        prefix = "" if self.stack is None else f"{self.stack}."
        return prefix + (self.part if self.layer is None else f"layers.{self.layer}.{self.part}")


def stack_of(text: str | Site) -> str | None:
    """The stack that a site or a pattern names."""
    if isinstance(text, str) and (match := _PATTERN.fullmatch(text)):
        return match[1]
    return Site.parse(text).stack


def is_pattern(text: str | Site) -> bool:
    """True for text that stands for several layers."""
    return isinstance(text, str) and _PATTERN.fullmatch(text) is not None


def expand(pattern: str | Site, n_layers: int) -> list[Site]:
    """Sites of `layers.*.output` or `layers.4-9.mlp.output` (both ends included); a plain site gives itself."""
    if isinstance(pattern, str) and (match := _PATTERN.fullmatch(pattern)):
        prefix = "" if match[1] is None else f"{match[1]}."
        first, last = (0, n_layers - 1) if match[2] == "*" else map(int, match[2].split("-"))
        if not first <= last < n_layers:
            raise SiteError(
                f"layer range of '{pattern}' is empty or outside the model",
                expected=f"a range within 0 to {n_layers - 1}, the smaller number first",
                found=match[2],
                remedy=f"layers are numbered from 0, and both ends count; '{prefix}layers.0-{n_layers - 1}.{match[3]}' means all",
            )
        return [Site.parse(f"{prefix}layers.{layer}.{match[3]}") for layer in range(first, last + 1)]
    return [Site.parse(pattern)]
