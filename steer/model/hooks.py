"""Hooks at sites: installation, the hook itself, and protection against compiled code that does not look at hooks.

torch.compile (2.13) does not guard on the absence of hooks: code traced from a module without any is used again when the module, or
any other module of its class, has one. Nothing would be steered and nothing would say so. The first attach in a process therefore
switches dynamo's hook guards on (about 4 us per block and compiled call) and drops code that was compiled without them;
`prepare_compile` does so ahead of time.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steer.errors import SiteError
from steer.model.anatomy import Anatomy, HookPoint
from steer.model.annotations import annotation_for
from steer.model.context import ForwardContext
from steer.model.hook_registration import EDITS, OwnHook, register_hook, unregister_hook
from steer.model.watcher import WATCHERS, Watcher

log = logging.getLogger("steer")


class HookFunction(Protocol):
    """What a site hook calls: (h, context) -> the new activation; None or h itself leaves the model's tensor alone.

    h: [batch, tokens, width]. A function may have an attribute `prepared`, an edit worked out in advance for the pass that runs, and an
    attribute `order`, see `OwnHook`.
    """

    def __call__(self, h: Tensor, context: ForwardContext, /) -> Tensor | None: ...


class PreparedGroup(Protocol):
    """Prepared edits of several sites. `live` is None when they do not hold for the pass that runs."""

    live: object | None


class PreparedEdit(Protocol):
    """An edit that was worked out when the pass opened.

    Attributes:
        group: tells whether it holds for the pass that runs.
        fits: the `group.live` for which an activation of this site had the right shape and type.
        is_plain_add: it is `h + folded` and nothing else.
    """

    group: PreparedGroup
    fits: object
    is_plain_add: bool
    folded: Tensor

    def edited(self, h: Tensor, /) -> Tensor:
        """The edited activation, of a shape and type that were looked at."""
        ...

    def __call__(self, h: Tensor, /) -> Tensor | None:
        """The edited activation; None when it does not fit this tensor, which then takes the ordinary way."""
        ...


class SiteHook(OwnHook):
    """The hook on one hook point.

    Attributes:
        function: called with the activation and the context of the pass.
        prepared: an edit worked out in advance, tried first; None for none.
        place: `decoder` when every pass must reach it, `after` for the unembedding, `anywhere` for a module of unknown role.
        ran: mark that it was reached in the pass that runs; taken off when the pass has been checked.
        ever_ran: it was reached in any pass.
    """

    at_site = True

    def __init__(self, point: HookPoint, function: HookFunction, watcher: Watcher) -> None:
        self.point = point
        self.function = function
        self.order = getattr(function, "order", EDITS)
        self.watcher = watcher
        self.columns = point.columns
        self.axes = point.axes
        self.ran = False
        self.ever_ran = False
        in_decoder = watcher.is_decoder and watcher.holds(point.module)
        self.place = "anywhere" if point.site.module is not None else "decoder" if in_decoder else "after"
        self.context_of_pass: Callable[[], ForwardContext] = watcher.context_in_decoder if in_decoder else watcher.context_beside
        if self.place == "after":
            self.context_of_pass = watcher.context_after_decoder
        # edits of some columns or of axes in another order, and gates, take the ordinary way
        plain = self.columns is None and self.axes is None
        self.prepared: PreparedEdit | None = getattr(function, "prepared", None) if plain else None

    def edited(self, activation: Tensor) -> Tensor | None:
        """The new activation, None for no change. activation: what the module takes or gives, of which the site may be some columns."""
        if not self.watcher.replays and (self.watcher.inside or self.place != "decoder"):  # not where a checkpointed block is recomputed
            self.ran = self.ever_ran = True
        context = self.context_of_pass()
        if activation.is_nested:
            raise _nested(self.point)
        if self.axes is not None:
            return self._in_order_of_axes(activation, context)
        if self.columns is None and activation.dim() != 2:
            new = self.function(activation, context)
            return None if new is activation else new
        h = activation if self.columns is None else activation[..., self._columns_on(activation)]
        flat = h.dim() == 2 and h.shape[0] == context.batch * context.tokens
        if flat:
            h = h.view(context.batch, context.tokens, -1)  # [batch, tokens, width]
        new = self.function(h, context)
        if new is None or new is h:
            return None
        if flat:
            new = new.flatten(0, 1)  # [batch * tokens, width]
        return self._in_columns(activation, new)

    def _in_order_of_axes(self, activation: Tensor, context: ForwardContext) -> Tensor | None:
        """Brings batch and tokens to the front, and several streams side by side, and back."""
        assert self.axes is not None
        ordered = activation.permute(self.axes)
        h = ordered.flatten(2)  # [batch, tokens, streams * width]
        new = self.function(h, context)
        if new is None or new is h:
            return None
        return new.reshape(ordered.shape).permute([self.axes.index(axis) for axis in range(len(self.axes))])

    def _in_columns(self, activation: Tensor, new: Tensor) -> Tensor:
        if self.columns is None:
            return new
        if isinstance(self.columns, Tensor):
            return activation.index_copy(-1, self._columns_on(activation), new)  # type: ignore[arg-type]
        return activation.slice_scatter(new, -1, self.columns.start, self.columns.stop)

    def _columns_on(self, activation: Tensor) -> Tensor | slice:
        if isinstance(self.columns, Tensor) and self.columns.device != activation.device:
            self.columns = self.columns.to(activation.device)
        assert self.columns is not None
        return self.columns

    def edited_in(self, value: Any) -> Any:
        """Edits the activation in what a module takes or gives: a tensor, or the first entry of a tuple or list. None for no change."""
        if isinstance(value, Tensor):
            return self.edited(value)
        if not isinstance(value, (tuple, list)) or not value or not isinstance(value[0], Tensor):
            raise _no_tensor(self.point, value)
        new = self.edited(value[0])
        if new is None:
            return None
        if isinstance(value, list):
            return [new, *value[1:]]
        make = getattr(value, "_make", tuple)  # of a named tuple
        return make((new, *value[1:]))


class OutputHook(SiteHook):
    """Edits what a module gives."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        prepared = self.prepared
        if prepared is not None and output.__class__ is Tensor:
            live = prepared.group.live
            if prepared.fits is live:  # shape and type of an activation cost as much to look at as the addition itself
                self.ran = True
                return output + prepared.folded if prepared.is_plain_add else prepared.edited(output)
            if live is not None and (new := prepared(output)) is not None:
                self.ran = True
                return new
        return self.edited_in(output)


