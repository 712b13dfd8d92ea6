"""Own calls: how a module that is not of transformers is called: which argument holds token ids, and which a mask of what meaning."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steer.errors import ConfigError, ContextError
from steer.model.own_call_trials import CallTrials, StackCalls, mask_per_token, may_be_mask
from steer.model.trial_pass import Run, by_place, named_arguments, token_parameters

if TYPE_CHECKING:
    from steer.model.anatomy import Anatomy

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# words in the names of arguments that hold what earlier passes left
_CACHES = ("cache", "past")


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
        axes: order of the axes of the residual stream that begins with batch and tokens; None where `problem` says why it is not known.
        problem: empty where it is.
        embedding: path of the module that gets the token ids, None where none does.
        starts_with_ids: another token id is another stream at that token alone where the first block begins.
        other_masks: names of arguments that hide tokens of something else, such as an encoder's.
    """

    root: str
    ids: str | None
    mask: str | None
    marks_padding: bool
    mask_dtype: torch.dtype | None
    outer_ids: str | None
    outer_mask: str | None
    axes: tuple[int, ...] | None
    problem: str
    embedding: str | None
    starts_with_ids: bool
    other_masks: tuple[str, ...]


def find_own_call(run: Run, stack: StackCalls) -> OwnCall:
    """Runs a module a few more times. run: a trial pass that works."""
    trials = CallTrials(run, stack)
    root, name, ids = next(iter(stack.around)), None, None
    if trials.axes is not None and (ids := trials.ids()) is not None and (named := trials.named(ids)) is not None:
        root, name = named
    given = trials.calls.get(root, {})
    outer_ids = trials.outer_name(given.get(name)) if name is not None else None
    mask, other_masks = trials.masks(root, outer_ids) if trials.axes is not None else (None, ())
    return OwnCall(
        root=root,
        ids=name,
        mask=mask,
        marks_padding=mask is not None and not bool(given[mask].flatten()[0]),  # nothing was hidden
        mask_dtype=None if mask is None else given[mask].dtype,
        outer_ids=outer_ids,
        outer_mask=None if mask is None else trials.outer_name(given[mask]),
        axes=trials.axes,
        problem="" if trials.axes is not None else trials.problem,
        embedding=None if ids is None else ids.embedding,
        starts_with_ids=ids is not None and ids.are_first,
        other_masks=other_masks,
    )


def token_arguments(call: OwnCall, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Token ids, mask and cache of a call, under the names that transformers gives them.

    Raises:
        ContextError: a mask that leaves tokens out, of which it is not proven that it marks padding.
    """
    given = named_arguments(module, args, kwargs)
    arguments = {}
    if call.ids is not None and isinstance(given.get(call.ids), Tensor):
        arguments["input_ids"] = given[call.ids]
    for name, value in given.items():
        if any(word in name.lower() for word in _CACHES) and _may_be_cache(value):
            arguments["past_key_values"] = value
        if not may_be_mask(name, value) or name in call.other_masks:
            continue
        per_row = mask_per_token(value)
        if name == call.mask and per_row is not None:
            arguments["attention_mask"] = ~per_row.bool() if call.marks_padding else per_row
        elif not _is_of_places(value):
            of_pairs = value.dim() > 2 and value.shape[-2] == value.shape[-1]
            per_token = value.diagonal(dim1=-2, dim2=-1) if of_pairs else value
            if bool((per_token != per_token.flatten()[:1]).any()):
                raise _unproven_mask(module, name, value)
    return arguments


def _may_be_cache(value: Any) -> bool:
    """Not a switch, nor the places that a pass has in a cache."""
    return value.is_floating_point() if isinstance(value, Tensor) else value is not None and not isinstance(value, bool | int)


def _is_of_places(mask: Tensor) -> bool:
    """A square mask that says the same of all pairs of tokens at the same distance, as a causal one does: it knows no rows."""
    return mask.dim() == 2 and mask.shape[0] == mask.shape[1] and torch.equal(mask[1:, 1:], mask[:-1, :-1])


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
        given: dict[str, Any] = {ids_name: input_ids}
        if mask_name is not None:
            mask = attention_mask == 0 if call.marks_padding else attention_mask != 0
            given[mask_name] = mask.to(call.mask_dtype)
        args, kwargs = by_place(given)
        return runner(*args, **kwargs)

    return run


def _encoder_call(anatomy: Anatomy) -> Callable[..., Any]:
    """Texts go through the module of another stack alone."""
    if "input_ids" not in token_parameters(anatomy.decoder):
        raise _takes_no_ids(anatomy.decoder)
    return lambda input_ids, attention_mask, **_: anatomy.decoder(input_ids=input_ids, attention_mask=attention_mask)


def needs_equal_lengths(anatomy: Anatomy | None) -> bool:
    """Texts of different length cannot share a batch, since no mask is known that would hide the padding."""
    return anatomy is not None and anatomy.stack.own_call is not None and anatomy.stack.own_call.outer_mask is None


# ---- errors


def _unproven_mask(module: nn.Module, name: str, mask: Tensor) -> ContextError:
    return ContextError(
        f"what '{name}' of this {type(module).__name__} leaves out is not known to be padding",
        expected="a mask [batch, tokens] or [batch, 1, 1, tokens] of which a trial pass showed that it hides tokens",
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
