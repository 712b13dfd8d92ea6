"""A prefix before every text of a padded batch, whichever side it is padded at, and the model's logits behind it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import ConfigError, ContextError


@dataclass(frozen=True)
class Prefix:
    """Tokens that are put before texts.

    Attributes:
        ids: the prefix, at least one token.
        leading: what the tokenizer itself puts before every text (a start token); the prefix comes behind it.
    """

    ids: tuple[int, ...]
    leading: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> Prefix:
        """Tokenises a prefix. Raises ConfigError where it has no tokens."""
        bare = tuple(tokenizer(text, add_special_tokens=False).input_ids)
        marked = tuple(tokenizer(text).input_ids)
        if not bare or not text.strip():
            raise _no_prefix(text)
        starts = [i for i in range(len(marked)) if marked[i : i + len(bare)] == bare]
        return cls(bare, marked[: starts[0]] if starts else ())

    def insert(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The batch with the prefix in it.

        Args:
            ids, mask: [batch, tokens], padded at one side or at both.

        Returns:
            ids and mask, [batch, prefix + tokens]; and starts, [batch], the first token of each row that is predicted behind the prefix.
            Token t of a row is token prefix + t now, from `starts` on.
        """
        n = len(self.ids)
        first = mask.argmax(1)  # [batch], number of pads at the left
        places = torch.arange(ids.shape[1], device=ids.device)
        behind = first.clone()
        if self.leading:
            leading = torch.tensor(self.leading, device=ids.device)
            reach = (first[:, None] + torch.arange(len(leading), device=ids.device)).clamp(max=ids.shape[1] - 1)
            behind += len(leading) * (ids.gather(1, reach) == leading).all(1)  # a text that was cut has no start token
        target = places + n * (places >= behind[:, None])  # [batch, tokens], where each token goes
        hole = behind[:, None] + torch.arange(n, device=ids.device)  # [batch, prefix]
        longer = (ids.shape[0], ids.shape[1] + n)
        prefix = torch.tensor(self.ids, device=ids.device, dtype=ids.dtype).expand(len(ids), n)
        new_ids = torch.zeros(longer, dtype=ids.dtype, device=ids.device).scatter(1, target, ids).scatter(1, hole, prefix)
        new_mask = torch.zeros(longer, dtype=torch.long, device=ids.device).scatter(1, target, mask.long()).scatter(1, hole, 1)
        return new_ids, new_mask, torch.where(behind > first, behind - 1, first)


def checked_mask(ids: Tensor, mask: Tensor | None) -> Tensor:
    """The attention mask of a batch, all ones when None. Raises ContextError for one that is no [batch, tokens], or has holes."""
    if mask is None:
        return torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise _no_mask(mask, ids)
    mask = mask.to(ids.device).long()
    ends = mask.flip(1).argmax(1)
    if not bool(mask.any(1).all()) or bool((mask.sum(1) != mask.shape[1] - mask.argmax(1) - ends).any()):
        raise _hole(mask)
    return mask


def places_of(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """`position_ids` [batch, tokens] that count each row's own tokens, for models that take them. mask: [batch, tokens]."""
    base = getattr(model, "get_base_model", lambda: getattr(model, "module", model))()  # PEFT's forward hides what it takes, DDP's too
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


# ---- errors


def _no_prefix(text: str) -> ConfigError:
    return ConfigError(
        "self_debias has no prefix",
        expected="text that describes the bias, of at least one token",
        found=repr(text),
        remedy="say what the model should be kept from, e.g. 'The following text is insulting:\\n'",
    )


def _no_mask(mask: Tensor, ids: Tensor) -> ContextError:
    return ContextError(
        "an attention mask does not say which tokens are padding",
        expected=f"a mask of the shape of the tokens, {list(ids.shape)}",
        found=list(mask.shape),
        remedy="pass the 2-D mask that the tokenizer gives",
    )


def _hole(mask: Tensor) -> ContextError:
    return ContextError(
        "an attention mask hides tokens inside a text, or a whole text",
        expected="one run of ones in each row",
        found=next(row.tolist() for row in mask if not row.any() or "01" in "".join(map(str, row.tolist())).strip("0")),
        remedy="pass texts of a batch in rows of their own, padded at one side",
    )
