"""Attention of a model with another derivative: its own function gives the values, a written-out one the gradients.

Only the name of the attention function in the configs of this one model changes, and is put back on every way out. That the written-out
function is the one of the model is proven in each pass: it has to give the same values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steer.circuits.linear import COARSE
from steer.errors import AnatomyError
from steer.model.anatomy import Anatomy
from steer.model.restoring import replaced, restoring, restoring_all

NAME = "steer_backward_rule"
SETTING = "_attn_implementation_internal"  # of a config, under the property that sets those of its parts too
TOLERANCE = 1e-5  # of the largest entry, in fp32
ADDITIVE_MASK = ("eager", "sdpa")  # functions that take a mask that is added to the scores
OTHER_MASK = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")  # the same function of q, k and v


@dataclass(frozen=True, eq=False)
class Attended:
    """What an attention function is called with.

    Attributes:
        query: [rows, heads, tokens, head_dim]. key, value: [rows, groups, tokens, head_dim].
        mask: added to [rows, heads, tokens, tokens] scores, None for none.
        softcap: scores are softcap * tanh(scores / softcap), None for scores as they are.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[rows, heads, tokens, tokens] before softmax."""
        scores = query @ self._for_heads(key).transpose(2, 3) * self.scale
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        return scores if self.mask is None else scores + self.mask[..., : scores.shape[-1]]

    def mixed(self, pattern: Tensor, value: Tensor) -> Tensor:
        """[rows, heads, tokens, head_dim]. pattern: [rows, heads, tokens, tokens]."""
        return pattern.to(value.dtype) @ self._for_heads(value)

    def _for_heads(self, h: Tensor) -> Tensor:
        return h.repeat_interleave(self.query.shape[1] // h.shape[1], 1)


@dataclass(eq=False)
class _Replacement:
    """What attention modules of one model do for a while."""

    function: Callable[[Attended], Tensor]
    original: str
    reached: set[nn.Module] = field(default_factory=set)


_REPLACEMENTS: dict[nn.Module, _Replacement] = {}  # by attention module, those of models in a pass under a rule


@contextmanager
def attention_as(anatomy: Anatomy, function: Callable[[Attended], Tensor]) -> Iterator[None]:
    """Passes within have gradients of `function` through attention.

    Raises:
        AnatomyError: attention that transformers' table of attention functions does not lead to, or that is another function.
    """
    configs = {id(config): config for part in anatomy.decoder.modules() if hasattr(config := getattr(part, "config", None), SETTING)}
    modules = [_attention_module(anatomy, layer) for layer in range(anatomy.n_layers)]
    AttentionInterface.register(NAME, _replaced_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    with restoring_all() as stack:
        replacements = []
        for part in {part for module in modules for part in module.modules()}:  # a wrapper may stand around the one that attends
            replacements.append(_Replacement(function, getattr(getattr(part, "config", None), SETTING, None) or "eager"))
            stack.enter_context(restoring(partial(_forget, part)))
            _REPLACEMENTS[part] = replacements[-1]
        for config in configs.values():
            stack.enter_context(replaced(config, SETTING, NAME))
        yield
        reached = {part for replacement in replacements for part in replacement.reached}
        for layer, module in enumerate(modules):
            if reached.isdisjoint(module.modules()):
                raise _not_reached(anatomy, layer, module)


def _forget(part: nn.Module) -> None:
    _REPLACEMENTS.pop(part, None)


def _attention_module(anatomy: Anatomy, layer: int) -> nn.Module:
    return anatomy.module_in_block(layer, anatomy.writer(layer, "attn").part)


def _replaced_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """[rows, tokens, heads, head_dim] what the model's function gives, with the gradient of the one that stands for it."""
    if module not in _REPLACEMENTS:
        raise _not_known(module)
    replacement = _REPLACEMENTS[module]
    replacement.reached.add(module)
    original = _function_of(module, replacement.original)
    with torch.no_grad():
        output, weights = original(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = Attended(query, key, value, attention_mask, scale, kwargs.get("softcap"))
    made = replacement.function(attended).transpose(1, 2)
    limit = TOLERANCE if output.dtype in (torch.float32, torch.float64) else COARSE
    if made.shape != output.shape or not bool((made - output).abs().max() <= limit * output.abs().max()):
        raise _another_function(module, made, output)
    return output + (made - made.detach()).to(output.dtype), weights


def _function_of(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function of a model; the one written out in its file where its own takes no mask that is added."""
    written_out = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if name not in (*ADDITIVE_MASK, *OTHER_MASK):
        raise _unknown_function(module, name)
    if name in OTHER_MASK:
        name = "eager"
    if name == "eager" and written_out is None:
        raise _no_function(module)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, written_out)


# ---- errors


def _refused(what: str, expected: str, found: str) -> AnatomyError:
    return AnatomyError(what, expected=expected, found=found, remedy="attribute with rule='plain', or rule='relp', which needs no scores")


def _not_reached(anatomy: Anatomy, layer: int, module: nn.Module) -> AnatomyError:
    return _refused(
        f"attention in block {layer} of this {anatomy.kind} cannot be given another derivative",
        "a module that takes its attention function from the table of transformers",
        f"{type(module).__name__}, which does not",
    )


def _not_known(module: nn.Module) -> AnatomyError:
    return _refused(
        "attention runs outside the blocks of the model under a backward rule", "attention of the blocks", type(module).__name__
    )


def _unknown_function(module: nn.Module, name: str) -> AnatomyError:
    return _refused(
        f"the attention function '{name}' of {type(module).__name__} is not known", f"one of {[*ADDITIVE_MASK, *OTHER_MASK]}", name
    )


def _no_function(module: nn.Module) -> AnatomyError:
    return _refused(
        f"the attention of {type(module).__name__} is not written out", "eager_attention_forward in the file of the model", "none"
    )


def _another_function(module: nn.Module, made: Tensor, output: Tensor) -> AnatomyError:
    difference = float((made - output).detach().abs().max()) if made.shape == output.shape else f"shape {list(made.shape)}"
    return _refused(
        f"the attention of {type(module).__name__} is another function of queries, keys and values",
        f"softmax(scores) of values, {list(output.shape)}, to {TOLERANCE:g} of the largest entry",
        f"a difference of {difference}",
    )
