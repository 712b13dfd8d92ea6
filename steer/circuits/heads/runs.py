"""Passes over batches of texts with functions at sites, which keep activations or put others in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from steer.circuits.targets import Target, checked_value
from steer.circuits.texts import Batch, Prompts, Texts, rows_of
from steer.errors import AnatomyError, ConfigError
from steer.model import hooks
from steer.model.anatomy import Anatomy
from steer.model.capture import batches_of, evaluating
from steer.model.context import ForwardContext
from steer.model.hook_registration import AFTER_EDITS
from steer.model.own_calls import needs_equal_lengths, texts_call
from steer.model.restoring import restoring
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


def run_batch(model: nn.Module, anatomy: Anatomy, functions: Mapping[Site, hooks.HookFunction], batch: Batch) -> Any:
    """What the model gives for a batch; None where a function ended the pass. The model is left as it was."""
    installation = hooks.Installation(model, anatomy, [(anatomy.point(site), function) for site, function in functions.items()])
    output = None
    with restoring(installation.remove), evaluating(model):
        installation.install()
        with torch.compiler.set_stance("force_eager"), suppress(StoppedPass):
            output = texts_call(model, anatomy)(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    return output


def texts_of(model: nn.Module, prompts: Prompts, tokenizer: Any = None) -> Texts:
    """Texts, rows or a padded batch as texts for passes. Raises ConfigError for none, and for an empty one."""
    rows = rows_of(model, prompts, tokenizer)
    if empty := [number for number, row in enumerate(rows) if not row.ids]:
        raise _empty_text(empty[0])
    return Texts(rows)


def text_batches(anatomy: Anatomy, lengths: Sequence[int], numbers: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Splits some texts into batches of similar length, of the same where the model knows no padding. lengths: of all texts."""
    for places in batches_of([lengths[i] for i in numbers], max_tokens):
        chosen = [numbers[place] for place in places]
        if needs_equal_lengths(anatomy):
            yield from ([i for i in chosen if lengths[i] == length] for length in sorted({lengths[i] for i in chosen}))
        else:
            yield chosen


def target_values(anatomy: Anatomy, target: Target, batch: Batch, output: Any) -> Tensor:
    """[rows] fp64 of a target, each made of the logits [tokens of the text, vocabulary] of one text."""
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple | list) else output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise _no_logits(anatomy, output)
    prompts = enumerate(batch.prompts.tolist())
    return torch.stack([checked_value(target(batch.of(row, logits).float(), prompt), prompt) for row, prompt in prompts]).double().cpu()


# ---- errors


def _empty_text(number: int) -> ConfigError:
    return ConfigError(f"text {number} has no tokens", expected="at least one in every text", found="none", remedy="leave it out")


def _no_logits(anatomy: Anatomy, output: object) -> AnatomyError:
    return AnatomyError(
        f"this {anatomy.kind} gives no logits, of which a target is a function",
        expected="[batch, tokens, vocabulary]",
        found=type(output).__name__,
        remedy="load the model with its language-model head, e.g. AutoModelForCausalLM",
    )