class InputHook(SiteHook):
    """Edits an argument of a module, mostly the first."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        argument = self.point.argument
        if isinstance(argument, int) and 0 < argument < len(args):
            new = self.edited_in(args[argument])
            return None if new is None else ((*args[:argument], new, *args[argument + 1 :]), kwargs)
        if isinstance(argument, str) and argument in kwargs:
            new = self.edited_in(kwargs[argument])
            return None if new is None else (args, {**kwargs, argument: new})
        if args:
            new = self.edited_in(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), None)
        if name is None:
            raise _no_arguments(self.point)
        new = self.edited_in(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})


class Installation:
    """The hooks of one user of a model, which go on and come off together.

    Nothing of the model changes but its hook dictionaries, and there only our own entries.

    Args:
        functions: what is called at each hook point, in order, before everybody else's hooks.

    Attributes:
        watchers: of the stacks that have hooks, by their roots, from `install` on.
        hooks: the hooks at sites.

    Example:
        >>> installation = Installation(model, Anatomy.find(model), [(point, function)])
        >>> try:
        ...     installation.install()
        ...     model(**batch)
        ... finally:
        ...     installation.remove()
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy | None, functions: Sequence[tuple[HookPoint, HookFunction]]) -> None:
        self.watchers: dict[nn.Module, Watcher] = {}
        self.hooks: list[SiteHook] = []
        self._model = model
        self._anatomy = anatomy
        self._functions = functions

    def install(self) -> None:
        """Puts the hooks on. Where this is interrupted, `remove` takes off what is on."""
        prepare_compile()
        main = self._model if self._anatomy is None else self._anatomy.main.decoder
        for point, function in self._functions:
            anatomy = point.anatomy or self._anatomy
            watcher = self._watcher(main if anatomy is None else anatomy.decoder, anatomy, main)
            self.hooks.append((OutputHook if point.side == "output" else InputHook)(point, function, watcher))
        for hook in self.hooks:
            register_hook(hook.point.module, hook, before=hook.point.side == "input")
        for watcher in self.watchers.values():
            watcher.set_site_hooks([*watcher.site_hooks, *(hook for hook in self.hooks if hook.watcher is watcher)])

    def _watcher(self, root: nn.Module, anatomy: Anatomy | None, main: nn.Module) -> Watcher:
        """The watcher of a stack, made and set to follow its passes where there is none."""
        if root in self.watchers:
            return self.watchers[root]
        live = WATCHERS[root]() if root in WATCHERS else None
        if live is None:
            live = Watcher(root, is_decoder=anatomy is not None, main_root=main)
            live.response = annotation_for(root, "response", main)
            live.turns = annotation_for(root, "turns", main)
        self.watchers[root] = live  # before anybody finds it, so that an interrupt takes it away
        WATCHERS[root] = weakref.ref(live)
        live.follow(self._model, anatomy)
        return live

    def remove(self) -> None:
        """Takes the hooks off, and those of each watcher after the last of all its users; done again, it does nothing."""
        for hook in self.hooks if self.watchers else ():
            unregister_hook(hook.point.module, hook)
        removed = set(map(id, self.hooks))
        for root, watcher in list(self.watchers.items()):
            watcher.set_site_hooks([hook for hook in watcher.site_hooks if id(hook) not in removed])
            if not watcher.site_hooks:
                watcher.remove()
                if root in WATCHERS and WATCHERS[root]() is watcher:
                    WATCHERS.pop(root)
            self.watchers.pop(root)


