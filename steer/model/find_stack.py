"""Finding the stack that is meant: the one that was described, or the one that the tokens of a text go through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from steer.checks import of_type
from steer.errors import AnatomyError
from steer.model.description import ATTRIBUTE, Description, described_in, described_stack
from steer.model.stacks import LISTS, Stack, forget_survey, is_text, main_stack, survey
from steer.model.trial_pass import EXAMPLES, is_transformers_model, obstacle_around, runners, token_parameters

_MOST_FAILURES = 4  # that a message lists


@dataclass(frozen=True)
class FoundStack:
    """A stack in a model.

    Attributes:
        runner: path of the module whose trial pass showed it; all paths of the stack are in that.
        description: what the user said of it, or None.
    """

    runner: str
    stack: Stack
    description: Description | None = None

    @property
    def path(self) -> str:
        return joined(self.runner, self.stack.path)


def joined(*paths: str) -> str:
    """One dotted path of several, some of which may be empty."""
    return ".".join(path for path in paths if path)


def check_model(model: Any) -> None:
    """Raises ConfigError unless this is a model."""
    of_type(model, nn.Module, "the model", "pass the model itself; steer.load returns (model, tokenizer)")


def find_stack(model: nn.Module) -> FoundStack:
    """The stack that the tokens of a text go through. Of several in one model (encoder and decoder) it is the one that ends last."""
    described = described_in(model)
    if described is not None:
        return _described(model, *described)
    found: list[FoundStack] = []
    failures: list[str] = []
    waiting = runners(model)
    missed: list[str] = []  # lists of modules of which it is not known what they are
    while waiting and not found:
        inner: list[tuple[str, nn.Module]] = []
        missed = _lists_outside(model, [path for path, _ in waiting])
        for path, module in waiting:
            if isinstance(module, nn.ModuleList | nn.ModuleDict):  # which nothing calls
                inner += [(joined(path, name), part) for name, part in module.named_children() if holds_lists(part)]
                continue
            seen = survey(module, obstacle_around(model, path))
            failures += [f"{type(module).__name__} with {failure}" for failure in seen.failures]
            if seen.stacks:
                found.append(FoundStack(path, main_stack(seen.stacks)))
            else:
                if not is_transformers_model(module):
                    missed += unknown_lists(path, module)
                inner += [(joined(path, name), part) for name, part in module.named_children() if holds_lists(part)]
        waiting = inner
    for preferred in (lambda entry: entry.stack.embedding is not None, lambda entry: is_text(entry.path)):
        if len(found) > 1 and len(chosen := [entry for entry in found if preferred(entry)]) == 1:
            found = chosen
    takes_ids = len(found) == 1 and found[0].stack.embedding is not None
    rivals = [path for path in missed if not takes_ids or _embeds(model, path, found[0].runner)]
    if len(found) == 1 and not rivals:
        return found[0]
    raise _no_single_stack(model, [entry.path for entry in found] + rivals * bool(found), failures)


def _lists_outside(model: nn.Module, paths: list[str]) -> list[str]:
    """Lists of blocks of one's own beside models of transformers, by their paths."""
    if not is_transformers_model(model.get_submodule(paths[0])):
        return []
    return [path for path in unknown_lists("", model) if not any(f"{path}.".startswith(f"{inner}." if inner else "") for inner in paths)]


def unknown_lists(path: str, module: nn.Module) -> list[str]:
    """Lists of several modules of one class that hold others, as blocks are; the outermost alone. Adapters of PEFT's are no blocks."""
    found: list[str] = []
    for name, part in module.named_modules():
        members = list(part.children()) if isinstance(part, LISTS) else []
        members = [member for member in members if not type(member).__module__.startswith("peft.")]
        alike = len(members) > 1 and len({type(member) for member in members}) == 1 and all(any(member.children()) for member in members)
        if alike and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return [joined(path, name) for name in found]


def _embeds(model: nn.Module, path: str, runner: str) -> bool:
    """The module that holds a list holds an embedding, too, which is none of those of a module that ran."""
    inside = set(model.get_submodule(runner).modules())
    around = model.get_submodule(path.rpartition(".")[0])
    return any(isinstance(part, nn.Embedding) and part not in inside for part in around.modules())


