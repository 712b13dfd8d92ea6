"""Shared prefixes: the tokens that several texts begin with run once, and every text continues from their KV cache.

A prefix is padded on its left and what follows it on its right, so that no padding lies inside a text: sliding windows count entries of
the cache, padding included. Positions are passed to the model, since it cannot tell them from such a batch.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.model.anatomy import Anatomy
from steer.model.hook_registration import OwnHook
from steer.model.restoring import restoring
from steer.model.tokens import Row, collate
from steer.model.watcher import watchers_of

LEAST_TOKENS = 4  # a shorter prefix costs more in one more pass than it saves


@dataclass(frozen=True)
class SharedPrefixes:
    """Texts, cut into what they share and the rest of each: a text is `common`, its own group's prefix, and its rest.

    Attributes:
        common: token ids that all texts begin with; may be none.
        prefixes: what follows in each group, likewise.
        of: index of each text's group.
        rest: what is left of each text, with at least one token.
        saved: how many tokens less are run than by whole texts.
    """

    common: tuple[int, ...]
    prefixes: list[tuple[int, ...]]
    of: list[int]
    rest: list[Row]
    saved: int

    @property
    def nested(self) -> bool:
        """True when groups have prefixes of their own."""
        return any(self.prefixes)


def share_prefixes(rows: Sequence[Row], limits: Sequence[int], group: int, *, nest: bool) -> SharedPrefixes | None:
    """Finds what texts begin with in common, or None where that is not worth a pass of its own.

    Args:
        rows: the texts.
        limits: for each text, how many of its tokens may belong to a prefix.
        group: runs of this many consecutive texts are a group, 1 for none.
        nest: what all texts have in common may run before what groups do, see `may_nest`.
    """
    starts = range(0, len(rows), group)
    common = _common(rows, min(limits)) if group == 1 or nest else 0
    if common < LEAST_TOKENS:
        common = 0
    own = [0 if group == 1 else _common(rows[start : start + group], min(limits[start : start + group])) - common for start in starts]
    prefixes = [rows[start].ids[common : common + length] for start, length in zip(starts, own, strict=True)]
    of = [i // group for i in range(len(rows))]
    rest = [row.starting_at(common + own[i]) for row, i in zip(rows, of, strict=True)]
    saved = common * (len(starts) - 1) + sum(length + common for length in own) * (group - 1)
    if saved < max(0.1 * sum(len(row.ids) for row in rows), LEAST_TOKENS):
        return None
    return SharedPrefixes(rows[0].ids[:common], prefixes, of, rest, saved)


def _common(texts: Sequence[Row], limit: int) -> int:
    """Number of tokens, `limit` at most, with which all texts begin."""
    first = min(row.ids for row in texts)
    last = max(row.ids for row in texts)
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))


def trial_groups(rows: Sequence[Row], shared: SharedPrefixes | None, group: int) -> list[int]:
    """Numbers of the groups on which sharing is tried: the shortest, and the next that has to be padded to be read beside it."""
    order = sorted(range(len(rows) // group), key=lambda number: len(rows[number * group].ids))
    if shared is None:
        return order[:1]

    def lengths(number: int) -> tuple[int, int]:
        return len(shared.prefixes[number]), len(shared.rest[number * group].ids)

    shortest = lengths(order[0])
    by_prefix = [number for number in order if lengths(number)[0] != shortest[0]]
    by_rest = [number for number in order if lengths(number)[1] != shortest[1]]
    return order[:1] + (by_prefix or by_rest)[:1]


@dataclass(eq=False)
class CachedPrefix:
    """Prefixes that a model has read.

    Attributes:
        cache: KV cache of `rows` prefixes, padded on the left to one length.
        mask: [rows, length], 0 on the padding, on the CPU.
    """

    cache: Any
    mask: Tensor

    def select(self, rows: Tensor, *, first_layer: int = 0, below: Any = None) -> CachedPrefix:
        """A copy with these rows, which a pass may extend while this one stays as it is.

        Args:
            rows: [new rows] indices on the CPU.
            first_layer: the layers below it are taken from the cache `below`, or left as they are; a pass that begins at this layer asks
                them for nothing but their length.
        """
        return self._copy(lambda layer: _select_rows(layer, rows), rows, first_layer, below)

    def lend(self, rows: Tensor, *, first_layer: int = 0, below: Any = None) -> CachedPrefix:
        """`select` for the last pass on these rows: it may read them, and nothing is kept of what it adds."""
        return self._copy(lambda layer: lend_rows(layer, rows), rows, first_layer, below)

    def _copy(self, change: Callable[[Any], None], rows: Tensor, first_layer: int, below: Any) -> CachedPrefix:
        chosen = copy.copy(self.cache)
        chosen.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in chosen.layers[first_layer:]:
            change(layer)
        if below is not None:
            chosen.layers[:first_layer] = [copy.copy(layer) for layer in below.layers[:first_layer]]
        return CachedPrefix(chosen, self.mask[rows])

    def continued(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments of a pass that continues the prefixes. batch: `input_ids` and `attention_mask`, [rows, tokens], on the CPU."""
        mask = torch.cat([self.mask, batch["attention_mask"]], 1)  # [rows, prefix + tokens]
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, self.mask.shape[1] :]
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": True,
        }


