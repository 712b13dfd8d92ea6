"""Own calls: how a module that is not of transformers is called: which argument holds token ids, and which a mask of what meaning.

Nothing of this is taken from names alone. Token ids are what the embedding gets. A mask hides tokens: another token in the place of a
masked one changes nothing elsewhere. Rows of a batch do not see each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steer.errors import ConfigError, ContextError
from steer.model.trial_pass import Run, first_tensor, is_mask_name, named_arguments, token_parameters

if TYPE_CHECKING:
    from steer.model.anatomy import Anatomy

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_SLIGHT = 1e-4  # share of a residual stream below which it counts as unchanged


@dataclass(frozen=True)
class OwnCall:
    """How the module around a stack is called.

    Attributes:
        root: path of the module, in the module that was run.
        ids: name of the argument with token ids, None where there is none.
        mask: name of the argument that hides tokens, None where none was seen to.
        marks_padding: that mask is True (1) on padding, not on tokens.
        mask_dtype: of that mask.
        outer_ids, outer_mask: names of the same arguments in the module that was run, which may be one around the root.
        problem: why batch and tokens of its residual stream are not known; empty when they are.
    """

    root: str
    ids: str | None
    mask: str | None
    marks_padding: bool
    mask_dtype: torch.dtype | None
    outer_ids: str | None
    outer_mask: str | None
    problem: str


def find_own_call(model: nn.Module, run: Run, around: list[str], last_block: str, ids: Tensor | None) -> OwnCall:
    """Runs a module a few more times.

    Args:
        run: a trial pass that works.
        around: paths of the modules around the stack, the innermost first.
        ids: what the embedding was called with.
    """
    return _Trials(model, run, around, last_block).own_call(ids)


def token_arguments(call: OwnCall, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Token ids and mask of a call, under the names that transformers gives them.

    Raises:
        ContextError: a mask that leaves tokens out, of which it is not proven that it marks padding.
    """
    given = named_arguments(module, args, kwargs)
    arguments = {}
    if call.ids is not None and isinstance(given.get(call.ids), Tensor):
        arguments["input_ids"] = given[call.ids]
    for name, mask in given.items():
        if not is_mask_name(name) or not isinstance(mask, Tensor):
            continue
        if name == call.mask:
            arguments["attention_mask"] = ~mask.bool() if call.marks_padding else mask
        elif mask.dim() != 2 or mask.shape[0] != mask.shape[1]:  # a square one is the same for all rows, as a causal one is
            per_token = mask if mask.dim() == 2 else mask.diagonal(dim1=-2, dim2=-1)
            if bool((per_token != per_token.flatten()[:1]).any()):
                raise _unproven_mask(module, name, mask)
    return arguments


