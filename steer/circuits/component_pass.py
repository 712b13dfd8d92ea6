"""What passes over pairs give for the attribution of components: what each writes in both runs, and gradients where each reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steer.circuits.targets import Target
from steer.circuits.text_passes import TextPasses
from steer.circuits.texts import Batch
from steer.errors import ConfigError
from steer.model.site import Site

# (site, activation as it comes) -> the activation that takes its place; None leaves it
Edit = Callable[[Site, Tensor], Tensor | None]
WRITTEN = ("attn.z", "mlp.output")  # parts of a block whose activations are what writers write with
READ = ("attn.q", "attn.k", "attn.v", "mlp.input")
STREAMS = ("input", "attn.output")


@dataclass(eq=False)
class Record:
    """One pass with gradients.

    Attributes:
        values: by site, [rows, tokens, width] activations at what writers write with, and of the streams.
        gradients: by site, of the sum of the target over rows, at what writers write with and readers read.
        target: [rows].
    """

    values: dict[Site, Tensor] = field(default_factory=dict)
    gradients: dict[Site, Tensor] = field(default_factory=dict)
    target: Tensor = field(default_factory=lambda: torch.empty(0))


def written_sites(layers: int, *, neurons: bool = False) -> list[Site]:
    """Where what writers write with is read: the embedding, and of each block z, neurons and the output of its MLP."""
    parts = ("attn.z", *(("mlp.neurons",) if neurons else ()), "mlp.output")
    return [Site("embed"), *(Site(part, layer) for layer in range(layers) for part in parts)]


def values_at(
    passes: TextPasses, batch: Batch, sites: list[Site], look: Callable[[Batch, Tensor], None] | None = None
) -> dict[Site, Tensor]:
    """[rows, tokens, width] activations by site, in a pass without gradients. look: called with the batch and its logits."""
    found: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor, Any], None]:
        return lambda h, ctx: found.__setitem__(site, _kept(site, h))

    logits = passes.run_batch(batch, {site: keep(site) for site in sites}, gradients=False, last_token=look is None)
    if look is not None and logits is not None:
        look(batch, logits)
    return found


def record(
    passes: TextPasses,
    batch: Batch,
    target: Target,
    *,
    values: list[Site],
    gradients: list[Site],
    edit: Edit | None = None,
    rule: AbstractContextManager[Any] | None = None,
) -> Record:
    """One pass with gradients.

    Args:
        values, gradients: sites that are recorded.
        edit: what takes the place of activations, as constants.
        rule: backward rule, entered around the forward pass.
    """
    found, kept = Record(), {}
    wanted = set(gradients)

    def hook(site: Site) -> Callable[[Tensor, Any], Tensor | None]:
        def function(h: Tensor, ctx: Any) -> Tensor | None:
            edited = edit(site, h) if edit is not None else None
            new = h if edited is None else edited.to(h.dtype)
            if site in values:
                found.values[site] = _kept(site, new)
            if site.part == "embed":  # parameters may all be frozen: a gradient begins here
                new = new.detach().requires_grad_()
            elif site in wanted:
                # a tensor of its own on the way to this reader alone: others may read the same one
                new = new.view_as(new) if new.requires_grad else new.detach().requires_grad_()
            if site in wanted:
                kept[site] = new
            return None if new is h else new

        return function

    def backward(logits: Tensor) -> None:
        of_rows = passes.values(target, batch, logits)
        if not of_rows.requires_grad:
            raise constant_target("a value that does not depend on them, or was detached")
        watched = dict(kept)  # a checkpointed block that runs once more in the backward pass has activations of its own
        grads = torch.autograd.grad(of_rows.sum(), list(watched.values()), allow_unused=True)
        found.gradients = {
            site: torch.zeros_like(h) if g is None else g.detach() for (site, h), g in zip(watched.items(), grads, strict=True)
        }
        found.target = of_rows.detach()

    sites = sorted({Site("embed"), *values, *gradients}, key=lambda site: site.order)
    last = bool(getattr(target, "at_last_token", False))
    passes.run_batch(batch, {site: hook(site) for site in sites}, gradients=True, inside=rule, last_token=last, then=backward)
    return found


def _kept(site: Site, h: Tensor) -> Tensor:
    """A value to keep. What lies in the stream is copied, since some models add to it in place (Falcon)."""
    return h.detach() if site.part in ("attn.z", "mlp.neurons") else h.detach().clone()


def differences(clean: Mapping[Site, Tensor], corrupted: Mapping[Site, Tensor], sites: list[Site]) -> dict[Site, Tensor]:
    """[rows, tokens, width] clean less corrupted, in fp32."""
    return {site: clean[site].float() - corrupted[site].float() for site in sites}


# ---- errors


def constant_target(found: str) -> ConfigError:
    return ConfigError(
        "the target of a circuit has no gradient",
        expected="a differentiable function of the logits",
        found=found,
        remedy="use no argmax, item or comparison in it; e.g. LogitDifference(right, wrong)",
    )
