"""Hooks that follow a pass: from the given model down to the module that is called with the tokens, and to its first block."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from steer.model.context_builder import OUTER_IDS, OUTER_MASK, OWN_ARGUMENTS, TOKEN_ARGUMENTS
from steer.model.hook_registration import OPENS, OwnHook
from steer.model.own_calls import token_arguments

if TYPE_CHECKING:
    from steer.model.watcher import Watcher

IDLE = -1  # height while no pass runs


class EnterHook(OwnHook):
    """Pre-hook of a module between the given model and its decoder: collects the arguments that tell tokens apart."""

    def __init__(self, watcher: Watcher, module: nn.Module, height: int) -> None:
        self.watcher = watcher
        self.height = height
        parameters = inspect.signature(module.forward).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        self.positional = [(place, TOKEN_ARGUMENTS[name]) for place, name in enumerate(names) if name in TOKEN_ARGUMENTS]
        taken = {meaning for _, meaning in self.positional}
        self.own = [name for name in OWN_ARGUMENTS if name in taken] if height == 0 else []
        # its own ids and mask are those of an encoder, unless its language model is a decoder alone, as some that read images have
        is_both = getattr(getattr(module, "config", None), "is_encoder_decoder", True)
        self.has_other_stack = "decoder_input_ids" in names and is_both

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watcher = self.watcher
        if self.height >= watcher.height:  # not called by the module entered last: a new pass
            watcher.begin(self.height)
        watcher.height = self.height
        arguments = watcher.arguments
        if self.own and arguments:
            _set_aside(arguments, self.own)
        if args:
            for place, name in self.positional:
                if place < len(args) and args[place] is not None:
                    arguments[name] = args[place]
        for name, meaning in TOKEN_ARGUMENTS.items():
            value = kwargs.get(name)
            if value is not None:
                arguments[meaning] = value
                if name == "inputs_embeds" and "input_ids" in arguments:  # a wrapper embeds the ids itself, perhaps with more tokens
                    arguments[OUTER_IDS] = arguments.pop("input_ids")
        if self.has_other_stack:
            for name in OWN_ARGUMENTS[:4]:
                arguments.pop(name, None)
        if self.height == 0:
            if watcher.own_call is not None:
                arguments |= token_arguments(watcher.own_call, module, args, kwargs)
            if watcher.ids_have_other_rows:
                arguments.pop("input_ids", None)
            if watcher.opener is None or not arguments.keys().isdisjoint(("input_ids", "inputs_embeds")):
                watcher.open()
            else:
                watcher.opens_at_block = True


class OpenHook(OwnHook):
    """Pre-hook of the first block, where only the residual stream tells how many tokens a pass has."""

    at_site = True  # before the hooks at its input
    order = OPENS

    def __init__(self, watcher: Watcher, argument: int | str, axes: tuple[int, ...]) -> None:
        self.watcher = watcher
        self.argument = argument
        self.axes = axes

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watcher = self.watcher
        if not watcher.opens_at_block:
            return
        stream = args[self.argument] if isinstance(self.argument, int) and self.argument < len(args) else kwargs.get(self.argument)  # type: ignore[arg-type]
        if isinstance(stream, Tensor) and stream.dim() == len(self.axes):
            watcher.arguments["inputs_embeds"] = stream.permute(self.axes)
        watcher.open()


class LeaveHook(OwnHook):
    """Hook of the same module that runs when its forward ends, by an exception too (`output` is None then)."""

    def __init__(self, watcher: Watcher, height: int) -> None:
        self.watcher = watcher
        self.height = height

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.watcher.is_foreign():
            return
        if self.height == 0:
            self.watcher.close(output)
        self.watcher.leave(self.height, output)


def _set_aside(arguments: dict[str, Any], own: list[str]) -> None:
    """Forgets what outer modules got under the names of the stack's own arguments, but for what they may tell of its tokens."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        arguments[OUTER_MASK] = mask
    if "input_ids" in arguments and "inputs_embeds" in own:
        arguments[OUTER_IDS] = arguments["input_ids"]
    for name in own:
        arguments.pop(name, None)
