"""Watcher: follows the forward passes of one model and knows, at every site, which pass an activation belongs to."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steer.errors import ContextError, HookDidNotRunError
from steer.model import announced, context
from steer.model import cache as notes
from steer.model.anatomy import Anatomy, check_model
from steer.model.context import SEEN, ForwardContext

if TYPE_CHECKING:
    from steer.model.hooks import Tap

IDLE = -1
COPIED = "a hooked model was copied: the copy is neither steered nor monitored; attach to it if it should be"


def _inert(*_: Any) -> None:
    """What a hook of ours becomes in a copied model."""


def _make_inert() -> Callable[..., None]:
    return _inert


class NotCopied:
    """A hook that stays with its model: `copy.deepcopy` and pickling put a no-op in its place, and say so."""

    def __deepcopy__(self, memo: dict[Any, Any]) -> Callable[..., None]:
        if "steer" not in memo:  # once per copied model, not once per hook
            memo["steer"] = True
            warnings.warn(COPIED, stacklevel=3)
        return _inert

    def __reduce__(self) -> Any:
        warnings.warn(COPIED, stacklevel=2)
        return _make_inert, ()


def register(module: nn.Module, hook: NotCopied, *, before: bool, always: bool = False, first: bool = False) -> Callable[[], None]:
    """Puts a hook of ours on a module and returns the function that takes it off.

    Done on the dictionaries themselves, because `register_forward_hook` numbers hooks through the process and compiled code is bound to
    those numbers: every new attach would be compiled anew. Ours are -1, -2, ... on each module, so that the same plan finds its code again.

    Args:
        before: run before the forward, with keyword arguments.
        always: run after a forward that raised, too.
        first: run before everybody else's hooks (after ours that came earlier), so that whoever only looks sees what the model goes on
            with. transformers records `hidden_states` by hooks that stay on a model after its first `output_hidden_states=True`.
    """
    hooks: Any = module._forward_pre_hooks if before else module._forward_hooks  # OrderedDicts, by number
    marked: list[Any] = [module._forward_pre_hooks_with_kwargs] if before else [module._forward_hooks_always_called] if always else []
    key = next(-n for n in range(1, len(hooks) + 2) if -n not in hooks)
    hooks[key] = hook
    for marks in marked:
        marks[key] = True
    if first:
        ours = [known for known, one in hooks.items() if isinstance(one, NotCopied) and not isinstance(one, (_Enter, _Leave))]
        for known in reversed(ours):
            hooks.move_to_end(known, last=False)

    def remove() -> None:
        for entries in (hooks, *marked):
            entries.pop(key, None)

    return remove


class _Enter(NotCopied):
    """Pre-hook of one module between the given model and its decoder: notes the arguments that tell tokens apart."""

    def __init__(self, watcher: Watcher, module: nn.Module, height: int) -> None:
        self.watcher, self.height = watcher, height
        parameters = inspect.signature(module.forward).parameters.values()
        self.positional = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watcher = self.watcher
        if self.height >= watcher.height:  # not called by the module entered last: a new pass
            watcher.begin(self.height)
        watcher.height = self.height
        given = watcher.given
        if args:
            for name, value in zip(self.positional, args, strict=False):
                if name in SEEN and value is not None:
                    given[name] = value
        for name in SEEN:
            value = kwargs.get(name)
            if value is not None:
                given[name] = value
                if name == "inputs_embeds":  # a wrapper embeds the ids itself, perhaps with more tokens (prompt tuning)
                    given.pop("input_ids", None)
        if self.height == 0:
            watcher.open()


class _Leave(NotCopied):
    """Hook of the same module that runs when its forward ends, by an exception too (`output` is None then)."""

    def __init__(self, watcher: Watcher, height: int) -> None:
        self.watcher, self.height = watcher, height

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.watcher.is_foreign():
            return
        if self.height == 0:
            self.watcher.close(output)
        self.watcher.leave(self.height, output)


class Watcher:
    """Keeps the forward context of one model while anything is attached to it.

    Attributes:
        root: the decoder; the model itself when it is none.
        current: context of the pass that runs or ran last.
        inside: the root's forward is running.
        differentiated: the pass whose output got its gradient last; a recompute of gradient checkpointing belongs to it.
        thread: in which the running pass began.
        outermost: height above the root of the module that the running pass began with; `height` that of the one entered last.
        replays: compiled code with gradient checkpointing, where taps inside a block cannot note that they ran.
        around: context of the running pass for modules beside the decoder, made when one asks.
        adapter: a layer of PEFT's, which knows what is switched on; `prefixed`, the PEFT model that tunes a prefix.
        announced: response mask from `response_tokens`; `turns`, chat roles from `chat_roles`.
    """

    def __init__(self, root: nn.Module, *, is_decoder: bool) -> None:
        self.root, self.is_decoder = root, is_decoder
        self.given: dict[str, Any] = {}
        self.height = self.outermost = IDLE
        self.announced, self.turns = announced.latest(root, "announced"), announced.latest(root, "turns")
        self.current: ForwardContext | None = None
        self.inside = False
        self.differentiated: ForwardContext | None = None
        self.around: ForwardContext | None = None
        self.taps: list[Tap] = []
        self.on_open: list[Callable[[ForwardContext], None]] = []
        self.on_close: list[Callable[[ForwardContext], None]] = []
        self.adapter: Any = None
        self.prefixed: Any = None
        self.thread = 0
        self.block: nn.Module | None = None
        self.replays = False
        self._removals: dict[nn.Module, list[Callable[[], None]]] = {}

    def follow(self, model: nn.Module, anatomy: Anatomy | None) -> None:
        """Watches every module from `model` down to the root; called again when a later attach comes through another wrapper."""
        chain = anatomy.chain if anatomy is not None else [model]
        for height, module in enumerate(reversed(chain)):
            compiled = "_orig_mod" in module._modules  # adds no arguments, and its hooks run outside the compiled graph
            if module not in self._removals and not compiled:
                enter = register(module, _Enter(self, module, height), before=True)
                leave = register(module, _Leave(self, height), before=False, always=True)
                self._removals[module] = [enter, leave]
        self.block = anatomy.blocks[0] if anatomy is not None else None
        for module in chain:
            if str(getattr(getattr(module, "active_peft_config", None), "peft_type", "")).endswith("PREFIX_TUNING"):
                self.prefixed = module
        if self.adapter is None:
            # A property on PEFT's layers; transformers' own models have a method of that name.
            self.adapter = next((m for m in model.modules() if isinstance(getattr(type(m), "disable_adapters", None), property)), None)

    def remove(self) -> None:
        for removals in self._removals.values():
            for removal in removals:
                removal()

    # ---- the course of a pass

    def is_foreign(self) -> bool:
        """Another thread is in a pass."""
        return self.outermost != IDLE and not torch.compiler.is_compiling() and self.thread not in (0, threading.get_ident())

    def begin(self, height: int) -> None:
        """The outermost module of a pass is entered. Raises ContextError while another thread is in one."""
        if self.is_foreign():
            raise ContextError(
                "two threads call a steered model at a time",
                expected="one forward pass after the other",
                found=f"a pass in thread {threading.get_ident()} while one runs in thread {self.thread}",
                remedy="put a lock around the calls, or give each thread a copy of the model and a plan of its own",
            )
        self.thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        self.outermost, self.given, self.around, self.inside = height, {}, None, False

    def open(self) -> None:
        """The root is entered: everything that tells tokens apart is known."""
        self.replays = torch.compiler.is_compiling() and self._is_checkpointed()
        if not self.replays:
            for tap in self.taps:
                tap.ran = False
        self.current = ctx = context.build(
            self.given, self.announced, self._is_reference(), turns=self.turns, decoder=self.is_decoder, virtual=self._virtual()
        )
        self.inside = True
        if not context.in_backward():
            self.differentiated = None
        for prepare in self.on_open:
            prepare(ctx)

    def close(self, output: Any) -> None:
        """The root is left. Raises HookDidNotRunError when it ended well and an attached site was not reached."""
        self.inside, ctx = False, self.current
        if output is None or ctx is None:
            return
        if not self.replays:
            self._check("decoder")
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                self._mark(output, ctx)
            if context.in_backward():
                return  # a recompute of the whole model: it was counted when it ran first
        if self.given.get("past_key_values") is None and (cache := getattr(output, "past_key_values", None)) is not None:
            self._note(cache, ctx)
        for act in self.on_close:
            act(ctx)

    def _note(self, cache: Any, ctx: ForwardContext) -> None:
        """The decoder made its cache itself: what it could not be told before."""
        if ctx.memory:
            notes.keep(cache, ctx.memory)
        if torch.compiler.is_compiling():
            return
        if ctx.phase != "generate":
            setattr(cache, notes.OUTSIDE, ctx.phase)
        else:
            notes.note_pass(cache, 0, ctx.tokens)

    def leave(self, height: int, output: Any) -> None:
        """A watched module is left; the unembedding, which runs after the decoder, must have been called by then."""
        if height > 0 and output is not None and not self.replays:
            self._check("after")
        if height >= self.outermost:
            self.height, self.outermost, self.given, self.around = IDLE, IDLE, {}, None

    def _check(self, place: str) -> None:
        missing = [tap.point for tap in self.taps if tap.place == place and not tap.ran]
        if missing:
            raise HookDidNotRunError(
                f"the forward pass never reached {', '.join(str(point.site) for point in missing)}",
                expected="every attached site to run once per pass",
                found=f"modules {[point.path for point in missing]} were not called",
                remedy="the model changed after the attach (adapters merged, modules replaced or bypassed): detach and attach again",
            )

    def _mark(self, output: Any, ctx: ForwardContext) -> None:
        """Autograd reaches the decoder's output before it recomputes any of its blocks: from then on, a replay belongs to this pass."""

        def reached(_: Tensor) -> None:
            self.differentiated = ctx

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(reached)

    # ---- which pass

    def context_of_decoder(self) -> ForwardContext:
        """The pass that a module of the decoder runs in: the open one, or under gradient checkpointing the one being differentiated."""
        if self.inside:
            return self.current  # type: ignore[return-value]
        if context.in_backward() and self.differentiated is not None:
            return self.differentiated
        raise ContextError(
            "a site ran outside a forward pass of its model",
            expected="a call of the model that it belongs to",
            found="a backward pass that computes it again" if context.in_backward() else "a call of one of its parts",
            remedy="call the model, or the wrapper that was attached to, and compute the loss from what that returns",
        )

    def context_after(self) -> ForwardContext:
        """The pass that the unembedding runs in, which comes after the decoder."""
        if self.current is None or context.in_backward():
            raise ContextError(
                "the unembedding ran without the decoder, or again in a backward pass",
                expected="one call of it, after the decoder",
                found="no pass of the decoder" if self.current is None else "a backward pass",
                remedy="call the whole model, and leave the unembedding out of gradient checkpointing",
            )
        return self.current

    def context_beside(self) -> ForwardContext:
        """A pass without tokens, for modules that are no part of the decoder (a vision tower, an action head, any other network)."""
        if self.around is not None:
            return self.around
        if self.outermost == IDLE and context.in_backward():
            return ForwardContext(0, 0, "train")
        ctx = context.build(self.given, self.announced, self._is_reference(), decoder=False)
        if self.outermost != IDLE:
            self.around = ctx
        return ctx

    def _is_checkpointed(self) -> bool:
        block = self.block
        if block is None or not block.training:
            return False
        return getattr(block, "gradient_checkpointing", False) or "_checkpoint_wrapped_module" in block._modules

    def _virtual(self) -> int:
        """Entries of a cache that prefix tuning puts before every text; none while the adapter is off."""
        if self.prefixed is None or "forward" in vars(self.prefixed):
            return 0
        return int(self.prefixed.active_peft_config.num_virtual_tokens)

    def _is_reference(self) -> bool:
        """True when PEFT's adapters are off, or TRL's copy of the initial adapter is on."""
        adapter = self.adapter
        return adapter is not None and (bool(adapter.disable_adapters) or "ref" in adapter.active_adapters)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for entry in output:
            yield from _tensors(entry)
    elif isinstance(output, dict):
        for entry in output.values():
            yield from _tensors(entry)


