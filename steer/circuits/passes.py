"""Passes of a feature circuit: prompts run through the model while something is done with the activations at its split sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from steer.circuits.linear import linear_hooks
from steer.circuits.split_site import SplitSite
from steer.circuits.text_passes import TextPasses
from steer.circuits.texts import Batch, Texts
from steer.model import hooks
from steer.model.anatomy import Anatomy
from steer.model.context import ForwardContext
from steer.model.site import Site

# (split site, x that its dictionary reads, y of the site that it writes, batch) -> the activation that takes the place of y
Act = Callable[[SplitSite, Tensor, Tensor, Batch], Tensor]
ENTRIES = 2**25  # features of all tokens of a batch, at most


class Passes(TextPasses):
    """Runs prompts in batches and lets a function act at each split site.

    Args:
        splits: in the order of a pass.
        linear: gradients take attention patterns and the denominators of norms as constants.
        max_tokens: padded tokens of a batch; fewer where dictionaries are wide.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, splits: Sequence[SplitSite], texts: Texts, *, linear: bool, max_tokens: int
    ) -> None:
        widest = max(1, *(split.width for split in splits))
        super().__init__(model, anatomy, texts, max_tokens=max(1, min(max_tokens, ENTRIES // widest)))
        self.splits, self.linear = list(splits), linear

    def run(self, prompts: Sequence[int], act: Act, *, gradients: bool) -> tuple[Batch, Tensor | None]:
        """One batch: [rows, tokens, vocabulary] logits; None where `act` raised StoppedPass."""
        batch = self.batch(prompts)
        sites, functions = self._hooks(batch, act)
        linear = linear_hooks(self.anatomy, active=self.linear and gradients)
        return batch, self.run_batch(batch, dict(zip(sites, functions, strict=True)), gradients=gradients, inside=linear)

    def _hooks(self, batch: Batch, act: Act) -> tuple[list[Site], list[hooks.HookFunction]]:
        written = {split.writes: split for split in self.splits}
        sites = sorted({*written, *(split.reads for split in self.splits)}, key=lambda site: site.order)
        read: dict[Site, Tensor] = {}

        def function(site: Site) -> hooks.HookFunction:
            def hook(h: Tensor, ctx: ForwardContext) -> Tensor | None:
                new = h
                if site in written:
                    split = written[site]
                    new = act(split, h if split.reads == site else read[split.reads].to(h.device), h, batch)
                read[site] = new
                return None if new is h else new.to(h.dtype)

            return hook

        return sites, [function(site) for site in sites]
