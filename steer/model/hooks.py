"""Hook installation: one tap per hook point, and one watcher per decoder that reads the forward context.

torch.compile (2.13) does not guard the hooks of a module that had none when it was traced: a hook that comes later is silently ignored. So a
tap that arrives at, or leaves, a module without an armed hook resets dynamo when anything was compiled; `arm` puts no-op hooks on every
standard site beforehand, which makes attaching and detaching free of recompilation.
"""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import ContextError, HookDidNotRunError, SiteError
from steer.model import context
from steer.model.anatomy import Anatomy, HookPoint
from steer.model.context import ForwardContext

log = logging.getLogger("steer")

SEEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "labels")

Act = Callable[[Tensor, ForwardContext], Tensor | None]


def _inert(*_: Any) -> None:
    """What a tap becomes in a copied model."""


class _NotCopied:
    """A hook that stays with its model: `copy.deepcopy` and pickling put a no-op in its place and say so."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        warnings.warn("a hooked model was copied: the copy is neither steered nor monitored; attach to the copy if it should be", stacklevel=2)
        return _inert

    def __reduce__(self) -> Any:
        return _inert_factory, ()


def _inert_factory() -> Callable[..., None]:
    return _inert


def split(value: Any, point: HookPoint) -> Tensor:
    """The activation in what a module returned: a tensor, or the first entry of a tuple or list."""
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(first, Tensor):
        raise SiteError(
            f"'{point.site}' gives no tensor", expected="a tensor or a tuple that starts with one", found=type(value).__name__
        )
    return first


def join(value: Any, new: Tensor) -> Any:
    """Puts a new activation where `split` found the old one."""
    if isinstance(value, tuple):
        return (new, *value[1:])
    if isinstance(value, list):
        return [new, *value[1:]]
    return new


class Tap(_NotCopied):
    """The hook on one hook point. Calls `act(h, context)`, h [batch, tokens, width]; None or h itself leaves the model's tensor alone."""

    def __init__(self, point: HookPoint, act: Act, watcher: Watcher) -> None:
        self.point, self.act, self.watcher, self.ran = point, act, watcher, False
        self.columns = point.columns

    def _edit(self, whole: Tensor) -> Tensor | None:
        self.ran = True
        ctx = self.watcher.context_of(whole)
        h = whole if self.columns is None else whole[..., self._columns_on(whole)]
        flat = h.dim() == 2 and ctx.tokens > 0
        if flat:
            h = h.view(ctx.batch, ctx.tokens, -1)
        new = self.act(h, ctx)
        if new is None or new is h:
            return None
        if flat:
            new = new.flatten(0, 1)
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

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        new = self._edit(split(output, self.point))
        return None if new is None else join(output, new)

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = self._edit(split(args[0], self.point))
            return None if new is None else ((join(args[0], new), *args[1:]), kwargs)
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), None)
        if name is None:
            raise SiteError(f"'{self.point.site}' was called without arguments")
        new = self._edit(split(kwargs[name], self.point))
        return None if new is None else (args, {**kwargs, name: join(kwargs[name], new)})


class _Output(_NotCopied):
    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.tap.on_output(module, args, output)


class _Input(_NotCopied):
    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.tap.on_input(module, args, kwargs)


class _Armed(_NotCopied):
    """A hook that does nothing, but makes dynamo guard the hooks of its module."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        return None


class _Look(_NotCopied):
    """Pre-hook that notes the arguments of one module on the way down to the decoder; the decoder's own opens the context."""

    def __init__(self, watcher: Watcher, module: nn.Module, depth: int) -> None:
        self.watcher, self.depth = watcher, depth
        forward = inspect.signature(module.forward).parameters
        self.positional = [name for name, parameter in forward.items() if parameter.kind is not parameter.VAR_KEYWORD]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watcher = self.watcher
        if self.depth <= watcher.depth:  # a new pass starts, also after one that failed half-way
            watcher.given = {}
        watcher.depth = self.depth
        given = watcher.given
        for name, value in zip(self.positional, args, strict=False):
            if name in SEEN and value is not None:
                given[name] = value
        for name in SEEN:
            value = kwargs.get(name)
            if value is not None:
                given[name] = value
        if module is watcher.root:
            watcher.open()


class _Close(_NotCopied):
    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.watcher.close()