WATCHERS: weakref.WeakKeyDictionary[nn.Module, Watcher] = weakref.WeakKeyDictionary()


def watcher_of(model: nn.Module) -> Watcher | None:
    """The live watcher of a model, reached from any wrapper around it."""
    check_model(model)
    return next((WATCHERS[module] for module in model.modules() if module in WATCHERS), None)


@contextmanager
def response_tokens(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Says which tokens are the response, where the forward pass is not given labels (DPO, GRPO, a loss of one's own).

    Args:
        model: the model, or any wrapper around it; what is attached to it inside the block is told too.
        mask: [batch, tokens] bool or 0/1, or [batch, completion tokens] belonging to the right end; labels with -100 are accepted too.

    Raises:
        ConfigError: no mask. NonFiniteError: NaN or infinity in it.
    """
    if mask is None:
        yield
        return
    with _announced(model, "announced", announced.mask_of(mask)):
        yield


@contextmanager
def chat_roles(model: nn.Module, roles: Tensor) -> Iterator[None]:
    """Says whose turn each token belongs to, for scopes such as `role[user]`. Decoded tokens are the assistant's without saying so.

    Args:
        model: the model, or any wrapper around it; what is attached to it inside the block is told too.
        roles: [batch, tokens] indices into `CHAT_ROLES`, as `steer.model.tokens.encode_chat` gives them.

    Raises:
        ConfigError: no indices of roles.
    """
    with _announced(model, "turns", announced.roles_of(roles)):
        yield


@contextmanager
def _announced(model: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    def tell() -> None:
        if (watcher := watcher_of(model)) is not None:
            setattr(watcher, name, announced.latest(watcher.root, name))

    entry = announced.Announcement(model, name, value)
    announced.IN_FORCE.append(entry)
    try:
        tell()
        yield
    finally:
        announced.IN_FORCE.remove(entry)
        tell()
