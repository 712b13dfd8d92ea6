"""Lower blocks shared between measurements: what reaches the first block where anything acts is kept, and later passes begin there.

Arms of an experiment that act at block 26 of 30 compute the same residual streams below it for the same texts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steer.model.anatomy import Anatomy
from steer.model.capture import evaluating
from steer.model.devices import accumulation_dtype, input_device
from steer.model.hook_registration import OwnHook
from steer.model.own_calls import texts_call
from steer.model.prefix import agree, is_foreign, may_share, replaced_forwards
from steer.model.restoring import restoring
from steer.model.resume import recorded_blocks, resumed

Passes = Callable[[Mapping[str, Tensor]], AbstractContextManager[None]]  # what to enter around the pass over a batch
_SHARED: weakref.WeakKeyDictionary[nn.Module, _LowerBlocks] = weakref.WeakKeyDictionary()
_TRIAL_TOKENS = 6


@contextmanager
def sharing_lower_blocks(model: nn.Module, most_bytes: int = 1 << 28) -> Iterator[None]:
    """Lets `summed_logprobs` and the like begin where what is attached begins to act, within the block of code.

    The first pass over a batch keeps what reaches the first block where a hook edits or looks; other passes over it with hooks from the
    same block on begin there, with the same results to the bit. Weights, buffers and hooks are looked at anew for every call. A model
    whose upper blocks need more than what the lower ones give, as a trial at the start finds, runs whole.

    Args:
        most_bytes: of what is kept; batches beyond that run whole.
    """
    anatomy = Anatomy.find(model)
    if model in _SHARED or not may_share(model) or not _can_resume(model, anatomy):
        yield
        return

    def forget() -> None:
        _SHARED.pop(model, None)

    with restoring(forget):
        _SHARED[model] = _LowerBlocks(anatomy, weakref.ref(model), most_bytes)
        yield


def shared_passes(model: nn.Module) -> Passes:
    """What to enter around each pass of a model over a batch, without a cache: it skips the blocks whose outcome is known.

    Hooks and weights are looked at here, once for all passes that follow.
    """
    shared = _SHARED.get(model)
    depth = 0 if shared is None else untouched_blocks(model, shared.anatomy)
    if shared is None or not 0 < depth < len(shared.anatomy.blocks):  # nothing to skip, or nothing that acts
        return lambda batch: nullcontext()
    shared.check_weights(depth)
    return partial(shared.around, depth)


@dataclass(eq=False)
class _LowerBlocks:
    """Residual streams by depth and batch, of weights as they were when they were kept."""

    anatomy: Anatomy
    model: weakref.ref[nn.Module]
    most_bytes: int
    kept: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    weights: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # by depth
    n_bytes: int = 0

    def check_weights(self, depth: int) -> None:
        """Forgets all that other weights gave."""
        weights = self._weights(depth)
        if self.weights.get(depth, weights) != weights:
            self.kept.clear()
            self.weights.clear()
            self.n_bytes = 0
        self.weights[depth] = weights

    @contextmanager
    def around(self, depth: int, batch: Mapping[str, Tensor]) -> Iterator[None]:
        blocks = self.anatomy.blocks
        key = (depth, *((name, tensor.shape, *tensor.flatten().tolist()) for name, tensor in sorted(batch.items())))
        if key in self.kept:
            with resumed(blocks, depth, self.kept[key], 1):
                yield
            return
        block = blocks[depth - 1]
        forward = block.forward

        def recording(*args: Any, **kwargs: Any) -> Any:
            given = forward(*args, **kwargs)
            self._keep(key, given)
            return given

        with replaced_forwards({block: recording}):
            yield

    def _keep(self, key: tuple[Any, ...], given: Any) -> None:
        hidden = given if isinstance(given, Tensor) else given[0]
        if self.n_bytes + hidden.nbytes > self.most_bytes:
            return
        copied = hidden.detach().clone()  # a hook may write into what the block gave
        self.kept[key] = copied if isinstance(given, Tensor) else type(given)((copied, *given[1:]))
        self.n_bytes += hidden.nbytes

    def _weights(self, depth: int) -> tuple[Any, ...]:
        """Which tensors the blocks below a depth and the modules around the blocks have, and their sums: `.data` is edited unseen."""
        above = {id(module) for block in self.anatomy.blocks[depth:] for module in block.modules()}
        model = self.model()
        assert model is not None  # it was found by it
        modules = [module for module in model.modules() if id(module) not in above]
        tensors = [tensor for module in modules for each in (module._parameters, module._buffers) for tensor in each.values()]
        here = [each for each in tensors if each is not None]
        sums = [(id(each), each._version, float(each.detach().sum(dtype=accumulation_dtype(each.device)))) for each in here]
        kind = input_device(model).type
        return (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), *sums)


def untouched_blocks(model: nn.Module, anatomy: Anatomy) -> int:
    """How many blocks, from the lowest, give what they give without any hook; 0 where one acts before them or on the whole model."""
    place = {id(module): layer for layer, block in enumerate(anatomy.blocks) for module in block.modules()}
    depth = len(anatomy.blocks)
    for module in model.modules():
        before, behind = (any(map(_looks, hooks.values())) for hooks in (module._forward_pre_hooks, module._forward_hooks))
        before = before or "forward" in vars(module)  # somebody's wrapper
        if before or behind:
            layer = place.get(id(module))
            if layer is None:
                return 0
            only_output = module is anatomy.blocks[layer] and not before
            depth = min(depth, layer + only_output)
    return depth


def _looks(hook: Any) -> bool:
    """It edits or reads an activation; whoever only follows the passes of a model does not mind a block that is skipped."""
    return hook.at_site if isinstance(hook, OwnHook) else is_foreign(hook)


def _can_resume(model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether passes that begin in the middle give what whole ones give, at three depths."""
    n = len(anatomy.blocks)
    if n < 2 or texts_call(model, anatomy) is not model:
        return False
    ids = torch.arange(2 * _TRIAL_TOKENS, device=input_device(model)).reshape(2, _TRIAL_TOKENS) % 7
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(model):
        whole = model(**batch, use_cache=False)
        if not isinstance(getattr(whole, "logits", None), Tensor):
            return False
        for depth in sorted({1, n // 2, n - 1}):
            with recorded_blocks(anatomy.blocks, [depth]) as records:
                model(**batch, use_cache=False)
            with resumed(anatomy.blocks, depth, records[depth], 1):
                if not agree(whole.logits, model(**batch, use_cache=False).logits):
                    return False
    return True
