"""Dry run of operators and gates from outside the package, on a small random activation, before a hook is installed.

A hook looks at nothing that an operator gives it: that would cost every decoded token. So each object is tried once for each type and
device of a model. The package's own classes, which the tests hold to the same rules, are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steer.checks import errors_of
from steer.errors import ConfigError, ContextError, NonFiniteError
from steer.intervene.gate import SiteGate
from steer.intervene.intervention import Intervention
from steer.intervene.low_rank import LowRank
from steer.intervene.operator import Operator, TensorHolder, tensors_of_rows
from steer.model.context import ForwardContext
from steer.model.devices import input_device
from steer.registry import in_package

BATCH = 2
TOKENS = 3
_COMPUTES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_Holder = TypeVar("_Holder", bound=TensorHolder)
_passed: WeakKeyDictionary[TensorHolder, set[tuple[torch.dtype, torch.device]]] = WeakKeyDictionary()


def check_own_methods(interventions: Sequence[Intervention], model: nn.Module) -> None:
    """Tries the operators and gates that are not the package's own, as a forward pass of this model would call them.

    Raises:
        ConfigError: one that fails, gives something else than it has to, writes into what it is given, or acts at strength 0.
        NonFiniteError: NaN or infinity for finite numbers.
    """
    operators = [intervention for intervention in interventions if not in_package(type(intervention.operator))]
    gates = [
        gate
        for intervention in interventions
        for gate in (intervention.gate.site_gates() if intervention.gate is not None else ())
        if not in_package(type(gate)) and type(gate).margin is not SiteGate.margin
    ]
    if not operators and not gates:
        return
    weights = next((weight for weight in model.parameters() if weight.is_floating_point()), torch.empty(0))
    dtype = weights.dtype if weights.dtype in _COMPUTES else torch.float32
    device = input_device(model) if weights.is_meta else weights.device
    with _undisturbed(device):
        for intervention in operators:
            operator = intervention.operator
            strength = max(map(abs, intervention.strength)) or 1.0
            types = {dtype, torch.promote_types(dtype, torch.float32)} if intervention.preserve_norm else {dtype}
            for tried_dtype in sorted(types, key=str):
                _once(operator, tried_dtype, device, partial(_check_operator, strength=strength))
        for gate in gates:
            _once(gate, dtype, device, _check_gate)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Without gradients, and with the random state as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode(False), torch.no_grad():
        yield


def _once(holder: _Holder, dtype: torch.dtype, device: torch.device, check: Callable[[_Holder, Tensor], None]) -> None:
    remembers = type(holder).__hash__ is not None
    if remembers and (dtype, device) in _passed.get(holder, ()):
        return
    trial = copy.copy(holder)  # what it notes about itself stays with the copy, and so do its tensors
    trial.tensors = {name: tensor.detach().to(device, copy=True) for name, tensor in holder.tensors.items()}
    h = torch.randn(BATCH, TOKENS, holder.width, generator=torch.Generator().manual_seed(0))
    check(trial, h.to(device, dtype))
    if remembers:
        _passed.setdefault(holder, set()).add((dtype, device))


# ---- operators


def _check_operator(operator: Operator, h: Tensor, strength: float) -> None:
    _OperatorRun(operator, h, strength).check()


class _OperatorRun:
    """An operator on one activation. h: [batch, tokens, width]."""

    def __init__(self, operator: Operator, h: Tensor, strength: float) -> None:
        self.operator = operator
        self.what = f"operator '{operator.name}'"
        self.h = h
        self.strength = strength
        rows = torch.zeros(BATCH, dtype=torch.long, device=h.device) if operator.slots > 1 else None
        self.per_row = dict(tensors_of_rows(operator.tensors, rows))

    def check(self) -> None:
        self._check_delta()
        everywhere = self._apply(self.h, self.strength)
        self._apply(self.h[:, -1:], self.strength)  # a decoded token
        mask = torch.ones_like(self.h[..., :1])  # [batch, tokens, 1]
        mask[:, 0] = 0
        masked = self._apply(self.h, self.strength, mask)
        if not torch.equal(masked[:, 0], self.h[:, 0]):
            raise _acts_regardless(self.what, "where its mask is 0", masked[:, 0] - self.h[:, 0])
        off = self._apply(self.h, 0.0)
        if not torch.equal(off, self.h):
            raise _acts_regardless(self.what, "at strength 0", off - self.h)
        self._check_claims(everywhere)

    def _call(self, function: Callable[..., Any], h: Tensor, *arguments: Any) -> Any:
        """What one of its methods gives. Raises ConfigError when it fails, or writes into what it is given."""
        copies = {"h": h.clone(), **{name: tensor.clone() for name, tensor in self.per_row.items()}}
        _seed(h.device)  # one that draws at random draws the same each time
        with errors_of(self.what, f"let it take {_in_words(h)}, as a pass will give it"):
            result = function(copies["h"], *arguments, {name: copies[name] for name in self.per_row})
        for name, before in (("h", h), *self.per_row.items()):
            if not torch.equal(copies[name], before):
                raise _writes_into(self.what, name)
        return result

    def _strength(self, h: Tensor, strength: float) -> Tensor:
        """[batch or 1, 1, 1] fp32, as a hook hands it over."""
        return torch.full((BATCH if self.operator.slots > 1 else 1, 1, 1), strength, device=h.device)

    def _apply(self, h: Tensor, strength: float, mask: Tensor | None = None) -> Tensor:
        edited = self._call(self.operator.apply, h, self._strength(h, strength), mask)
        if not isinstance(edited, Tensor) or edited.shape != h.shape or edited.dtype is not h.dtype or edited.device != h.device:
            raise _another_tensor(self.what, "the activation that it was given, edited", _in_words(h), edited)
        if not bool(torch.isfinite(edited).all()):
            raise _not_finite(self.what, edited)
        return edited

    def _check_delta(self) -> None:
        """The change itself, where it is added as it is: a number works with some masks only, and another type may change the model's."""
        kind = type(self.operator)
        if kind.delta is Operator.delta or kind.apply is not Operator.apply:
            return
        change = self._call(self.operator.delta, self.h, self._strength(self.h, self.strength))
        shape = self.h.shape
        fits = (
            isinstance(change, Tensor)
            and change.dim() <= len(shape)
            and all(size in (1, wanted) for size, wanted in zip(reversed(change.shape), reversed(shape), strict=False))
        )
        if not fits or change.dtype is not self.h.dtype or change.device != self.h.device:
            raise _another_tensor(self.what, "a change that can be added to the activation", _in_words(self.h), change)

    def _check_claims(self, edited: Tensor) -> None:
        """`additive` and `linear_in_strength`, by which decoded tokens and masks take shorter ways."""
        operator = self.operator
        wide = torch.promote_types(self.h.dtype, torch.float32)
        change = edited.to(wide) - self.h.to(wide)
        if operator.additive:
            if "vector" not in operator.tensors:
                raise _false_claim(self.what, "additive", "its change is strength * `vector`", "no tensor `vector`")
            vector = self.per_row["vector"]
            expected = self.strength * (vector if vector.dim() == 3 else vector.unsqueeze(1)).to(wide).expand_as(change)
            self._compare("additive", "its change is strength * `vector`", change, expected)
        if operator.linear_in_strength:
            halved = self._apply(self.h, self.strength / 2)
            self._compare("linear_in_strength", "half the strength makes half the change", halved.to(wide) - self.h.to(wide), change / 2)
            if isinstance(operator, LowRank) and type(operator).apply is not LowRank.apply:
                mean = "it edits as `change` says, by which decoded tokens are steered"
                own_apply = partial(LowRank.apply, operator)
                by_change = self._call(own_apply, self.h, self._strength(self.h, self.strength), None)
                self._compare("linear_in_strength", mean, change, by_change.to(wide) - self.h.to(wide))

    def _compare(self, claim: str, meaning: str, change: Tensor, expected: Tensor) -> None:
        rounding = 4 * torch.finfo(self.h.dtype).eps * float(self.h.abs().amax() + expected.abs().amax())
        gap = float((change - expected).abs().amax())
        if gap > rounding + 0.02 * float(expected.abs().amax()):
            raise _false_claim(self.what, claim, meaning, f"a change that differs by {gap:.3g} from that")


