"""Hook installation: one tap per hook point, and protection against compiled code that does not look at hooks.

torch.compile (2.13) does not guard on the absence of hooks: code traced from a module without any is used again when the module, or
any other module of its class, has one. Nothing would be steered and nothing would say so. The first attach in a process therefore
switches dynamo's hook guards on (about 4 us per block and compiled call) and drops code that was compiled without them; `arm` does so
ahead of time.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import SiteError
from steer.model.anatomy import Anatomy, HookPoint
from steer.model.context import ForwardContext
from steer.model.watcher import WATCHERS, NotCopied, Watcher, chat_roles, register, response_tokens, watcher_of

log = logging.getLogger("steer")

Act = Callable[[Tensor, ForwardContext], Tensor | None]


class Tap(NotCopied):
    """The hook on one hook point. Calls `act(h, context)`, h [batch, tokens, width]; None or h itself leaves the model's tensor alone.

    Attributes:
        place: `decoder` when every pass must reach it, `after` for the unembedding, `anywhere` for a module of unknown role.
        ran: it was reached in the pass that runs or ran last; `ever`, in any.
    """

    def __init__(self, point: HookPoint, act: Act, watcher: Watcher) -> None:
        self.point, self.act, self.watcher, self.columns = point, act, watcher, point.columns
        self.ran = self.ever = False
        inside = watcher.is_decoder and any(point.module is module for module in watcher.root.modules())
        self.place = "anywhere" if point.site.module is not None else "decoder" if inside else "after"
        self.context: Callable[[], ForwardContext] = watcher.context_of_decoder if inside else watcher.context_beside
        if self.place == "after":
            self.context = watcher.context_after

    def edit(self, whole: Tensor) -> Tensor | None:
        """The new activation, None for no change. whole: what the module takes or gives, of which the site may be some columns."""
        if not self.watcher.replays:
            self.ran = self.ever = True
        ctx = self.context()
        if self.columns is None and whole.dim() != 2:
            new = self.act(whole, ctx)
            return None if new is whole else new
        h = whole if self.columns is None else whole[..., self._columns_on(whole)]
        flat = h.dim() == 2 and h.shape[0] == ctx.batch * ctx.tokens
        if flat:
            h = h.view(ctx.batch, ctx.tokens, -1)
        new = self.act(h, ctx)
        if new is None or new is h:
            return None
        new = new.flatten(0, 1) if flat else new
        if self.columns is None:
            return new
        if isinstance(self.columns, Tensor):
            return whole.index_copy(-1, self._columns_on(whole), new)  # type: ignore[arg-type]
        return whole.slice_scatter(new, -1, self.columns.start, self.columns.stop)

    def _columns_on(self, whole: Tensor) -> Tensor | slice:
        if isinstance(self.columns, Tensor) and self.columns.device != whole.device:
            self.columns = self.columns.to(whole.device)
        assert self.columns is not None
        return self.columns

    def through(self, value: Any) -> Any:
        """Edits the activation in what a module takes or gives: a tensor, or the first entry of a tuple or list. None for no change."""
        if isinstance(value, Tensor):
            return self.edit(value)
        if not isinstance(value, (tuple, list)) or not value or not isinstance(value[0], Tensor):
            raise SiteError(
                f"'{self.point.site}' gives no tensor",
                expected="a tensor or a tuple that starts with one",
                found=type(value).__name__,
                remedy="choose the other side of this module, or a module inside it",
            )
        new = self.edit(value[0])
        if new is None:
            return None
        if isinstance(value, list):
            return [new, *value[1:]]
        make = getattr(value, "_make", tuple)  # of a named tuple
        return make((new, *value[1:]))


class OutputTap(Tap):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.through(output)


class InputTap(Tap):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = self.through(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), None)
        if name is None:
            raise SiteError(
                f"'{self.point.site}' was called without arguments",
                expected="a call with the activation as first argument",
                found="a call with none",
                remedy="choose the output of this module",
            )
        new = self.through(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})


def install(model: nn.Module, anatomy: Anatomy | None, acts: list[tuple[HookPoint, Act]]) -> tuple[Watcher, Callable[[], None]]:
    """Puts one tap on each hook point, in order, before everybody else's hooks.

    Nothing of the model changes but its hook dictionaries, and there only our own entries.

    Returns:
        The model's watcher, and the function that takes these taps off again (and the watcher, after the last of them).
    """
    arm()
    watcher = watcher_of(model)
    if watcher is None:
        watcher = Watcher(model if anatomy is None else anatomy.decoder, is_decoder=anatomy is not None)
        WATCHERS[watcher.root] = watcher
    watcher.follow(model, anatomy)
    taps = [(OutputTap if point.side == "output" else InputTap)(point, act, watcher) for point, act in acts]
    removals = [register(tap.point.module, tap, before=tap.point.side == "input", first=True) for tap in taps]
    watcher.taps = [*watcher.taps, *taps]
    owner = watcher

    def remove() -> None:
        for removal in removals:
            removal()
        owner.taps = [tap for tap in owner.taps if tap not in taps]
        if not owner.taps:
            owner.remove()
            WATCHERS.pop(owner.root, None)

    return owner, remove


def arm() -> None:
    """Makes everything that is compiled from now on look at hooks, so that attaching later drops no compiled code.

    Attaching does this by itself. Call it before the first compiled call when plans will come and go: the first attach then costs no
    more than the trace of the steered code, and later ones find it ready.
    """
    import torch._dynamo.config as dynamo

    if not dynamo.skip_nnmodule_hook_guards:
        return
    dynamo.skip_nnmodule_hook_guards = False
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and frames.input_codes.seen:
        log.info("code compiled so far does not look at hooks: dynamo is reset (calling steer.arm() first avoids this)")
        torch._dynamo.reset()


def disarm() -> None:
    """Gives dynamo its default back: compiled code does not look at hooks. Only safe when nothing will be attached any more."""
    import torch._dynamo.config as dynamo

    dynamo.skip_nnmodule_hook_guards = True


__all__ = ["Act", "Tap", "Watcher", "arm", "chat_roles", "disarm", "install", "response_tokens", "watcher_of"]
