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
from steer.model.own_calls import texts_call
from steer.model.prefix import agree, looks, may_share, replaced_forwards
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
    if shared is None or depth == 0:
        return lambda batch: nullcontext()
    n = len(shared.anatomy.blocks)
    # where nothing acts, the pass is that of all arms: what reaches some depths is kept for those that act above them
    wanted = sorted({part for part in (n // 3, 2 * n // 3, 7 * n // 8) if part > 0}) if depth == n else [depth]
    shared.check_weights(wanted)
    return partial(shared.around, depth, wanted)


@dataclass(eq=False)
class _LowerBlocks:
    """Residual streams by depth and batch, of weights as they were when they were kept."""

    anatomy: Anatomy
    model: weakref.ref[nn.Module]
    most_bytes: int
    kept: dict[int, dict[tuple[Any, ...], Any]] = field(default_factory=dict)  # by depth and batch
    weights: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # by depth
    n_bytes: int = 0

    def check_weights(self, wanted: list[int]) -> None:
        """Forgets what other weights gave, and notes those of the depths that are `wanted`."""
        sums: dict[int, tuple[int, float]] = {}
        for depth in sorted({*self.weights, *wanted}):
            weights = self._weights(depth, sums)
            if self.weights.get(depth, weights) != weights:
                self.n_bytes -= sum(_hidden(given).nbytes for given in self.kept.pop(depth, {}).values())
            self.weights[depth] = weights

    @contextmanager
    def around(self, depth: int, wanted: list[int], batch: Mapping[str, Tensor]) -> Iterator[None]:
        """A pass that begins at the largest depth up to `depth` that is kept, and keeps what reaches those of `wanted`."""
        blocks = self.anatomy.blocks
        key = tuple((name, tensor.shape, *tensor.flatten().tolist()) for name, tensor in sorted(batch.items()))
        start = max((at for at, batches in self.kept.items() if at <= depth and key in batches), default=0)
        forwards = {}
        for at in wanted:
            if at > start and key not in self.kept.get(at, {}):
                forwards[blocks[at - 1]] = partial(self._record, blocks[at - 1].forward, at, key)
        # a pass may fail where it begins; what it began with stays good
        with resumed(blocks, start, self.kept[start][key] if start else None, 1), replaced_forwards(forwards):
            yield

    def _record(self, forward: Callable[..., Any], depth: int, key: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        given = forward(*args, **kwargs)
        hidden = _hidden(given)
        if self.n_bytes + hidden.nbytes <= self.most_bytes:
            copied = hidden.detach().clone()  # a hook may write into what the block gave
            self.kept.setdefault(depth, {})[key] = copied if isinstance(given, Tensor) else type(given)((copied, *given[1:]))
            self.n_bytes += hidden.nbytes
        return given

    def _weights(self, depth: int, sums: dict[int, tuple[int, float]]) -> tuple[Any, ...]:
        """Which tensors the blocks below a depth and the modules around the blocks have, and their sums: `.data` is edited unseen.

        sums: version and sum by the id of a tensor; what is not in it is added.
        """
        above = {id(module) for block in self.anatomy.blocks[depth:] for module in block.modules()}
        model = self.model()
        assert model is not None  # it was found by it
        modules = [module for module in model.modules() if id(module) not in above]
        tensors = [tensor for module in modules for each in (module._parameters, module._buffers) for tensor in each.values()]
        here = [each for each in tensors if each is not None]
        for each in here:
            if id(each) not in sums:
                sums[id(each)] = (each._version, float(each.detach().sum(dtype=accumulation_dtype(each.device))))
        kind = input_device(model).type
        return (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), *((id(each), *sums[id(each)]) for each in here))


def _hidden(given: Any) -> Tensor:
    """The residual stream of what a block gives."""
    return given if isinstance(given, Tensor) else given[0]


def untouched_blocks(model: nn.Module, anatomy: Anatomy) -> int:
    """How many blocks, from the lowest, give what they give without any hook; 0 where one acts before them or on the whole model."""
    place = {id(module): layer for layer, block in enumerate(anatomy.blocks) for module in block.modules()}
    depth = len(anatomy.blocks)
    for module in model.modules():
        before, behind = (any(map(looks, hooks.values())) for hooks in (module._forward_pre_hooks, module._forward_hooks))
        before = before or "forward" in vars(module)  # somebody's wrapper
        if before or behind:
            layer = place.get(id(module))
            if layer is None:
                return 0
            only_output = module is anatomy.blocks[layer] and not before
            depth = min(depth, layer + only_output)
    return depth


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
