"""The activation function and the product of an MLP, as found and proven in a pass: neurons = act(x), or act(x) * other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steer.circuits.linear import COARSE
from steer.errors import AnatomyError
from steer.model import hooks
from steer.model.anatomy import Anatomy
from steer.model.hook_registration import BEFORE_EDITS
from steer.model.restoring import restoring, restoring_all
from steer.model.site import Site

TOLERANCE = 1e-5  # of the largest entry, in fp32
TINY = 1e-6  # an input of the activation function at which its ratio is that at 0


@dataclass(eq=False)
class _Seen:
    """What the modules of one MLP took and gave in the pass that runs.

    Attributes:
        activations: functions without parameters that kept the shape, with what they took and gave. outputs: of all others.
    """

    activations: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def halved_products(anatomy: Anatomy, *, rule: str, constant_ratios: bool = False) -> Iterator[None]:
    """Passes within have gradients that products of gated MLPs share out to their two factors in halves.

    Args:
        rule: name of the backward rule that asks for it.
        constant_ratios: act(x) is x times a constant too.

    Raises:
        AnatomyError: neurons that are neither act(x) nor act(x) * other, of modules of the MLP.
    """
    with restoring_all() as stack:
        points = []
        for layer in range(anatomy.n_layers):
            writer, seen = anatomy.writer(layer, "mlp"), _Seen()
            if writer.projection is None:
                raise _no_neurons(anatomy, layer, rule)
            for module in _modules_of_mlp(anatomy, layer):
                stack.callback(module.register_forward_hook(partial(_keep, seen)).remove)
            points.append((anatomy.point(Site("mlp.neurons", layer)), _Product(anatomy, layer, seen, rule, constant_ratios)))
        installation = hooks.Installation(anatomy.model, anatomy, points)
        stack.enter_context(restoring(installation.remove))
        installation.install()
        yield


def _modules_of_mlp(anatomy: Anatomy, layer: int) -> list[nn.Module]:
    """All within the MLP but its last linear map; those of the block itself where the MLP is no module of its own (OPT)."""
    writer = anatomy.writer(layer, "mlp")
    last = set(anatomy.module_in_block(layer, writer.projection or "").modules())
    if writer.part == writer.projection:
        attention = anatomy.module_in_block(layer, anatomy.writer(layer, "attn").part)
        last |= set(attention.modules())
        around: nn.Module = anatomy.blocks[layer]
    else:
        around = anatomy.module_in_block(layer, writer.part)
    return [module for module in around.modules() if module is not around and module not in last]


def _keep(seen: _Seen, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not isinstance(output, Tensor):
        return
    given = args[0] if args and isinstance(args[0], Tensor) else None
    if given is not None and given.shape == output.shape and next(module.parameters(), None) is None:
        seen.activations.append((module, given, output))
    else:
        seen.outputs.append(output)


class _Product:
    """At the neurons of one block: their value, with the gradient of the rule."""

    order = BEFORE_EDITS  # whoever reads the neurons reads what comes out of it

    def __init__(self, anatomy: Anatomy, layer: int, seen: _Seen, rule: str, constant_ratios: bool) -> None:
        self.anatomy, self.layer, self.seen, self.rule, self.constant_ratios = anatomy, layer, seen, rule, constant_ratios

    def __call__(self, h: Tensor, ctx: Any) -> Tensor | None:
        activations, outputs = self.seen.activations, self.seen.outputs
        self.seen.activations, self.seen.outputs = [], []
        made = self._made(h, activations, outputs)
        return h.detach() + (made - made.detach()).view_as(h)

    def _made(self, h: Tensor, activations: list[tuple[nn.Module, Tensor, Tensor]], outputs: list[Tensor]) -> Tensor:
        """[rows, tokens, neurons] the same values."""
        for module, x, y in activations:
            activation = x * _ratio(module, x, y) if self.constant_ratios else y
            if _same(y, h):
                return activation
            for other in _parts(outputs, h.shape[-1]):
                if other.shape == y.shape and _same(y * other, h):
                    return 0.5 * (activation * other.detach() + y.detach() * other)
        raise _unknown_product(self.anatomy, self.layer, activations, self.rule)


def _parts(outputs: list[Tensor], width: int) -> Iterator[Tensor]:
    """Outputs as wide as the neurons, and halves of those twice as wide (Phi-3)."""
    for output in outputs:
        if output.shape[-1] == width:
            yield output
        elif output.shape[-1] == 2 * width:
            yield from output.chunk(2, -1)


def _ratio(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """act(x) / x, a constant."""
    with torch.no_grad():
        small = x.new_full((1,), TINY, dtype=torch.float32)
        near_0 = (module(small) / TINY).to(x.dtype)
        is_small = x.abs() < TINY
        return torch.where(is_small, near_0, y / x.masked_fill(is_small, 1))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.numel() != b.numel():
        return False
    a, b = a.detach().reshape(-1), b.detach().reshape(-1)
    limit = TOLERANCE if b.dtype in (torch.float32, torch.float64) else COARSE
    return bool((a - b).abs().max() <= limit * b.abs().max())


# ---- errors


def _no_neurons(anatomy: Anatomy, layer: int, rule: str) -> AnatomyError:
    return AnatomyError(
        f"rule '{rule}' needs the product of each MLP, which block {layer} of this {anatomy.kind} does not have as one tensor",
        expected="an MLP that ends in one linear map",
        found="experts",
        remedy="attribute with rule='plain'",
    )


def _unknown_product(anatomy: Anatomy, layer: int, activations: list[tuple[nn.Module, Tensor, Tensor]], rule: str) -> AnatomyError:
    return AnatomyError(
        f"rule '{rule}': what the neurons in block {layer} of this {anatomy.kind} are a product of is not known",
        expected="act(x), or act(x) * other, of outputs of the modules of the MLP",
        found=f"activation functions {[type(module).__name__ for module, _, _ in activations]}, none of which gives the neurons",
        remedy="attribute with rule='plain'",
    )