def texts_call(model: nn.Module, anatomy: Anatomy | None) -> Callable[..., Any]:
    """What texts are run by, with `input_ids` and `attention_mask`: the model itself, or one of its own names for these.

    Raises:
        ConfigError: it takes no token ids, or more than these.
    """
    if anatomy is not None and anatomy.main is not anatomy and anatomy.stack.own_call is None:
        return _encoder_call(anatomy)
    if anatomy is None or anatomy.stack.own_call is None:
        return model
    call, runner = anatomy.stack.own_call, anatomy.runner
    ids_name, mask_name = call.outer_ids, call.outer_mask
    if ids_name is None:
        raise _takes_no_ids(runner)
    needed = [p.name for p in inspect.signature(runner.forward).parameters.values() if p.default is p.empty and p.kind in _NAMED]
    if missing := [name for name in needed if name not in (ids_name, mask_name)]:
        raise _takes_more(runner, missing)

    def run(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        given = {ids_name: input_ids}
        if mask_name is not None:
            mask = attention_mask == 0 if call.marks_padding else attention_mask != 0
            given[mask_name] = mask.to(call.mask_dtype)
        return runner(**given)

    return run


def _encoder_call(anatomy: Anatomy) -> Callable[..., Any]:
    """Texts go through the module of another stack alone."""
    if "input_ids" not in token_parameters(anatomy.decoder):
        raise _takes_no_ids(anatomy.decoder)
    return lambda input_ids, attention_mask, **_: anatomy.decoder(input_ids=input_ids, attention_mask=attention_mask)


def needs_equal_lengths(anatomy: Anatomy | None) -> bool:
    """Texts of different length cannot share a batch, since no mask is known that would hide the padding."""
    return anatomy is not None and anatomy.stack.own_call is not None and anatomy.stack.own_call.outer_mask is None


class _Trials:
    def __init__(self, model: nn.Module, run: Run, around: list[str], last_block: str) -> None:
        self.run = run
        self.around = {path: model.get_submodule(path) for path in around}
        self.last_block = model.get_submodule(last_block)
        self.calls: dict[str, dict[str, Any]] = {}

    def stream(self, change: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Tensor | None:
        """What the last block gives when the arguments of the outermost module are changed; notes the calls of the modules around."""
        found: list[Tensor] = []
        calls: dict[str, dict[str, Any]] = {}
        paths = {module: path for path, module in self.around.items()}

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module in paths:
                calls.setdefault(paths[module], named_arguments(module, args, kwargs))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if module is self.last_block and tensor is not None and not found:
                found.append(tensor.detach().clone())

        try:
            self.run([*paths, self.last_block], before, after, change)
        except Exception:  # it does not take these values
            return None
        self.calls = self.calls or calls
        return found[0] if found else None

    def own_call(self, ids: Tensor | None) -> OwnCall:
        plain = self.stream()
        root, name = self._root_with_ids(ids)
        problem, mask = "its residual stream is not one tensor [batch, tokens, width] with values", None
        if plain is not None and plain.dim() == 3 and not plain.is_meta:
            problem = self._why_rows_are_unknown(plain)
            mask = None if problem else self._mask(root, plain)
        given, outer = self.calls.get(root, {}), self.calls.get("", {})
        dtype = None if mask is None else given[mask].dtype
        marks_padding = mask is not None and not bool(given[mask].flatten()[0])  # nothing was hidden

        def outer_name(inner: str | None) -> str | None:
            return next((own for own, value in outer.items() if inner is not None and value is given.get(inner)), None)

        return OwnCall(root, name, mask, marks_padding, dtype, outer_name(name), outer_name(mask), problem)

    def _root_with_ids(self, ids: Tensor | None) -> tuple[str, str | None]:
        for path in self.around:
            for name, value in self.calls.get(path, {}).items():
                if ids is not None and isinstance(value, Tensor) and value.shape == ids.shape and torch.equal(value, ids):
                    return path, name
        return next(iter(self.around)), None

    def _why_rows_are_unknown(self, plain: Tensor) -> str:
        """Another first row must leave the others alone, or the first axis is not that of the batch."""
        rows = plain.shape[0]
        if rows < 2 or plain.shape[1] < 2:
            return f"the example gives {list(plain.shape)}; two rows of two tokens at least are needed to tell them apart"

        def other_first_row(arguments: dict[str, Any]) -> dict[str, Any]:
            return {name: _with_other_first(value, 0) if _leads(value, (rows,)) else value for name, value in arguments.items()}

        changed = self.stream(other_first_row)
        if changed is None or not _alike(plain[1:], changed[1:]):
            return f"its stream {list(plain.shape)} does not have the batch as its first axis: rows change each other"
        return ""

    def _mask(self, root: str, plain: Tensor) -> str | None:
        """The argument that hides tokens, as seen when the first of each row is hidden."""
        shape = tuple(plain.shape[:2])

        def other_first_token(arguments: dict[str, Any]) -> dict[str, Any]:
            return {name: _with_other_first(value, 1) if _leads(value, shape) else value for name, value in arguments.items()}

        outer = self.calls.get("", {})
        for name, value in self.calls.get(root, {}).items():
            names = [own for own, given in outer.items() if given is value]  # what the outermost module calls it
            constant = isinstance(value, Tensor) and tuple(value.shape) == shape and bool((value == value.flatten()[0]).all())
            if not is_mask_name(name) or not constant or not names:
                continue
            all_real = bool(value.flatten()[0])

            def hiding_first(arguments: dict[str, Any], own: str = names[0], of: bool = all_real) -> dict[str, Any]:
                mask = arguments[own].clone()
                mask[:, 0] = not of
                return {**arguments, own: mask}

            seen = self.stream(other_first_token)
            hidden, hidden_other = self.stream(hiding_first), self.stream(lambda a, h=hiding_first: h(other_first_token(a)))  # type: ignore[misc]
            if seen is None or hidden is None or hidden_other is None or _alike(plain[:, 1:], seen[:, 1:]):
                continue
            if _alike(hidden[:, 1:], hidden_other[:, 1:]):
                return name
        return None


def _leads(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape[: len(shape)]) == shape


def _with_other_first(value: Tensor, axis: int) -> Tensor:
    """The first row (axis 0) or token (axis 1) replaced by values that others have: valid ids stay valid."""
    value = value.clone()
    if axis == 0:
        value[0] = value[0].roll(1, 0) if value.dim() > 1 else value[1]
        return value
    value[:, 0] = value[:, 0].roll(1, 0)
    return value


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= _SLIGHT * a.norm())


# ---- errors


def _unproven_mask(module: nn.Module, name: str, mask: Tensor) -> ContextError:
    return ContextError(
        f"what '{name}' of this {type(module).__name__} leaves out is not known to be padding",
        expected="a mask [batch, tokens] of which a trial pass showed that it hides tokens",
        found=f"{list(mask.shape)}, not the same for all tokens",
        remedy=f"give the mask in an example: steer.describe(model, layers=..., example={{..., '{name}': <all tokens real>}})",
    )


def _takes_no_ids(module: nn.Module) -> ConfigError:
    return ConfigError(
        f"texts cannot be run through this {type(module).__name__}",
        expected="a forward with an argument that an embedding gets as token ids",
        found="none that a trial pass showed",
        remedy="read activations in your own passes: with plan.attached(model), or a DriftTracker without probe prompts",
    )


def _takes_more(module: nn.Module, names: list[str]) -> ConfigError:
    return ConfigError(
        f"texts cannot be run through this {type(module).__name__}",
        expected="a forward that needs token ids and a mask alone",
        found=f"it needs {', '.join(names)}, too",
        remedy="give these defaults, or read activations in your own passes, e.g. a DriftTracker without probe prompts",
    )
