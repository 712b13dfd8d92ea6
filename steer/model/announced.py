"""What a caller says of the tokens of the passes to come: which are the response, and whose turn each belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import tensor_of
from steer.errors import ConfigError, NonFiniteError
from steer.model.context import CHAT_ROLES


@dataclass(frozen=True, eq=False)
class Announcement:
    """For a model or a wrapper around it. name: attribute of the watcher that it is for."""

    model: nn.Module
    name: str
    value: Tensor


IN_FORCE: list[Announcement] = []  # the innermost last; kept here because an attach inside the block makes its watcher later


def latest(root: nn.Module, name: str) -> Tensor | None:
    """What holds for a decoder."""
    return next((one.value for one in reversed(IN_FORCE) if one.name == name and any(root is m for m in one.model.modules())), None)


def mask_of(given: Any) -> Tensor:
    """Bool, True on response tokens, of a mask or labels. Raises ConfigError, NonFiniteError."""
    remedy = "pass [batch, tokens] of True on response tokens, or labels"
    mask = tensor_of(given, "the response mask", remedy)
    if not mask.is_floating_point():
        return mask != -100 if bool((mask < 0).any()) else mask.bool()
    if not bool(torch.isfinite(mask).all()):
        found = f"{int((~torch.isfinite(mask)).sum())} of {mask.numel()} are not"
        raise NonFiniteError("the response mask is not finite", expected="finite numbers", found=found, remedy=remedy)
    return mask.bool()


def roles_of(given: Any) -> Tensor:
    """Indices into `CHAT_ROLES`. Raises ConfigError for others."""
    remedy = "pass [batch, tokens] indices, as steer.model.tokens.encode_chat gives them; padding may have any of them"
    roles = tensor_of(given, "the chat roles", remedy)
    if not bool(torch.isin(roles, torch.arange(len(CHAT_ROLES), device=roles.device)).all()):
        raise ConfigError(
            "unknown chat roles",
            expected=", ".join(f"{index} for {role}" for index, role in enumerate(CHAT_ROLES)),
            found=roles.unique().tolist()[:8],
            remedy=remedy,
        )
    return roles
