"""Trial of an operator on a small random activation: what it gives, what it leaves alone, and whether what it says of itself is so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steer import kernels
from steer.checks import errors_of
from steer.errors import ConfigError, NonFiniteError
from steer.intervene.low_rank import LinearLowRank, LowRank, widened, with_norm_of
from steer.intervene.operator import Operator, RowTensors, is_current, tensors_of_rows

BATCH = 2
TOKENS = 3


class OperatorTrial:
    """An operator, with tensors that are copies, on one activation.

    Args:
        h: [2, 3, width].
        strength: other than 0.
        by_row: rows of a batch may have different strengths.
    """

    def __init__(self, operator: Operator, h: Tensor, strength: float, by_row: bool) -> None:
        self.operator = operator
        self.what = f"operator '{operator.name}'"
        self.h = h
        self.wide = torch.promote_types(h.dtype, torch.float32)
        self.by_row = by_row or operator.slots > 1
        # the last slot comes first, so that a row and its slot are told apart
        self.rows = torch.tensor([operator.slots - 1, 0], device=h.device) if operator.slots > 1 else None
        self.per_row = dict(tensors_of_rows(operator.tensors, self.rows))
        self.strength = torch.tensor([strength, strength / 2] if self.by_row else [strength], device=h.device).view(-1, 1, 1)
        self.draws = False  # it draws at random

    def check(self) -> None:
        """Raises ConfigError, NonFiniteError."""
        self._check_delta()
        everywhere = self._apply(self.h)
        self._apply(self.h[:, -1:])  # a decoded token
        self._check_masks(everywhere)
        off = self._apply(self.h, self.strength * 0)
        if not torch.equal(off, self.h):
            raise _acts_regardless(self.what, "at strength 0", off - self.h)
        self._check_rows(everywhere)
        self._check_claims(everywhere)
        self._check_short_paths(everywhere)

    # ---- calls

    def _call(self, function: Callable[..., Any], h: Tensor, *arguments: Tensor | None) -> Any:
        """What one of its methods gives. Raises ConfigError when it fails, or writes into what it is given."""
        given = {"h": h, "strength": arguments[0], **({"mask": arguments[1]} if len(arguments) > 1 else {})}
        copies = {name: tensor if tensor is None else tensor.clone() for name, tensor in given.items()}
        per_row = {name: tensor.clone() for name, tensor in self.per_row.items()}
        own = {name: tensor.clone() for name, tensor in self.operator.tensors.items()}
        state = seed_draws(h.device)  # one that draws at random draws the same each time
        with errors_of(self.what, f"let it take {in_words(h)}, as a pass will give it"):
            result = function(*copies.values(), per_row)
        self.draws |= not torch.equal(state, random_state(h.device))
        for before, after in ((given, copies), (self.per_row, per_row), (own, self.operator.tensors)):
            check_unwritten(self.what, before, after)
        return result

    def _apply(self, h: Tensor, strength: Tensor | None = None, mask: Tensor | None = None, by: Callable[..., Any] | None = None) -> Tensor:
        """by: another function than its `apply`."""
        edited = self._call(by or self.operator.apply, h, self.strength if strength is None else strength, mask)
        if not isinstance(edited, Tensor) or edited.shape != h.shape or edited.dtype is not h.dtype or edited.device != h.device:
            raise another_tensor(self.what, "the activation that it was given, edited", in_words(h), edited)
        if not bool(torch.isfinite(edited).all()):
            raise not_finite(self.what, edited)
        return edited

    def _change(self, edited: Tensor) -> Tensor:
        return edited.to(self.wide) - self.h.to(self.wide)

    # ---- checks

    def _check_delta(self) -> None:
        """The change itself, where it is added as it is: a number works with some masks only, and another type may change the model's."""
        kind = type(self.operator)
        if kind.apply is not Operator.apply:
            if kind.delta is not Operator.delta and not is_current(kind, "apply", "delta") and not self._calls_delta():
                raise _unused_delta(self.what, kind)
            return
        change = self._call(self.operator.delta, self.h, self.strength)
        shape = self.h.shape
        fits = (
            isinstance(change, Tensor)
            and change.dim() <= len(shape)
            and all(size in (1, wanted) for size, wanted in zip(reversed(change.shape), reversed(shape), strict=False))
        )
        if not fits or change.dtype is not self.h.dtype or change.device != self.h.device:
            raise another_tensor(self.what, "a change that can be added to the activation", in_words(self.h), change)

    def _calls_delta(self) -> bool:
        """Its `apply`, which it inherits, goes by the `delta` that it overrides."""
        watched, called = copy.copy(self.operator), []

        def delta(*arguments: Any) -> Any:
            called.append(True)
            return self.operator.delta(*arguments)

        watched.delta = delta  # type: ignore[assignment, method-assign]
        self._apply(self.h, by=watched.apply)
        return bool(called)

    def _check_masks(self, everywhere: Tensor) -> None:
        mask = torch.ones_like(self.h[..., :1])  # [batch, tokens, 1]
        mask[:, 0] = 0
        masked = self._apply(self.h, mask=mask)
        if not torch.equal(masked[:, 0], self.h[:, 0]):
            raise _acts_regardless(self.what, "where its mask is 0", masked[:, 0] - self.h[:, 0])
        if not self.draws:
            share = self._change(self._apply(self.h, mask=torch.full_like(mask, 0.25)))
            gap = self._gap(share, self._change(everywhere) / 4)
            if gap is not None:
                raise _another_share(self.what, gap)

    def _check_rows(self, everywhere: Tensor) -> None:
        """Each row alone, with the tensors of its slot and no others, gives the same as in the batch."""
        if not self.by_row or self.draws:
            return
        rows = [0] * BATCH if self.rows is None else self.rows.tolist()
        for row, slot in enumerate(rows):
            alone = copy.copy(self.operator)
            alone.tensors = {
                name: tensor if len(tensor) == 1 else tensor[slot : slot + 1] for name, tensor in self.operator.tensors.items()
            }
            alone.slots = 1
            trial = OperatorTrial(alone, self.h[row : row + 1], float(self.strength[row]), by_row=False)
            own = trial._apply(trial.h)
            gap = self._gap(trial._change(own), self._change(everywhere)[row : row + 1])
            if gap is not None:
                raise _another_row(self.what, slot, gap)

    def _check_claims(self, edited: Tensor) -> None:
        """`additive`, `linear_in_strength` and `is_affine`, by which decoded tokens, masks and exports take shorter ways."""
        operator, change = self.operator, self._change(edited)
        if operator.additive:
            if "vector" not in operator.tensors:
                raise _false_claim(self.what, "additive", "its change is strength * `vector`", "no tensor `vector`")
            vector = self.per_row["vector"]
            expected = self.strength * (vector if vector.dim() == 3 else vector.unsqueeze(1)).to(self.wide)
            self._compare("additive", "its change is strength * `vector`", change, expected.expand_as(change))
        if operator.linear_in_strength:
            halved = self._change(self._apply(self.h, self.strength / 2))
            self._compare("linear_in_strength", "half the strength makes half the change", halved, change / 2)
        if operator.is_affine() and not self.draws:
            between = self._change(self._apply(self.h.flip(1) / 2 + self.h / 2))
            middle = (change.flip(1) + change) / 2 + (self.h.flip(1) + self.h).to(self.wide) / 2 - self.h.to(self.wide)
            meaning = "half-way between two activations it gives what is half-way between their edits"
            self._compare("is_affine", meaning, between, middle, "let is_affine() return False")

    def _check_short_paths(self, edited: Tensor) -> None:
        """The ways that decoded tokens and kernels take give what `apply` gives."""
        operator, kind = self.operator, type(self.operator)
        if operator.linear_in_strength and isinstance(operator, LowRank) and is_current(kind, "change", "apply"):
            self._compare_path("change", edited, self._apply(self.h, by=partial(LowRank.apply, operator)))
            if isinstance(operator, LinearLowRank) and is_current(kind, "factor", "change", "apply"):
                by_factor = copy.copy(operator)
                by_factor.change = partial(LinearLowRank.change, operator)  # type: ignore[method-assign]
                self._compare_path("factor", edited, self._apply(self.h, by=partial(LowRank.apply, by_factor)))
        path = "kernel_arguments" if kind.fused is LowRank.fused else "fused"
        for preserve_norm in (False, True):
            with kernels.force("aten"):  # the formula of the kernel, without the kernel
                fused = self._call(partial(self._fused, preserve_norm), self.h, self.strength)
            if fused is None:
                continue
            if not isinstance(fused, Tensor) or fused.shape != self.h.shape or fused.dtype is not self.h.dtype:
                raise another_tensor(self.what, f"by `{path}` the activation, edited", in_words(self.h), fused)
            if not preserve_norm:
                self._compare_path(path, edited, fused)
                continue
            wide, wide_edited = widened(self.h), widened(edited)
            keeps = wide_edited.norm(dim=-1, keepdim=True) > 0.01 * wide.norm(dim=-1, keepdim=True)  # else it is rounding that is scaled
            self._compare_path(path, torch.where(keeps, with_norm_of(wide, wide_edited), wide), torch.where(keeps, fused, self.h))

    def _fused(self, preserve_norm: bool, h: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor | None:
        return self.operator.fused(h, strength, None, self.rows, preserve_norm)

    def _gap(self, change: Tensor, expected: Tensor) -> float | None:
        """How far two changes are apart, None when that is rounding."""
        rounding = 4 * torch.finfo(self.h.dtype).eps * float(self.h.abs().amax() + expected.abs().amax())
        gap = float((change - expected).abs().amax())
        return None if gap <= rounding + 0.02 * float(expected.abs().amax()) else gap

    def _compare(self, claim: str, meaning: str, change: Tensor, expected: Tensor, remedy: str | None = None) -> None:
        gap = self._gap(change, expected)
        if gap is not None:
            raise _false_claim(self.what, claim, meaning, f"a change that differs by {gap:.3g} from that", remedy)

    def _compare_path(self, path: str, edited: Tensor, by_path: Tensor) -> None:
        gap = None if self.draws else self._gap(self._change(by_path), self._change(edited))
        if gap is not None:
            raise _another_edit(self.what, path, gap)


# ---- for trials of any kind


def seed_draws(device: torch.device) -> Tensor:
    """Seeds what draws at random on a device, and gives the state that this makes."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.manual_seed(0)
    return random_state(device)


def random_state(device: torch.device) -> Tensor:
    """Of the generators that may draw for a tensor on this device."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return torch.cat([torch.get_rng_state(), *own])


def check_unwritten(what: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises ConfigError for a tensor that is not what it was."""
    for name, tensor in before.items():
        if isinstance(tensor, Tensor) and not (after.get(name) is tensor or torch.equal(tensor, after[name])):
            raise _writes_into(what, name)


def in_words(tensor: Any) -> str:
    """A tensor, or what stands in its place, for an error."""
    if not isinstance(tensor, Tensor):
        return f"{type(tensor).__name__} {str(tensor)[:60]!r}"
    return f"a tensor of the shape {list(tensor.shape)}, {tensor.dtype} on {tensor.device}"


# ---- errors


def another_tensor(what: str, meant: str, expected: str, found: Any) -> ConfigError:
    remedy = "return a tensor of that shape, type and device; `.to(h.dtype)` and `.unsqueeze(1)` are often what is missing"
    return ConfigError(f"{what} does not give {meant}", expected=expected, found=in_words(found), remedy=remedy)


def not_finite(what: str, found: Tensor) -> NonFiniteError:
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


def _another_share(what: str, gap: float) -> ConfigError:
    return ConfigError(
        f"{what} takes its mask for a yes or no",
        expected="a quarter of the change where the mask is 0.25, as soft gates and scopes that fade have it",
        found=f"a change that differs by {gap:.3g} from that",
        remedy="multiply the change with `mask` in `apply`",
    )


def _another_row(what: str, slot: int, gap: float) -> ConfigError:
    return ConfigError(
        f"{what} does not go by the row slot and the strength of each row",
        expected="of a row in a batch what it gives for that row alone",
        found=f"a change that differs by {gap:.3g} from that, in a row of slot {slot}",
        remedy="take tensors from `per_row`, not from self.tensors, and multiply with `strength` as it is, [batch or 1, 1, 1]",
    )


def _unused_delta(what: str, kind: type[Operator]) -> ConfigError:
    owner = next(base for base in kind.__mro__ if "apply" in vars(base))
    return ConfigError(
        f"{what} overrides `delta`, which its `apply` does not call",
        expected="an override of the formula that the edit goes by",
        found=f"`apply` of {owner.__name__}",
        remedy="override `change`, or `apply`" if issubclass(kind, LowRank) else "override `apply`",
    )


def _false_claim(what: str, claim: str, meaning: str, found: str, remedy: str | None = None) -> ConfigError:
    return ConfigError(
        f"{what} says that it is `{claim}` and is not",
        expected=meaning,
        found=found,
        remedy=f"{remedy or f'set {claim} = False'} in its class, also where a base class says otherwise",
    )


def _another_edit(what: str, path: str, gap: float) -> ConfigError:
    return ConfigError(
        f"{what} makes another edit by its `{path}` than by its `apply`",
        expected=f"the same by both: decoded tokens, compiled code and kernels may go by `{path}`",
        found=f"changes that differ by {gap:.3g}",
        remedy=f"correct `{path}`, or leave it out of a class that says another edit",
    )