def prepare_compile() -> None:
    """Makes everything that is compiled from now on look at hooks, so that attaching later drops no compiled code.

    Attaching does this by itself. Call it before the first compiled call when plans will come and go: the first attach then costs no
    more than the trace of the steered code, and later ones find it ready.

    Example:
        >>> steer.prepare_compile()
        >>> compiled = torch.compile(model)  # plans may be attached after its first call
        >>> steer.undo_prepare_compile()
    """
    import torch._dynamo.config as dynamo

    if not dynamo.skip_nnmodule_hook_guards:
        return
    dynamo.skip_nnmodule_hook_guards = False
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and frames.input_codes.seen:
        log.info("code compiled so far does not look at hooks: dynamo is reset (calling steer.prepare_compile() first avoids this)")
        torch._dynamo.reset()


def undo_prepare_compile() -> None:
    """Gives dynamo its default back: compiled code does not look at hooks. Only safe when nothing will be attached any more.

    Example:
        >>> steer.prepare_compile()
        >>> steer.undo_prepare_compile()
    """
    import torch._dynamo.config as dynamo

    dynamo.skip_nnmodule_hook_guards = True


# ---- errors


def _no_tensor(point: HookPoint, value: Any) -> SiteError:
    return SiteError(
        f"'{point.site}' gives no tensor",
        expected="a tensor or a tuple that starts with one",
        found=type(value).__name__,
        remedy="choose the other side of this module, or a module inside it",
    )


def _nested(point: HookPoint) -> SiteError:
    return SiteError(
        f"'{point.site}' is a nested tensor in this forward pass",
        expected="[batch, tokens, width]",
        found="texts of different length without their padding, as nn.TransformerEncoder packs them without gradients",
        remedy="make it with enable_nested_tensor=False, or set its attribute use_nested_tensor to False",
    )


def _no_arguments(point: HookPoint) -> SiteError:
    return SiteError(
        f"'{point.site}' was called without arguments",
        expected="a call with the activation as first argument",
        found="a call with none",
        remedy="choose the output of this module",
    )
