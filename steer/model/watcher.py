"""Watcher: follows the forward passes of one model and knows, at every site, which pass an activation belongs to."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steer.errors import ContextError, HookDidNotRunError
from steer.model.anatomy import Anatomy
from steer.model.cache import PROMPT_PHASE, note_pass, put_memory
from steer.model.context import ForwardContext, in_backward
from steer.model.context_builder import CACHE_NAMES, build_context, context_beside_decoder, tokenless_context
from steer.model.find_stack import check_model
from steer.model.hook_registration import OwnHook, is_compiled, register_hook, unregister_hook
from steer.model.own_calls import OwnCall
from steer.model.pass_hooks import IDLE, EnterHook, LeaveHook, OpenHook
from steer.model.peft_state import NONE, PeftState
from steer.model.trial_pass import token_parameters

if TYPE_CHECKING:
    from steer.model.hooks import SiteHook


class Watcher:
    """Keeps the forward context of one model while anything is attached to it.

    Attributes:
        root: the decoder; the model itself when it is none.
        main_root: the root of the stack that the tokens of a text go through. Another one has its own call alone: what a module around
            both is given (labels, a cache, a mask) belongs to the main one.
        context: of the pass that runs or ran last.
        inside: the root's forward is running.
        differentiated: the pass whose output got its gradient last; a recompute of gradient checkpointing belongs to it.
        thread: in which the running pass began.
        outermost: height above the root of the module that the running pass began with; `height` that of the module entered last.
        gives_no_cache: a pass that asked for a cache gave none that is known, so that decoded tokens cannot be told from a prompt.
        replays: compiled code with gradient checkpointing, where site hooks inside a block cannot note that they ran.
        response, turns: annotations in force, see `steer.model.annotations`.
        site_hooks: the hooks at sites, in the order in which they were attached.
        own_call: how the root is called when it is none of transformers.
        opener: the hook that opens a pass at the first block, where the root's arguments do not tell the tokens; None where they do.
        ids_have_other_rows: a row of token ids is that of one codebook of several, and no row of the stream.
        opens_at_block: the root was entered, and its first block was not yet.
        amend: functions that may replace the facts of a pass when it opens, for callers who know more than its arguments say.
        on_open, on_close: functions called with the context when the root is entered, and when it is left well.
        on_end: functions called when the root is left, by an exception too.
    """

    def __init__(self, root: nn.Module, *, is_decoder: bool, main_root: nn.Module | None = None) -> None:
        self.root = root
        self.main_root = root if main_root is None else main_root
        self.is_decoder = is_decoder
        self.peft = PeftState()
        self.arguments: dict[str, Any] = {}
        self.height = IDLE
        self.outermost = IDLE
        self.thread = 0
        self.response: Tensor | None = None
        self.turns: Tensor | None = None
        self.context: ForwardContext | None = None
        self.inside = False
        self.differentiated: ForwardContext | None = None
        self.gives_no_cache = False
        self.replays = False
        self.site_hooks: list[SiteHook] = []
        self._hooks_by_place: dict[str, list[SiteHook]] = {}
        self._has_marks = False  # some hook may hold the mark of an earlier pass that it ran
        self.amend: list[Callable[[ForwardContext], ForwardContext]] = []
        self.on_open: list[Callable[[ForwardContext], None]] = []
        self.on_close: list[Callable[[ForwardContext], None]] = []
        self.on_end: list[Callable[[], None]] = []
        self.own_call: OwnCall | None = None
        self.opener: OpenHook | None = None
        self.ids_have_other_rows = False
        self.opens_at_block = False
        self._first_block: nn.Module | None = None
        self._image_ids: tuple[int, ...] = ()
        self._context_beside: ForwardContext | None = None
        self._members: set[int] | None = None
        self._own_hooks: dict[nn.Module, tuple[OwnHook, OwnHook]] = {}

    def follow(self, model: nn.Module, anatomy: Anatomy | None) -> None:
        """Watches every module from `model` down to the root; called again when a later attach comes through another wrapper."""
        chain = anatomy.chain if anatomy is not None else [model]
        if not self.is_main:
            chain = [self.root]
        for height, module in enumerate(reversed(chain)):
            compiled = "_orig_mod" in module._modules  # adds no arguments, and its hooks run outside the compiled graph
            if module not in self._own_hooks and not compiled:
                enter = EnterHook(self, module, height)
                leave = LeaveHook(self, height)
                self._own_hooks[module] = (enter, leave)
                register_hook(module, enter, before=True)
                register_hook(module, leave, before=False, always=True)
        if anatomy is not None and self.opener is None:
            self._follow_own(anatomy)
        self._first_block = anatomy.blocks[0] if anatomy is not None else None
        self._members = None
        self._image_ids = image_token_ids(chain) or self._image_ids
        self.peft.find(model, chain)

    @property
    def is_main(self) -> bool:
        """It follows the stack that the tokens of a text go through."""
        return self.root is self.main_root

    def _follow_own(self, anatomy: Anatomy) -> None:
        """Readies itself for a root whose arguments have names of their own, or do not tell its tokens."""
        call, axes = anatomy.stack.own_call, anatomy.stack.axes
        self.own_call = call
        self.ids_have_other_rows = getattr(getattr(self.root, "config", None), "num_codebooks", 1) > 1 and axes is not None
        tells_tokens = token_parameters(self.root) or call is not None and call.ids is not None
        if axes is None or tells_tokens and not self.ids_have_other_rows:
            return
        self.opener = OpenHook(self, anatomy.stack.argument, axes)
        register_hook(anatomy.blocks[0], self.opener, before=True)

    def set_site_hooks(self, hooks: list[SiteHook]) -> None:
        """Notes the hooks at sites, in the order in which they were attached."""
        self.site_hooks = hooks
        self._hooks_by_place = {}
        for hook in hooks:
            self._hooks_by_place.setdefault(hook.place, []).append(hook)

    def remove(self) -> None:
        """Takes the hooks off that follow the passes."""
        for module, own_hooks in self._own_hooks.items():
            for hook in own_hooks:
                unregister_hook(module, hook)
        if self.opener is not None and self._first_block is not None:
            unregister_hook(self._first_block, self.opener)

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is the root or inside it."""
        if self._members is None:
            self._members = {id(member) for member in self.root.modules()}
        return id(module) in self._members

    # ---- the course of a pass

    def is_foreign(self) -> bool:
        """Another thread is in a pass."""
        return self.outermost != IDLE and not torch.compiler.is_compiling() and self.thread not in (0, threading.get_ident())

    def begin(self, height: int) -> None:
        """The outermost module of a pass is entered. Raises ContextError while another thread is in one."""
        if self.is_foreign():
            raise _two_threads(self.thread)
        self.thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        self.outermost = height
        self.arguments = {}
        self._context_beside = None
        self.inside = False
        self.opens_at_block = False

    def open(self) -> None:
        """The root is entered: everything that tells tokens apart is known."""
        self.replays = torch.compiler.is_compiling() and self._is_checkpointed()
        if not self.replays:
            if self._has_marks:  # a pass that failed left them
                for hook in self.site_hooks:
                    hook.ran = False
            self._has_marks = True
        context = self._build_context()
        if self.gives_no_cache and context.phase == "generate" and self.arguments.get("past_key_values") is None:
            context = replace(context, unclear=True)
        for amend in self.amend:
            context = amend(context)
        self.context = context
        self.inside = True
        self.opens_at_block = False
        if not in_backward():
            self.differentiated = None
        for prepare in self.on_open:
            prepare(context)

    def _build_context(self) -> ForwardContext:
        is_reference = self.peft.is_reference()
        if not self.is_decoder:
            return context_beside_decoder(self.arguments, self.response, is_reference=is_reference)
        virtual = self.peft.virtual_tokens(self.outermost) if self.peft.models else NONE
        return build_context(
            self.arguments, self.response, is_reference=is_reference, turns=self.turns, virtual=virtual, image_ids=self._image_ids
        )

    def close(self, output: Any) -> None:
        """The root is left. Raises HookDidNotRunError when it ended well and an attached site was not reached."""
        self.inside = False
        for end in self.on_end:
            end()
        context = None if self.opens_at_block else self.context
        if self.opens_at_block and output is not None:
            raise _unreached([hook for hook in self.site_hooks if hook.place == "decoder"])
        self.opens_at_block = False
        if output is None or context is None:
            return
        if not self.replays:
            self._check_reached("decoder")
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                self._mark_differentiated(output, context)
            if in_backward():
                return  # a recompute of the whole model: it was counted when it ran first
        if self.arguments.get("past_key_values") is None:
            cache = next((cache for name in CACHE_NAMES if (cache := getattr(output, name, None)) is not None), None)
            if cache is not None:
                self._note_new_cache(cache, context)
            elif context.phase == "generate" and not isinstance(output, tuple):
                self.gives_no_cache = True
        for finish in self.on_close:
            finish(context)

    def _note_new_cache(self, cache: Any, context: ForwardContext) -> None:
        """The decoder made its cache itself, which could not be written to before."""
        if context.memory.tensors:
            put_memory(cache, context.memory)
        if torch.compiler.is_compiling():
            return
        if context.phase != "generate":
            setattr(cache, PROMPT_PHASE, context.phase)
        else:
            note_pass(cache, 0, context.tokens)

    def leave(self, height: int, output: Any) -> None:
        """A watched module is left; the unembedding, which runs after the decoder, must have been called by then."""
        if height > 0 and height >= self.outermost and output is not None and not self.replays:
            self._check_reached("after")
        if height >= self.outermost:
            self.height = IDLE
            self.outermost = IDLE
            self.arguments = {}
            self._context_beside = None

    def _check_reached(self, place: str) -> None:
        """Raises HookDidNotRunError for hooks of a place that have no mark, and takes the marks off again."""
        hooks = self._hooks_by_place.get(place, ())
        for place_in_order, hook in enumerate(hooks):
            if not hook.ran:
                raise _unreached([hook for hook in hooks[place_in_order:] if not hook.ran])
            hook.ran = False
        self._has_marks = place == "decoder" and "after" in self._hooks_by_place

    def _mark_differentiated(self, output: Any, context: ForwardContext) -> None:
        """Autograd reaches the decoder's output before it recomputes any of its blocks: from then on, a replay belongs to this pass."""

        def reached(_: Tensor) -> None:
            self.differentiated = context

        for tensor in _tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(reached)

    def _is_checkpointed(self) -> bool:
        block = self._first_block
        if block is None or not block.training:
            return False
        return getattr(block, "gradient_checkpointing", False) or "_checkpoint_wrapped_module" in block._modules

    def compiles_blocks(self) -> bool:
        """The blocks were compiled one by one, so that hooks on them run inside compiled code while the decoder's do not."""
        block = self._first_block
        return block is not None and is_compiled(block)

    # ---- which pass

    def context_in_decoder(self) -> ForwardContext:
        """The pass that a module of the decoder runs in: the open one, or under gradient checkpointing the one being differentiated."""
        if self.inside:
            return self.context  # type: ignore[return-value]
        if self.opens_at_block:  # a module before the first block
            return self.context_beside()
        if in_backward() and self.differentiated is not None:
            return self.differentiated
        raise _outside_pass()

    def context_after_decoder(self) -> ForwardContext:
        """The pass that the unembedding runs in, which comes after the decoder."""
        if self.context is None or in_backward():
            raise _unembedding_alone(self.context)
        return self.context

    def context_beside(self) -> ForwardContext:
        """A pass without tokens, for modules that are no part of the decoder (a vision tower, an action head, any other network)."""
        if self._context_beside is not None:
            return self._context_beside
        if self.outermost == IDLE and in_backward():
            return tokenless_context("train")
        context = context_beside_decoder(self.arguments, self.response, is_reference=self.peft.is_reference())
        if self.outermost != IDLE:
            self._context_beside = context
        return context


