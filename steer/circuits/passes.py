"""Passes of a circuit: prompts run through the model while something is done with the activations at its places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from steer.circuits.linear import linear_hooks
from steer.circuits.places import Place
from steer.circuits.targets import Target, checked_value
from steer.circuits.texts import Batch, Texts
from steer.errors import AnatomyError
from steer.model import hooks
from steer.model.anatomy import Anatomy
from steer.model.capture import batches_of, check_vocabulary, evaluating
from steer.model.context import ForwardContext
from steer.model.devices import input_device
from steer.model.own_calls import needs_equal_lengths, texts_call
from steer.model.restoring import restoring
from steer.model.resume import StoppedPass
from steer.model.site import Site

# (place, x that its dictionary reads, y of the site that it writes, batch) -> the activation that takes the place of y
Act = Callable[[Place, Tensor, Tensor, Batch], Tensor]
ENTRIES = 2**25  # features of all tokens of a batch, at most


class Passes:
    """Runs prompts in batches.

    Args:
        places: in the order of a pass.
        linear: gradients take attention patterns and the denominators of norms as constants.
        max_tokens: padded tokens of a batch; fewer where dictionaries are wide.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, places: Sequence[Place], texts: Texts, *, linear: bool, max_tokens: int) -> None:
        check_vocabulary(anatomy, texts.rows)
        self.model, self.anatomy, self.places, self.texts, self.linear = model, anatomy, list(places), texts, linear
        self.max_tokens = max(1, min(max_tokens, ENTRIES // max(1, *(place.width for place in places))))

    def batches(self, prompts: Sequence[int]) -> Iterator[list[int]]:
        """Splits prompts, which may be named more than once. Yields places in that list."""
        lengths = [self.texts.lengths[i] for i in prompts]
        for chosen in batches_of(lengths, self.max_tokens):
            if needs_equal_lengths(self.anatomy):
                yield from ([i for i in chosen if lengths[i] == length] for length in sorted({lengths[i] for i in chosen}))
            else:
                yield chosen

    def run(self, prompts: Sequence[int], act: Act, *, gradients: bool) -> tuple[Batch, Tensor | None]:
        """One batch: [rows, tokens, vocabulary] logits; None where `act` raised StoppedPass."""
        batch = self.texts.batch(prompts, input_device(self.model))
        sites, functions = self._hooks(batch, act)
        points = [(self.anatomy.point(site), function) for site, function in zip(sites, functions, strict=True)]
        installation = hooks.Installation(self.model, self.anatomy, points)
        output = None
        with restoring(installation.remove), evaluating(self.model), torch.set_grad_enabled(gradients):
            installation.install()
            with (
                torch.compiler.set_stance("force_eager"),
                linear_hooks(self.anatomy, active=self.linear and gradients),
                suppress(StoppedPass),
            ):
                output = texts_call(self.model, self.anatomy)(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        return batch, None if output is None else self._logits(output)

    def _hooks(self, batch: Batch, act: Act) -> tuple[list[Site], list[hooks.HookFunction]]:
        written = {place.writes: place for place in self.places}
        sites = sorted({*written, *(place.reads for place in self.places)}, key=lambda site: site.order)
        read: dict[Site, Tensor] = {}

        def function(site: Site) -> hooks.HookFunction:
            def hook(h: Tensor, ctx: ForwardContext) -> Tensor | None:
                new = h
                if site in written:
                    place = written[site]
                    new = act(place, h if place.reads == site else read[place.reads].to(h.device), h, batch)
                read[site] = new
                return None if new is h else new.to(h.dtype)

            return hook

        return sites, [function(site) for site in sites]

    def values(self, target: Target, batch: Batch, logits: Tensor) -> Tensor:
        """[rows] of the target."""
        values = [checked_value(target(batch.of(row, logits).float(), prompt), prompt) for row, prompt in enumerate(batch.prompts.tolist())]
        return torch.stack(values)

    def _logits(self, output: Any) -> Tensor:
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple | list) else output)
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            raise _no_logits(self.anatomy, output)
        return logits


# ---- errors


def _no_logits(anatomy: Anatomy, output: object) -> AnatomyError:
    return AnatomyError(
        f"this {anatomy.kind} gives no logits, of which a target is a function",
        expected="[batch, tokens, vocabulary]",
        found=type(output).__name__,
        remedy="load the model with its language-model head, e.g. AutoModelForCausalLM",
    )
