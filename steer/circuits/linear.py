"""Linear gradients: attention patterns and the denominators of norms are constants of the pass (Ameisen et al. 2025, circuit tracing).

With them the residual stream is a linear function of what is written to it, up to MLPs that no transcoder stands for. No value of the
pass changes, only what gradients flow through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import AnatomyError
from steer.model import hooks
from steer.model.anatomy import Anatomy
from steer.model.hook_registration import BEFORE_EDITS, OwnHook, register_hook, unregister_hook
from steer.model.restoring import restoring, restoring_all

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest entry, by dtype of the model; many norms compute in fp32
COARSE = 0.05  # for halves
EPSILONS = (1e-5, 1e-6)  # tried for a norm that does not say its own


@contextmanager
def linear_hooks(anatomy: Anatomy, *, active: bool) -> Iterator[None]:
    """Passes within have linear gradients. Raises SiteError where queries or keys are not known, AnatomyError for an unknown norm."""
    if not active:
        yield
        return
    sites = anatomy.sites("layers.*.attn.q", "layers.*.attn.k")
    points = [(anatomy.point(site), lambda h, ctx: h.detach()) for site in sites]
    installation = hooks.Installation(anatomy.model, anatomy, points)
    with restoring_all() as stack:
        stack.enter_context(restoring(installation.remove))
        installation.install()
        stack.enter_context(constant_denominators(norms_of(anatomy)))
        yield


@contextmanager
def constant_denominators(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Passes within have gradients that leave the denominators of these norms alone. Raises AnatomyError in one of an unknown norm."""
    with restoring_all() as stack:
        for module in norms:
            hook = _ConstantDenominator()
            stack.enter_context(restoring(partial(unregister_hook, module, hook)))
            register_hook(module, hook, before=False)
        yield


def norms_of(anatomy: Anatomy) -> list[nn.Module]:
    """Norms of the residual stream: those in blocks with a gain of its width, or with none, and the final one."""
    found = [
        module
        for block in anatomy.blocks
        for module in block.modules()
        if "norm" in type(module).__name__.lower() and _gain_shape(module) in ((anatomy.width,), None)
    ]
    return found + ([] if anatomy.final_norm is None else [anatomy.final_norm])


def all_norms_of(anatomy: Anatomy) -> list[nn.Module]:
    """Those of the residual stream, of queries and of keys."""
    found = [module for block in anatomy.blocks for module in block.modules() if "norm" in type(module).__name__.lower()]
    return found + ([] if anatomy.final_norm is None else [anatomy.final_norm])


def _gain_shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = getattr(module, "weight", None)
    return None if weight is None else tuple(weight.shape)


@dataclass(frozen=True, eq=False)
class NormFormula:
    """gain * x / sqrt(mean(x^2) + eps), or the same of x without its mean, plus a bias.

    Attributes:
        gain: [width]. bias: [width] or None. centred: the mean is taken off, as a layer norm does.
    """

    gain: Tensor
    bias: Tensor | None
    eps: float
    centred: bool

    def numerator(self, x: Tensor) -> Tensor:
        """The part that is linear in x."""
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain

    def denominator(self, x: Tensor) -> Tensor:
        """[..., 1], positive."""
        return ((x.var(-1, keepdim=True, correction=0) if self.centred else x.square().mean(-1, keepdim=True)) + self.eps).sqrt()

    def jvp(self, x: Tensor, change: Tensor, *, constant_denominator: bool = False) -> Tensor:
        """[..., width] change of what the norm gives, to first order, when x changes."""
        by_numerator = self.numerator(change)
        if not constant_denominator:
            by_numerator = by_numerator - self._unit(x) * self._along(x, change) * self.gain
        return by_numerator / self.denominator(x)

    def vjp_(self, x: Tensor, gradient: Tensor, *, constant_denominator: bool = False) -> Tensor:
        """Turns the gradient by what the norm gives, [..., width], into that by x, in place."""
        gradient *= self.gain / self.denominator(x)
        if self.centred:
            gradient -= gradient.mean(-1, keepdim=True)
        if not constant_denominator:
            unit = self._unit(x)
            along = torch.linalg.vecdot(gradient, unit.expand_as(gradient)) / x.shape[-1]
            gradient.addcmul_(unit, along.unsqueeze(-1), value=-1)
        return gradient

    def _unit(self, x: Tensor) -> Tensor:
        """[..., width] x, without its mean where that is taken off, over the denominator: its mean square is 1."""
        return (x - x.mean(-1, keepdim=True) if self.centred else x) / self.denominator(x)

    def _along(self, x: Tensor, other: Tensor) -> Tensor:
        """[..., 1] mean product with `_unit`, of which changes of the denominator consist."""
        return (self._unit(x) * other).mean(-1, keepdim=True)

    def with_constant_denominator(self, x: Tensor) -> Tensor:
        """What the norm gives, with a gradient that leaves its denominator alone."""
        normed = self.numerator(x) / self.denominator(x.detach())
        return normed if self.bias is None else normed + self.bias


def norm_formula(module: nn.Module, x: Tensor, y: Tensor) -> NormFormula:
    """The formula that a norm agrees with. Raises AnatomyError where it is none of those known.

    Args:
        x, y: what the norm took and gave.
    """
    weight, bias = (None if (part := getattr(module, name, None)) is None else part.detach().float() for name in ("weight", "bias"))
    # Gemma keeps the gain less 1, OLMo has none
    gains = [torch.ones(x.shape[-1], device=x.device)] if weight is None else [weight, 1 + weight]
    named = next((float(getattr(module, name)) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)), None)
    limit = TOLERANCE.get(y.dtype, COARSE) * float(y.detach().abs().max())
    for eps in EPSILONS if named is None else (named,):
        for centred in (False, True):
            for gain in gains:
                formula = NormFormula(gain, bias, eps, centred)
                if float((formula.with_constant_denominator(x.detach().float()) - y.detach()).abs().max()) <= limit:
                    return formula
    raise _unknown_norm(module)


class _ConstantDenominator(OwnHook):
    """On a norm, before what reads or edits its output: gradients go through this formula, and to what was put in the output's place."""

    at_site = True
    order = BEFORE_EDITS

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        made = norm_formula(module, args[0], output).with_constant_denominator(args[0].float()).to(output.dtype)
        return output.detach() + (made - made.detach())


# ---- errors


def _unknown_norm(module: nn.Module) -> AnatomyError:
    return AnatomyError(
        f"the formula of the norm {type(module).__name__} is not known, so that its denominator cannot be taken as a constant",
        expected="gain * x / sqrt(mean(x^2) + eps), or a layer norm; the gain being the weight, or one more than it",
        found=f"another function; {module}",
        remedy="attribute with gradient='plain' or rule='plain', which follow the model as it is",
    )