def image_token_ids(chain: list[nn.Module]) -> tuple[int, ...]:
    """Token ids that stand for images in the text, as the configs of these modules name them; () for none."""
    configs = [getattr(module, "config", None) for module in chain]
    named = (getattr(config, name, None) for config in configs for name in ("image_token_id", "image_token_index"))
    return tuple(sorted({number for number in named if isinstance(number, int)}))


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for entry in output:
            yield from _tensors_in(entry)
    elif isinstance(output, dict):
        for entry in output.values():
            yield from _tensors_in(entry)


# by root; a watcher lives as long as its hooks, and keeps no model alive that nobody else does
WATCHERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Watcher]] = weakref.WeakKeyDictionary()


def watchers_of(model: nn.Module) -> list[Watcher]:
    """The live watchers of a model, one for each stack, reached from any wrapper around it."""
    check_model(model)
    return [watcher for module in model.modules() if module in WATCHERS and (watcher := WATCHERS[module]()) is not None]


def watcher_of(model: nn.Module) -> Watcher | None:
    """The live watcher of the stack that the tokens of a text go through."""
    return next((watcher for watcher in watchers_of(model) if watcher.is_main), None)


# ---- errors


def _two_threads(thread: int) -> ContextError:
    return ContextError(
        "two threads call a steered model at a time",
        expected="one forward pass after the other",
        found=f"a pass in thread {threading.get_ident()} while one runs in thread {thread}",
        remedy="put a lock around the calls, or give each thread a copy of the model and a plan of its own",
    )


def _unreached(hooks: list[SiteHook]) -> HookDidNotRunError:
    return HookDidNotRunError(
        f"the forward pass never reached {', '.join(str(hook.point.site) for hook in hooks)}",
        expected="every attached site to run once per pass",
        found=f"modules {[hook.point.path for hook in hooks]} were not called",
        remedy="the model changed after the attach (adapters merged, modules replaced or bypassed): detach and attach again",
    )


def _outside_pass() -> ContextError:
    return ContextError(
        "a site ran outside a forward pass of its model",
        expected="a call of the model that it belongs to",
        found="a backward pass that computes it again" if in_backward() else "a call of one of its parts",
        remedy="call the model, or the wrapper that was attached to, and compute the loss from what that returns",
    )


def _unembedding_alone(context: ForwardContext | None) -> ContextError:
    return ContextError(
        "the unembedding ran without the decoder, or again in a backward pass",
        expected="one call of it, after the decoder",
        found="no pass of the decoder" if context is None else "a backward pass",
        remedy="call the whole model, and leave the unembedding out of gradient checkpointing",
    )