class Watcher:
    """Keeps the forward context of one model while anything is attached to it."""

    def __init__(self, model: nn.Module, anatomy: Anatomy | None) -> None:
        self.anatomy = anatomy
        self.given: dict[str, Any] = {}
        self.depth = sys.maxsize
        self.announced: Tensor | None = None
        self.current: ForwardContext | None = None
        self.pending: list[ForwardContext] = []  # passes whose backward may still recompute a checkpointed block
        self.replayed = False
        self.taps: list[Tap] = []
        self.on_close: list[Callable[[ForwardContext], None]] = []
        self.handles: list[Any] = []
        chain = anatomy.chain if anatomy is not None else [model]
        self.root = chain[-1]
        # A property on PEFT's layers; transformers' own models have a method of that name.
        self.adapter = next((module for module in model.modules() if isinstance(getattr(type(module), "disable_adapters", None), property)), None)
        for depth, module in enumerate(chain):
            self.handles.append(module.register_forward_pre_hook(_Look(self, module, depth), with_kwargs=True))
        self.handles.append(self.root.register_forward_hook(_Close(self)))

    def open(self) -> None:
        reference = self.adapter is not None and bool(self.adapter.disable_adapters)
        ctx = context.build(self.given, self.announced, reference)
        self.given, self.depth = {}, sys.maxsize
        for tap in self.taps:
            tap.ran = False
        self.current = ctx
        if ctx.phase == "train" and not torch.compiler.is_compiling():
            if self.replayed:
                self.pending, self.replayed = [], False
            self.pending = [*self.pending[-3:], ctx]

    def close(self) -> None:
        assert self.current is not None
        # The unembedding runs after the decoder, so its taps cannot have been reached yet.
        missing = [tap.point for tap in self.taps if not tap.ran and tap.point.site.part != "logits"]
        if missing:
            raise HookDidNotRunError(
                f"the forward pass never reached {', '.join(str(point.site) for point in missing)}",
                expected="every attached site to run once per pass",
                found=f"modules {[point.path for point in missing]} were not called",
                remedy="the model changed after the attach (adapters merged, modules replaced): detach and attach again",
            )
        for act in self.on_close:
            act(self.current)

    def context_of(self, h: Tensor) -> ForwardContext:
        """The context that `h` belongs to; during a recompute that is the pass being differentiated, not the latest one."""
        if context.in_backward() and self.pending:
            self.replayed = True
            fitting = [ctx for ctx in self.pending if ctx.batch * ctx.tokens == h.shape[: h.dim() - 1].numel()]
            if len(fitting) > 1:
                raise ContextError(
                    f"{len(fitting)} forward passes of one shape wait for the same backward under gradient checkpointing",
                    remedy="use block sites (layers.N.output), which are not recomputed, or call backward after each forward",
                )
            if fitting:
                return fitting[0]
        if self.current is None:
            raise ContextError(
                "a site ran outside a forward pass of its model",
                remedy="call the model, or the wrapper that was attached to, not one of its parts",
            )
        return self.current

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


_watchers: weakref.WeakKeyDictionary[nn.Module, Watcher] = weakref.WeakKeyDictionary()
_armed: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()


def watcher_of(model: nn.Module) -> Watcher | None:
    """The live watcher of a model, reached from any wrapper around it."""
    return next((_watchers[module] for module in model.modules() if module in _watchers), None)


def _reset_compiled(model: nn.Module, points: list[HookPoint]) -> None:
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is None or not frames.input_codes.seen or all(point.module in _armed for point in points):
        return
    log.info("compiled code does not see the hooks of sites that were not armed: dynamo is reset (steer.arm(model) avoids this)")
    torch._dynamo.reset()
    for module in model.modules():
        if vars(module).get("_compiled_call") is not None:  # kept by transformers' generate; built again on the next call
            module._compiled_call = None  # type: ignore[assignment]


def install(model: nn.Module, anatomy: Anatomy | None, acts: list[tuple[HookPoint, Act]]) -> Callable[[], None]:
    """Puts one tap on each hook point, in order, and returns the function that takes them off again.

    Nothing of the model changes but its hook dictionaries, and there only our own entries.
    """
    watcher = watcher_of(model)
    points = [point for point, _ in acts]
    _reset_compiled(model, points)
    if watcher is None:
        watcher = Watcher(model, anatomy)
        _watchers[watcher.root] = watcher
    owner, taps, handles = watcher, [], []
    for point, act in acts:
        tap = Tap(point, act, owner)
        if point.side == "output":
            handles.append(point.module.register_forward_hook(_Output(tap)))
        else:
            handles.append(point.module.register_forward_pre_hook(_Input(tap), with_kwargs=True))
        taps.append(tap)
    owner.taps = [*owner.taps, *taps]

    def remove() -> None:
        for handle in handles:
            handle.remove()
        owner.taps = [tap for tap in owner.taps if tap not in taps]
        if not owner.taps and not owner.on_close:
            owner.remove()
            _watchers.pop(owner.root, None)
        _reset_compiled(model, points)

    return remove


def arm(model: nn.Module) -> None:
    """Makes every standard site of a decoder visible to torch.compile, so that attaching later never recompiles.

    Call it once, before the first compiled call. It leaves a no-op hook (about 2 us per block and pass) on each block and each of its parts.
    """
    anatomy = Anatomy.find(model)
    modules: dict[nn.Module, None] = dict.fromkeys(anatomy.chain)
    for site in anatomy.sites("layers.*.output", "layers.*.attn.output", "layers.*.attn.z", "layers.*.mlp.output", "final_norm"):
        modules[anatomy.point(site).module] = None
    points = [HookPoint(anatomy.sites("embed")[0], module, "", "output", None) for module in modules]
    _reset_compiled(model, points)
    for module in modules:
        if module not in _armed:
            noop = _Armed()
            _armed[module] = [module.register_forward_hook(noop), module.register_forward_pre_hook(noop)]


def disarm(model: nn.Module) -> None:
    """Takes the no-op hooks of `arm` off again."""
    for module in model.modules():
        for handle in _armed.pop(module, []):
            handle.remove()


@contextmanager
def response_tokens(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Says which tokens are the response, where the forward pass is not given labels (DPO, GRPO, a loss of one's own).

    Args:
        mask: [batch, tokens] bool, or [batch, completion tokens] belonging to the right end; labels with -100 are accepted too.
    """
    watcher = watcher_of(model)
    if watcher is None or mask is None:
        yield
        return
    before, watcher.announced = watcher.announced, mask.bool() if mask.dtype is not torch.long or int(mask.min()) >= 0 else mask != -100
    try:
        yield
    finally:
        watcher.announced = before