def _select_rows(layer: Any, rows: Tensor) -> None:
    if layer.get_seq_length():
        layer.batch_select_indices(rows.to(layer.keys.device))


def lend_rows(layer: Any, rows: Tensor) -> None:
    """Rows are copied when the pass gets to their layer, and given up when it leaves it: never those of all layers at a time."""
    if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer") or not layer.get_seq_length():
        _select_rows(layer, rows)
        return
    keys = layer.keys
    values = layer.values
    rows = rows.to(keys.device)

    def update(new_keys: Tensor, new_values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([keys[rows], new_keys], -2), torch.cat([values[rows], new_values], -2)  # [rows, heads, prefix + tokens, head_dim]

    layer.update = update


def empty_prefix(anatomy: Anatomy, rows: int) -> CachedPrefix:
    """An empty cache of the kind that the model makes itself."""
    from transformers import DynamicCache  # late: it takes a second

    return CachedPrefix(DynamicCache(config=anatomy.config), torch.zeros(rows, 0, dtype=torch.long))


def windows_that_end(anatomy: Anatomy, length: int) -> tuple[int, ...]:
    """The sliding windows that are shorter than a text of `length` tokens, behind which a cache drops keys; ascending."""
    windows = {getattr(layer, "sliding_window", None) for layer in empty_prefix(anatomy, 1).cache.layers}
    return tuple(sorted(window for window in windows if window is not None and window < length))


def may_nest(anatomy: Anatomy) -> bool:
    """True unless a sliding window would count the padding between what all texts and what groups of them begin with."""
    return not any(empty_prefix(anatomy, 1).cache.is_sliding)


def prefix_batch(prefixes: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, [prefixes, tokens], padded on the left."""
    batch = collate([Row(ids, len(ids)) for ids in prefixes], pad=0, side="left")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def extended(prefix: CachedPrefix, batch: dict[str, Tensor]) -> CachedPrefix:
    """The prefix after a pass over a batch that continued it."""
    return CachedPrefix(prefix.cache, torch.cat([prefix.mask, batch["attention_mask"]], 1))


def may_share(model: nn.Module, own: Any = None) -> bool:
    """True unless something on the model may look at a pass as a whole: another plan, somebody's hook but `own`, or sharded weights."""
    if watchers_of(model) or is_sharded(model):
        return False
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
    return not any(is_foreign(hook) for hook in hooks if hook is not own)


def is_foreign(hook: Any) -> bool:
    """True for a hook that is neither ours nor of transformers, which may do anything."""
    return not isinstance(hook, OwnHook) and not (getattr(hook, "__module__", None) or "").startswith("transformers.")


def looks(hook: Any) -> bool:
    """It edits or reads an activation; whoever only follows the passes of a model does not mind what is skipped."""
    return hook.at_site if isinstance(hook, OwnHook) else is_foreign(hook)


def is_sharded(model: nn.Module) -> bool:
    """True under FSDP2, which keeps state from the start of a forward pass to its end."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def structure_of(anatomy: Anatomy) -> Hashable:
    """Changes when a model gets other modules or another `forward`, after which it has to be tried again whether it can share passes."""
    return sum(1 for _ in anatomy.model.modules()), tuple(vars(module).get("forward") for module in anatomy.chain)


# by model, the ways of sharing that gave what whole passes give
PROVEN: weakref.WeakKeyDictionary[nn.Module, set[Hashable]] = weakref.WeakKeyDictionary()


def agree(plain: Tensor, shared: Tensor) -> bool:
    """True when two ways of computing the same values differ by no more than rounding does."""
    if plain.shape != shared.shape or not plain.numel():
        return False
    tolerance = torch.finfo(plain.dtype).eps ** 0.5 * float(plain.abs().max())
    return bool((plain - shared).abs().max() <= tolerance)  # False for NaN


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    """Puts other functions in place of the `forward` of modules, whose hooks still run; restored on every exit path."""
    before = {module: vars(module).get("forward") for module in forwards}

    def put_back() -> None:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward

    with restoring(put_back):
        for module, forward in forwards.items():
            module.forward = forward
        yield
