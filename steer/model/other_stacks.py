"""Other stacks of a model than the one that the tokens of a text go through, by name: encoders, vision towers, action heads."""

from __future__ import annotations

import re

from torch import nn

from steer.errors import SiteError, did_you_mean
from steer.model.find_stack import FoundStack, holds_lists, unknown_lists
from steer.model.stacks import survey
from steer.model.trial_pass import obstacle_around

# name of a stack -> words in its path, tried in this order
_NAMES = {
    "vision": ("vision", "visual", "image"),
    "audio": ("audio", "speech"),
    "text": ("text", "language"),
    "decoder": ("decoder",),
    "encoder": ("encoder",),
}


def stack_named(model: nn.Module, name: str, main: FoundStack) -> FoundStack:
    """The stack of that name: one of those in `_NAMES`, or a path that it alone begins with. Raises SiteError with the names that exist."""
    stacks = _stacks_beside(model, main)
    by_name: dict[str, list[FoundStack]] = {}
    for found in (main, *stacks):
        by_name.setdefault(_name(found.path), []).append(found)
    if len(fitting := by_name.get(name, [])) != 1:
        fitting = [found for found in (main, *stacks) if f"{found.path}.".startswith(f"{name}.")]
    if len(fitting) == 1:
        return fitting[0]
    known = [name if len(of_name) == 1 else found.path for name, of_name in by_name.items() for found in of_name]
    unseen = [path for path in unknown_lists("", model) if _name(path) == name or f"{path}.".startswith(f"{name}.")]
    raise _not_seen(model, name, unseen) if unseen and not by_name.get(name) else _no_such_stack(model, name, known)


def _name(path: str) -> str:
    words = re.split(r"[^a-z]+", path.lower())
    return next((name for name, marks in _NAMES.items() if any(mark in words for mark in marks)), path)


def _stacks_beside(model: nn.Module, main: FoundStack) -> list[FoundStack]:
    """Stacks that ran in the same pass, then those of modules that did not and run by themselves, the outermost first."""
    runner = model.get_submodule(main.runner)
    seen = survey(runner, obstacle_around(model, main.runner))
    found = [FoundStack(main.runner, stack) for stack in seen.stacks if stack.path != main.stack.path]
    for path, module in list(model.named_modules()):
        known = [stack.path for stack in (main, *found)]
        if path == "" or not holds_lists(module) or any(_holds(path, other) or _holds(other, path) for other in known):
            continue
        stacks = survey(module, obstacle_around(model, path)).stacks
        found += [FoundStack(path, stack) for stack in stacks]
    return found


def _holds(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


def _no_such_stack(model: nn.Module, name: str, known: list[str]) -> SiteError:
    return SiteError(
        f"{type(model).__name__} has no single stack of blocks named '{name}'",
        expected=f"one of {', '.join(known)}, or the path of a part that holds one",
        found=name,
        remedy=did_you_mean(name, known) or "leave the name out for the stack that the tokens of a text go through",
    )


def _not_seen(model: nn.Module, name: str, paths: list[str]) -> SiteError:
    return SiteError(
        f"the stack '{name}' of this {type(model).__name__} could not be seen in a pass",
        expected="a module that runs over a few random pixels, frames or tokens and passes one stream [batch, tokens, width] on",
        found=f"{paths}, which did not, such as a tower that packs all images into one row",
        remedy="use 'module:<dotted path>:<input|output>' with scope='all'",
    )
