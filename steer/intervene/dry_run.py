"""Dry run of operators and gates on a small random activation, before a hook is installed.

A hook looks at nothing that an operator gives it: that would cost every decoded token. So each class is tried once for each form of its
tensors and settings, and each type and device of a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steer.checks import errors_of
from steer.errors import ConfigError, ContextError
from steer.intervene.gate import SiteGate
from steer.intervene.intervention import Intervention
from steer.intervene.operator import Operator, TensorHolder
from steer.intervene.operator_trial import BATCH, TOKENS, OperatorTrial, another_tensor, check_unwritten, in_words, not_finite
from steer.model.context import ForwardContext
from steer.model.devices import input_device

_COMPUTES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_passed: WeakKeyDictionary[type, set[tuple[Any, ...]]] = WeakKeyDictionary()


def check_own_methods(interventions: Sequence[Intervention], model: nn.Module) -> None:
    """Tries operators and gates as a forward pass of this model would call them.

    Raises:
        ConfigError: one that fails, gives something else than it has to, writes into what it is given, acts at strength 0, or says of
            itself what is not so.
        NonFiniteError: NaN or infinity for finite numbers.
    """
    weights = next((weight for weight in model.parameters() if weight.is_floating_point()), torch.empty(0))
    dtype = weights.dtype if weights.dtype in _COMPUTES else torch.float32
    device = input_device(model) if weights.is_meta else weights.device
    with _undisturbed(device):
        for intervention in interventions:
            strength = max(map(abs, intervention.strength)) or 1.0
            by_row = intervention.slots > 1
            types = {dtype, torch.promote_types(dtype, torch.float32)} if intervention.preserve_norm else {dtype}
            for tried_dtype in sorted(types, key=str):
                check = partial(_check_operator, strength=strength, by_row=by_row)
                _once(intervention.operator, (tried_dtype, by_row), tried_dtype, device, check)
            for gate in intervention.gate.site_gates() if intervention.gate is not None else ():
                if gate.is_tried:
                    _once(gate, (dtype,), dtype, device, _check_gate)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Without gradients, and with the random state as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode(False), torch.no_grad():
        yield


def _once(
    holder: TensorHolder, trial_of: tuple[Any, ...], dtype: torch.dtype, device: torch.device, check: Callable[[Any, Tensor], None]
) -> None:
    """Tries an operator or a gate, unless one of the same class, shapes and settings has passed the same trial on this device."""
    passed = _passed.setdefault(type(holder), set())
    key = (device, *trial_of, *_form(holder))
    if key in passed:
        return
    trial = copy.copy(holder)  # what it notes about itself stays with the copy, and so do its tensors
    trial.tensors = {name: tensor.detach().to(device, copy=True) for name, tensor in holder.tensors.items()}
    # a seed that nobody draws a vector with: an ablated token that lies along its direction would have no norm to keep
    h = torch.randn(BATCH, TOKENS, holder.width, generator=torch.Generator().manual_seed(0x7D21))
    check(trial, h.to(device, dtype))
    passed.add(key)


def _form(holder: TensorHolder) -> tuple[Any, ...]:
    """What tells holders of one class apart, but for the numbers in their tensors."""
    shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in holder.tensors.items())
    settings = [(name, value) for name, value in vars(holder).items() if isinstance(value, str | int | float | None) and name != "number"]
    return (holder.width, shapes, *settings)


def _check_operator(operator: Operator, h: Tensor, strength: float, by_row: bool) -> None:
    OperatorTrial(operator, h, strength, by_row).check()


def _check_gate(gate: SiteGate, h: Tensor) -> None:
    """h: [batch, tokens, width]."""
    if type(gate).margin is SiteGate.margin:
        raise _no_margin(gate)
    for shown in (h, h[:, :1], h[:1], h[:1, :1]):  # a decoded token, and a single row, have dimensions of 1
        _check_margin(gate, shown)


def _check_margin(gate: SiteGate, h: Tensor) -> None:
    what = f"gate '{gate.name}'"
    ctx = _small_pass(h)
    shown = {"h": h.clone(), **vars(ctx), **gate.tensors}
    before = {name: value.clone() for name, value in shown.items() if isinstance(value, Tensor)}
    try:
        with errors_of(what, f"let `margin` take {in_words(h)}"):
            margin: Any = gate.margin(shown["h"], ctx)
    except ContextError:  # of a real pass it may be able to say more
        return
    check_unwritten(what, before, shown)
    is_wide = isinstance(margin, Tensor) and margin.dtype in (torch.float32, torch.float64)
    if not is_wide or margin.shape != h.shape[:-1] or margin.device != h.device:
        words = f"{list(h.shape[:-1])} in fp32 or fp64 on {h.device}, one number for each token"
        raise another_tensor(what, "a margin of each token", words, margin)
    if bool(margin.isnan().any()):
        raise not_finite(what, margin)


def _small_pass(h: Tensor) -> ForwardContext:
    """A training pass of short texts, with everything that a gate may look at. h: [batch, tokens, width]."""
    ids = torch.zeros(h.shape[:-1], dtype=torch.long, device=h.device)
    every = torch.ones_like(ids, dtype=torch.bool)
    batch, tokens = ids.shape
    return ForwardContext(batch, tokens, "train", attention=every, labelled=every.clone(), device=h.device, ids=ids, turns=ids.clone())


def _no_margin(gate: SiteGate) -> ConfigError:
    return ConfigError(
        f"gate '{gate.name}' does not say when it is open",
        expected="a method `margin`, above 0 where it is open",
        found=f"none in {type(gate).__module__}.{type(gate).__qualname__}",
        remedy="write margin(self, h, ctx), which gives [batch, tokens] in fp32",
    )