def _described(model: nn.Module, place: str, description: Description) -> FoundStack:
    """The stack that was described, found where the described module runs, or the outermost module in it that does."""
    layers = joined(place, description.layers)
    names = description.layers.split(".")
    failures: list[str] = []
    for depth in range(len(names)):
        path = joined(place, *names[:depth])
        module = model.get_submodule(path)
        if description.example is not None and EXAMPLES.get(module) is not description.example:
            forget_survey(module)
            EXAMPLES[module] = description.example
        embed, norm = (_below(place, path, part) for part in (description.embed, description.norm))
        seen = survey(module, obstacle_around(model, path), joined(*names[depth:]), embed)
        for stack in seen.stacks:
            if joined(path, stack.path) == layers:
                return FoundStack(path, described_stack(module, stack, embed, norm), description)
        failures += [f"{type(module).__name__} with {failure}" for failure in seen.failures]
        if seen.stacks:
            failures.append(f"{type(module).__name__}: stacks at {[joined(path, stack.path) for stack in seen.stacks]}")
            break
    raise _not_a_stack(model, layers, failures)


def _below(place: str, runner: str, path: str | None) -> str | None:
    """A path in the described module as one in the module that ran; None where it is not in that."""
    if path is None or runner == place:
        return path
    whole = joined(place, path)
    return whole.removeprefix(runner + ".") if whole.startswith(runner + ".") else None


def holds_lists(module: nn.Module) -> bool:
    """Something in it can hold blocks."""
    return any(isinstance(part, LISTS) for part in module.modules())


def path_of_decoder(model: nn.Module, found: FoundStack) -> str:
    """The innermost module around the stack that is called with the tokens; else the innermost that is more than a list."""
    if found.stack.own_call is not None:
        return joined(found.runner, found.stack.own_call.root)
    names = found.stack.path.split(".") if found.stack.path else []
    paths = [joined(found.runner, *names[:depth]) for depth in range(len(names), -1, -1)]
    modules = [(path, model.get_submodule(path)) for path in paths]
    for path, module in modules:
        if token_parameters(module):
            return path
    return next((path for path, module in modules if not isinstance(module, LISTS)), modules[-1][0])


# ---- errors


def _no_single_stack(model: nn.Module, stacks: list[str], failures: list[str]) -> AnatomyError:
    holders = [(path or "the model itself", list(m.children())) for path, m in model.named_modules() if isinstance(m, LISTS)]
    lists = [f"{path} ({len(members)} x {type(members[0]).__name__})" for path, members in holders if len(members) > 1]
    tried = f"; tried {_in_short(failures)}" if failures else ""
    how = "say how it is called: steer.describe(model, layers='<path of the blocks>', example=<what its forward takes>); or "
    return AnatomyError(
        f"{type(model).__name__} has {'several decoders' if stacks else 'no decoder'} that could be recognised",
        expected="one stack of residual blocks: a list of modules of which each takes what the one before gave",
        found=f"{stacks or lists or 'no list of modules at all'}{tried}",
        remedy="pass the one that is meant, or name it: steer.describe(model, layers='<path>', example=<what its forward takes>)"
        if stacks
        else f"{how if lists else ''}address its tensors as 'module:<dotted path>:<input|output>'",
    )


def _not_a_stack(model: nn.Module, layers: str, failures: list[str]) -> AnatomyError:
    return AnatomyError(
        f"'{layers}' of a {type(model).__name__} is not the stack of blocks that it is described to be",
        expected="a list of modules of which each takes what the one before gave, in a pass over a few random tokens",
        found=_in_short(failures) or "no pass that showed one",
        remedy=f"give what its forward takes, of two rows or more: example=... of steer.describe or {ATTRIBUTE}; or correct the path",
    )


def _in_short(failures: list[str]) -> str:
    """The first few, which are those of the outermost modules."""
    different = list(dict.fromkeys(failures))
    more = f"; and {len(different) - _MOST_FAILURES} more" if len(different) > _MOST_FAILURES else ""
    return "; ".join(different[:_MOST_FAILURES]) + more
