"""Names of hook points in other programs -> sites. A name whose tensor differs between families of models is not guessed."""

from __future__ import annotations

import re

from steer.model.site import Site

# of TransformerLens and its bridge; what comes after `blocks.<layer>.`
_TRANSFORMER_LENS = {
    "hook_resid_pre": "input",
    "hook_in": "input",
    "hook_resid_post": "output",
    "hook_out": "output",
    "hook_attn_out": "attn.output",
    "attn.hook_z": "attn.z",
    "mlp.hook_in": "mlp.input",
    "mlp.hook_post": "mlp.neurons",
    "hook_mlp_out": "mlp.output",
}
# of transformers, in the Gemma family; what comes after `model.layers.<layer>.`
_GEMMA = {
    "input": "input",
    "output": "output",
    "self_attn.o_proj.input": "attn.z",
    "post_attention_layernorm.output": "attn.output",
    "pre_feedforward_layernorm.output": "mlp.input",
    "post_feedforward_layernorm.output": "mlp.output",
}
WITHOUT_GAIN = re.compile(r"blocks\.(\d+)\.ln2\.hook_normalized")  # the input of the MLP before the gain of its norm


def of_transformer_lens(hook: str) -> str | None:
    """The site of a hook of TransformerLens; None where a name alone does not say which tensor of the plain model it is.

    `hook_resid_mid` is no site of its own, `hook_embed` lacks what some models add to it, and `hook_mlp_in` and `mlp.hook_out` lie before
    or after a norm, as the model has one.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    part = None if match is None else _TRANSFORMER_LENS.get(match[2])
    return None if match is None or part is None else f"layers.{match[1]}.{part}"


def to_transformer_lens(site: Site) -> str | None:
    """The hook of TransformerLens at a site; None where it has none."""
    names = {part: hook for hook, part in reversed(_TRANSFORMER_LENS.items())}  # the older of two names
    if site.layer is None or site.layer < 0 or site.stack is not None or site.part not in names:
        return None
    return f"blocks.{site.layer}.{names[site.part]}"


def of_gemma(hook: str) -> str | None:
    """The site of a module of a Gemma model, whatever it is wrapped in; a module without a site of its own is named by its path."""
    match = re.fullmatch(r"(?:\w+\.)*?layers\.(\d+)\.(.+)", hook)
    if match is not None and match[2] in _GEMMA:
        return f"layers.{match[1]}.{_GEMMA[match[2]]}"
    module = re.fullmatch(r"(.+)\.(input|output)", hook)
    return None if module is None else str(Site(module[2], module=module[1]))


def of_sparsify(hook: str, side: str) -> str:
    """The site of a hook point of sparsify, the path of a module below the base model; side: `input` or `output` of it."""
    if match := re.fullmatch(r"(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)", hook):
        return f"layers.{match[1]}.{side}"
    if (match := re.fullmatch(r"(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)\.mlp", hook)) and side == "input":
        return f"layers.{match[1]}.mlp.input"
    return str(Site(side, module=hook))  # an output may go through a norm before it is what the MLP adds
