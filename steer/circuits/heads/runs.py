"""Texts of head passes, and hook functions that keep activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from steer.circuits.texts import Prompts, Texts, rows_of
from steer.errors import ConfigError
from steer.model.context import ForwardContext
from steer.model.hook_registration import AFTER_EDITS
from steer.model.resume import StoppedPass
from steer.model.site import Site


class Keep:
    """Hook function that keeps the activation of a site.

    Args:
        order: AFTER_EDITS for what the model goes on with while plans are attached, BEFORE_EDITS for what it computed.
        stop: the pass ends there.
    """

    def __init__(self, kept: dict[Site, Tensor], site: Site, *, order: int = AFTER_EDITS, stop: bool = False) -> None:
        self.kept, self.site, self.order, self.stop = kept, site, order, stop

    def __call__(self, h: Tensor, ctx: ForwardContext) -> None:
        self.kept[self.site] = h.detach()
        if self.stop:
            raise StoppedPass


def texts_of(model: nn.Module, prompts: Prompts, tokenizer: Any = None) -> Texts:
    """Texts, rows or a padded batch as texts for passes. Raises ConfigError for none, and for an empty one."""
    rows = rows_of(model, prompts, tokenizer)
    if empty := [number for number, row in enumerate(rows) if not row.ids]:
        raise _empty_text(empty[0])
    return Texts(rows)


# ---- errors


def _empty_text(number: int) -> ConfigError:
    return ConfigError(f"text {number} has no tokens", expected="at least one in every text", found="none", remedy="leave it out")
