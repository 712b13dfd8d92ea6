"""Logits of texts that begin alike: what they have in common is read once, where that gives what whole passes give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steer.bias.mitigation._prefix import places_of
from steer.model.prefix import LEAST_TOKENS, agree, may_share


class CommonStart:
    """Runs batches of which all rows have the same first tokens, without gradients and plans; other batches run whole.

    Args:
        own: the hook on the model that asks for the logits, which does not mind.
    """

    def __init__(self, own: Any) -> None:
        self.own = own
        self._agrees: bool | None = None  # what the first batch showed

    def logits(self, model: nn.Module, ids: Tensor, mask: Tensor, kept: int) -> Tensor:
        """[batch, kept, vocabulary] at the last tokens of each row. ids, mask: [batch, tokens]."""
        common = self._common(model, ids, mask)
        if common < LEAST_TOKENS or self._agrees is False:
            return self._whole(model, ids, mask, kept)
        found = self._shared(model, ids, mask, kept, common)
        if self._agrees is None:
            whole = self._whole(model, ids, mask, kept)
            is_text = mask[:, -kept:].bool()  # at padding a model says anything
            self._agrees = found is not None and agree(whole[is_text], found[is_text])
            return whole
        return self._whole(model, ids, mask, kept) if found is None else found

    def _common(self, model: nn.Module, ids: Tensor, mask: Tensor) -> int:
        """How many tokens to read once: those that all rows begin with, but for the last one; 0 where something looks at whole passes."""
        if len(ids) == 1 or torch.is_grad_enabled() or not may_share(model, self.own):
            return 0
        alike = ((ids == ids[:1]) & mask.bool()).all(0)  # [tokens]
        return min(int(alike.long().cumprod(0).sum()), ids.shape[1] - 1)

    def _shared(self, model: nn.Module, ids: Tensor, mask: Tensor, kept: int, common: int) -> Tensor | None:
        """None where the model has no KV cache of rows that can be repeated."""
        places = places_of(model, mask)
        first = {name: of_all[:1, :common] for name, of_all in places.items()}
        read = model(input_ids=ids[:1, :common], attention_mask=mask[:1, :common], use_cache=True, **first)
        cache: Any = getattr(read, "past_key_values", None)
        if not hasattr(cache, "batch_repeat_interleave"):
            return None
        cache.batch_repeat_interleave(len(ids))
        rest = {name: of_all[:, common:] for name, of_all in places.items()}
        behind = model(input_ids=ids[:, common:], attention_mask=mask, past_key_values=cache, use_cache=True, **rest).logits
        before = read.logits[:, ids.shape[1] - kept :].expand(len(ids), -1, -1)  # [batch, kept tokens that all have, vocabulary]
        return torch.cat([before, behind], 1)[:, -kept:]

    def _whole(self, model: nn.Module, ids: Tensor, mask: Tensor, kept: int) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **places_of(model, mask)).logits[:, -kept:]
