"""Annotations: what a caller says of the tokens of the passes to come: which are the response, and whose turn each belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import tensor_of
from steer.errors import ConfigError, NonFiniteError
from steer.model.context import CHAT_ROLES
from steer.model.restoring import restoring
from steer.model.watcher import watchers_of

_RESPONSE_REMEDY = "pass [batch, tokens] of True on response tokens, or labels"
_ROLES_REMEDY = "pass [batch, tokens] indices, as steer.model.tokens.encode_chat gives them; padding may have any of them"


@contextmanager
def response_tokens(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Says which tokens are the response, where the forward pass is not given labels (DPO, GRPO, a loss of your own).

    Args:
        model: the model, or any wrapper around it; what is attached to it inside the block is told too.
        mask: [batch, tokens] bool or 0/1, or [batch, completion tokens] belonging to the right end; labels with -100 are accepted too.

    Raises:
        ConfigError: no mask. NonFiniteError: NaN or infinity in it.

    Example:
        >>> with steer.response_tokens(model, batch["completion_mask"]):
        ...     logits = model(batch["input_ids"]).logits
    """
    if mask is None:
        yield
        return
    with _annotated(model, "response", _checked_response_mask(mask)):
        yield


@contextmanager
def chat_roles(model: nn.Module, roles: Tensor) -> Iterator[None]:
    """Says whose turn each token belongs to, for scopes such as `role[user]`. Decoded tokens are the assistant's without saying so.

    Args:
        model: the model, or any wrapper around it; what is attached to it inside the block is told too.
        roles: [batch, tokens] indices into `CHAT_ROLES`, as `steer.model.tokens.encode_chat` gives them.

    Raises:
        ConfigError: indices of no role.

    Example:
        >>> from steer.model.tokens import encode_chat
        >>> ids, roles = encode_chat(tokenizer, [{"role": "user", "content": "How are you?"}])
        >>> with steer.chat_roles(model, torch.tensor([roles])):  # [batch, tokens]
        ...     logits = model(torch.tensor([ids])).logits
    """
    with _annotated(model, "turns", _checked_roles(roles)):
        yield


@dataclass(frozen=True, eq=False)
class Annotation:
    """An annotation in force.

    Attributes:
        model: the model, or a wrapper around it.
        kind: `response` or `turns`, the attribute of the watcher that it is for.
        value: [batch, tokens].
    """

    model: nn.Module
    kind: str
    value: Tensor


_IN_FORCE: list[Annotation] = []  # the innermost last; kept here because an attach inside the block makes its watcher later


def annotation_for(root: nn.Module, kind: str, main_root: nn.Module) -> Tensor | None:
    """The innermost annotation of a kind that holds for a stack: one of a module around several is that of the main one."""
    for annotation in reversed(_IN_FORCE):
        modules = set(annotation.model.modules()) if annotation.kind == kind else set()
        if root in modules and (root is main_root or main_root not in modules):
            return annotation.value
    return None


@contextmanager
def _annotated(model: nn.Module, kind: str, value: Tensor) -> Iterator[None]:
    def tell_watcher() -> None:
        for watcher in watchers_of(model):
            setattr(watcher, kind, annotation_for(watcher.root, kind, watcher.main_root))

    def take_back() -> None:
        if annotation in _IN_FORCE:
            _IN_FORCE.remove(annotation)
        tell_watcher()

    annotation = Annotation(model, kind, value)
    with restoring(take_back):
        _IN_FORCE.append(annotation)
        tell_watcher()
        yield


def _checked_response_mask(mask: Any) -> Tensor:
    """[batch, tokens] bool, True on response tokens, of a mask or labels."""
    mask = tensor_of(mask, "the response mask", _RESPONSE_REMEDY)
    if not mask.is_floating_point():
        return mask != -100 if bool((mask < 0).any()) else mask.bool()
    if not bool(torch.isfinite(mask).all()):
        raise _infinite_mask(mask)
    return mask.bool()


def _checked_roles(roles: Any) -> Tensor:
    roles = tensor_of(roles, "the chat roles", _ROLES_REMEDY)
    if not bool(torch.isin(roles, torch.arange(len(CHAT_ROLES), device=roles.device)).all()):
        raise _unknown_roles(roles)
    return roles


def _infinite_mask(mask: Tensor) -> NonFiniteError:
    return NonFiniteError(
        "the response mask is not finite",
        expected="finite numbers",
        found=f"{int((~torch.isfinite(mask)).sum())} of {mask.numel()} are not",
        remedy=_RESPONSE_REMEDY,
    )


def _unknown_roles(roles: Tensor) -> ConfigError:
    return ConfigError(
        "unknown chat roles",
        expected=", ".join(f"{index} for {role}" for index, role in enumerate(CHAT_ROLES)),
        found=roles.unique().tolist()[:8],
        remedy=_ROLES_REMEDY,
    )
