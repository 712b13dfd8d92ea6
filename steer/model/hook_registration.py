"""Registration of our hooks on a module: in front of everybody else's, numbered so that compiled code finds itself again, never copied."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

OPENS, BEFORE_EDITS, EDITS, AFTER_EDITS = range(4)  # `OwnHook.order`
COPY_WARNING = "a hooked model was copied: the copy is neither steered nor monitored; attach to it if it should be"


class OwnHook:
    """A hook that stays with its model: `copy.deepcopy` and pickling put a no-op in its place, and warn.

    Attributes:
        at_site: it edits or reads an activation; False for the hooks that only follow the passes.
        order: among those at sites of one module, whatever the order in which they came; equal ones run in that.
    """

    at_site = False
    order = EDITS

    def __deepcopy__(self, memo: dict[Any, Any]) -> Callable[..., None]:
        if "steer" not in memo:  # once per copied model, not once per hook
            memo["steer"] = True
            warnings.warn(COPY_WARNING, stacklevel=3)
        return _no_op

    def __reduce__(self) -> Any:
        warnings.warn(COPY_WARNING, stacklevel=2)
        return _make_no_op, ()


def _no_op(*_: Any) -> None:
    """What a hook of ours becomes in a copied model."""


def _make_no_op() -> Callable[..., None]:
    return _no_op


def is_compiled(module: nn.Module) -> bool:
    """A module runs as compiled code: by `module.compile()`, or as what `torch.compile(module)` wraps."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def register_hook(module: nn.Module, hook: OwnHook, *, before: bool, always: bool = False) -> None:
    """Puts a hook of ours on a module, from which `unregister_hook` takes it off.

    Written to the hook dictionaries themselves, because `register_forward_hook` numbers hooks through the process and compiled code is
    bound to those numbers: every new attach would be compiled anew. Ours are -1, -2, ... on each module, so that the same plan finds its
    code again. Hooks at sites run before everybody else's, in their `order` and then as they came, so that whoever only looks sees what
    the model goes on with: transformers records `hidden_states` by hooks that stay on a model after its first
    `output_hidden_states=True`.

    Args:
        before: run before the forward, with keyword arguments.
        always: run after a forward that raised, too.
    """
    hooks: Any = module._forward_pre_hooks if before else module._forward_hooks  # OrderedDicts, by number
    flags: list[Any] = []
    if before:
        flags.append(module._forward_pre_hooks_with_kwargs)
    elif always:
        flags.append(module._forward_hooks_always_called)
    number = next(-n for n in range(1, len(hooks) + 2) if -n not in hooks)
    hooks[number] = hook
    for flag in flags:
        flag[number] = True
    if hook.at_site:
        ours = [known for known, registered in hooks.items() if isinstance(registered, OwnHook) and registered.at_site]
        ours.sort(key=lambda known: hooks[known].order)  # stable
        for known in reversed(ours):
            hooks.move_to_end(known, last=False)


def unregister_hook(module: nn.Module, hook: OwnHook) -> None:
    """Takes a hook of ours off a module, however far its registration got; none of it left is no error."""
    before = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
    after = (module._forward_hooks, module._forward_hooks_always_called)
    for hooks, flags in (before, after):
        for number in [number for number, registered in hooks.items() if registered is hook]:
            flags.pop(number, None)
            hooks.pop(number)