# ---- gates


def _check_gate(gate: SiteGate, h: Tensor) -> None:
    what = f"gate '{gate.name}'"
    before = h.clone()
    try:
        with errors_of(what, f"let `margin` take {_in_words(h)}"):
            margin: Any = gate.margin(h, _small_pass(h))
    except ContextError:  # of a real pass it may be able to say more
        return
    if not torch.equal(h, before):
        raise _writes_into(what, "h")
    if not isinstance(margin, Tensor) or margin.shape != h.shape[:-1] or not margin.is_floating_point() or margin.device != h.device:
        words = f"[{BATCH}, {TOKENS}] in floating point on {h.device}, one number for each token"
        raise _another_tensor(what, "a margin of each token", words, margin)
    if bool(margin.isnan().any()):
        raise _not_finite(what, margin)


def _small_pass(h: Tensor) -> ForwardContext:
    """A training pass of two short texts, with everything that a gate may look at."""
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long, device=h.device)
    every = torch.ones_like(ids, dtype=torch.bool)
    return ForwardContext(BATCH, TOKENS, "train", attention=every, labelled=every.clone(), device=h.device, ids=ids, turns=ids.clone())


def _seed(device: torch.device) -> None:
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.manual_seed(0)


def _in_words(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return f"{type(tensor).__name__} {str(tensor)[:60]!r}"
    return f"a tensor of the shape {list(tensor.shape)}, {tensor.dtype} on {tensor.device}"


# ---- errors


def _another_tensor(what: str, meant: str, expected: str, found: Any) -> ConfigError:
    remedy = "return a tensor of that shape, type and device; `.to(h.dtype)` and `.unsqueeze(1)` are often what is missing"
    return ConfigError(f"{what} does not give {meant}", expected=expected, found=_in_words(found), remedy=remedy)


def _not_finite(what: str, found: Tensor) -> NonFiniteError:
    return NonFiniteError(
        f"what {what} gives is not finite",
        expected="finite numbers for a finite activation",
        found=f"{int((~torch.isfinite(found)).sum())} of {found.numel()} entries are NaN or infinite",
        remedy="divide by nothing that can be 0, and work in fp32 where numbers grow large",
    )


def _writes_into(what: str, name: str) -> ConfigError:
    return ConfigError(
        f"{what} writes into `{name}`, which it is only to read",
        expected="a new tensor as its result",
        found="other numbers there afterwards",
        remedy="use operations without an underscore, e.g. h * 2 in place of h.mul_(2)",
    )


def _acts_regardless(what: str, where: str, change: Tensor) -> ConfigError:
    return ConfigError(
        f"{what} acts {where}",
        expected="the activation as it was, to the bit",
        found=f"a change of up to {float(change.abs().amax()):.3g}",
        remedy="multiply the change with `strength`; an operator that overrides `apply` multiplies it with `mask` too",
    )


def _false_claim(what: str, claim: str, meaning: str, found: str) -> ConfigError:
    return ConfigError(
        f"{what} says that it is `{claim}` and is not",
        expected=meaning,
        found=found,
        remedy=f"set {claim} = False in its class, also where a base class sets it",
    )
