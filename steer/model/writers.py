"""Writers: the modules of a block whose outputs are added to its residual stream, found by sums in a trial pass.

The writers of a block are the smallest set of its modules whose outputs add up to what the block adds: attention and MLP of a llama, their
post-norms in Gemma, the last linear maps of BLOOM, whose attention module gives the stream itself. Which of them mixes tokens is asked of
the module: it runs again with another first token. Names decide only what structure cannot say: that a mixer is attention.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from steer.model.heads import Heads, find_heads
from steer.model.mixing import BlockCall, is_bare, mixes, mixes_in_block
from steer.model.stacks import Stack, same, structure_of
from steer.model.trial_pass import arguments_of, first_tensor, trial_passes

_SLIGHT = 1e-3
_MOST_WRITERS = 4
_DEPTH = 4  # of modules in a block that are looked at
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_OTHER_THAN_ATTENTION = re.compile(r"linear_?attn|delta_?net", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|expert|fc2|channel|\bff", re.IGNORECASE)


@dataclass(frozen=True)
class Writer:
    """A module of a block whose output is added to the residual stream; all paths are in the block.

    Attributes:
        path: of the module.
        part: of the module that does the work, before a post-norm; often the same.
        projection: of the linear map in `part` that gives its output; None where there is none.
        mixes: what it gives for a token depends on other tokens.
        attends: it is attention, by its name.
        scale: what its output is multiplied by before it is added.
        heads: query, key and value projections of attention, as far as they are known.
    """

    path: str
    part: str
    projection: str | None
    mixes: bool
    attends: bool
    scale: float = 1.0
    heads: Heads | None = None


@dataclass(frozen=True)
class BlockParts:
    """What writes to the residual stream in one block.

    Attributes:
        writers: in the order in which they ran; empty when they are not known.
        reason: why they are not known.
    """

    writers: tuple[Writer, ...]
    reason: str = ""

    def attention(self) -> list[Writer]:
        return [writer for writer in self.writers if writer.mixes and writer.attends]

    def mlp(self) -> list[Writer]:
        """What works on each token alone; where a channel mixer looks at the token before, it is known by its name."""
        alone = [writer for writer in self.writers if not writer.mixes and not writer.attends]
        named = [writer for writer in self.writers if not writer.attends and _MLP.search(writer.part)]
        return alone if len(alone) == 1 else named if len(named) == 1 else alone

    def mixers(self) -> list[Writer]:
        mixing = [writer for writer in self.writers if writer.mixes]
        attention = self.attention()
        return attention if len(attention) == 1 and all(w in attention or _MLP.search(w.part) for w in mixing) else mixing


_PARTS: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Hashable, tuple[BlockParts, ...]]]] = weakref.WeakKeyDictionary()


def block_parts(model: nn.Module, stack: Stack, obstacle: str | None = None) -> tuple[BlockParts, ...]:
    """The writers of every block of a stack; the model runs once for that as long as its modules stay. obstacle: why it must not run."""
    structure = structure_of(model)
    known = _PARTS.setdefault(model, {})
    if stack.path not in known or known[stack.path][0] != structure:
        if obstacle is not None:
            return tuple(BlockParts((), obstacle) for _ in stack.names)
        known[stack.path] = (structure, _block_parts(model, stack))
    return known[stack.path][1]


def _block_parts(model: nn.Module, stack: Stack) -> tuple[BlockParts, ...]:
    blocks = [model.get_submodule(path) for path in stack.block_paths]
    observed = _Blocks(blocks, stack)
    for _, run in trial_passes(model):
        try:
            run(list(observed.paths), observed.enter, observed.leave)
            break
        except Exception:  # this way of calling it did not work in the survey either
            continue
    did_not_run = BlockParts((), "it did not run in a pass over a few tokens")
    return tuple(observed.parts.get(block, did_not_run) for block in blocks)


class _Blocks:
    """Watches the blocks of a stack in a pass and works out the parts of each when it ends, so that nothing is kept for long."""

    def __init__(self, blocks: Sequence[nn.Module], stack: Stack) -> None:
        self.stack = stack
        self.parts: dict[nn.Module, BlockParts] = {}
        self.paths: dict[nn.Module, str] = {}
        for block in blocks:
            self.paths |= {module: path for path, module in block.named_modules() if path.count(".") < _DEPTH}
        self._blocks = set(blocks)
        self._begun: dict[nn.Module, BlockCall] = {}
        self._ended: list[BlockCall] = []
        self._resting = False  # modules are called again

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._resting or module in self.parts:
            return
        if module in self._blocks:
            self._begun, self._ended = {}, []
        if module in self._begun:
            self._begun[module].again = True
            return
        inputs = {place: tensor.detach().clone() for place, tensor in arguments_of(args, kwargs).items()}
        self._begun[module] = BlockCall(self.paths[module], module, args, kwargs, inputs)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._begun.get(module)
        if self._resting or call is None or call.again:
            return
        tensor = first_tensor(output)
        call.output = None if tensor is None else tensor.detach().clone()
        if module not in self._blocks:
            self._ended.append(call)
            return
        self._resting = True
        try:
            self.parts[module] = _parts_of(call, self._ended, self.stack, list(self.parts.values()))
        finally:
            self._resting = False
            self._begun, self._ended = {}, []


def _parts_of(block: BlockCall, calls: list[BlockCall], stack: Stack, known: Sequence[BlockParts]) -> BlockParts:
    before, after = block.inputs.get(stack.argument), block.output
    if before is None or after is None or before.shape != after.shape or len(stack.shape) != 3 or stack.axes is None:
        return BlockParts((), "its residual stream is not one tensor [batch, tokens, width]")
    if before.is_meta or after.is_meta:
        return BlockParts((), "its weights are on the meta device, without values")
    before = before.to(after.device)
    if not after.isfinite().all():
        return BlockParts((), "what it gives for a few random tokens is not finite")
    once = [call for call in calls if not call.again and call.output is not None]
    candidates = _candidates(once, after)
    chosen = _adding_up(before, after, candidates, known)
    scales, of_stream = (1.0,) * len(chosen or ()), 1.0
    if chosen is None:
        chosen, scales, of_stream = _fit(before, after, candidates)
    if not chosen or abs(of_stream - 1) > _SLIGHT:
        return BlockParts((), _why_none(chosen, scales, of_stream))
    parts = [_part(call, calls, _around(calls, chosen, after)) for call in chosen]
    mixing = [mixes_in_block(block, chosen, number, stack) if is_bare(part) else mixes(part, stack) for number, part in enumerate(parts)]
    return BlockParts(tuple(_writer(*entry, calls, stack) for entry in zip(chosen, parts, mixing, scales, strict=True)))


def _candidates(calls: list[BlockCall], after: Tensor) -> list[BlockCall]:
    """Calls whose output could be added to the stream, one for each value: the outermost, then the first."""
    flat = (after.shape[0] * after.shape[1], after.shape[2])
    fitting = [call for call in calls if call.output is not None and call.output.shape in (after.shape, flat)]
    different: list[BlockCall] = []
    for call in sorted(fitting, key=_depth):
        assert call.output is not None
        call.rows = call.output.to(after.device).reshape(flat)
        if not any(torch.equal(call.rows, other.rows) for other in different):
            different.append(call)
    return sorted(different, key=fitting.index)


# ---- sums


def _adding_up(before: Tensor, after: Tensor, candidates: list[BlockCall], known: Sequence[BlockParts]) -> tuple[BlockCall, ...] | None:
    """The smallest set of calls whose outputs add up to what the block adds."""
    by_path = {call.path: call for call in candidates}
    for parts in dict.fromkeys(known):  # blocks of one kind are alike
        paths = [writer.path for writer in parts.writers]
        if paths and all(path in by_path for path in paths):
            some = tuple(by_path[path] for path in paths)
            if _adds_up(before, after, some):
                return some
    for some in _likely_sets(before, after, candidates):
        if _adds_up(before, after, some):
            return some
    return None


def _likely_sets(before: Tensor, after: Tensor, candidates: list[BlockCall]) -> Iterable[tuple[BlockCall, ...]]:
    """Sets of calls that nearly add up, the smallest first, by what is left of them in a few random directions."""
    outputs = torch.stack([call.rows.double().flatten().cpu() for call in candidates]) if candidates else None
    if outputs is None:
        return
    change = (after.double() - before.double()).flatten().cpu()
    directions = torch.randn(len(change), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs, change = outputs @ directions, change @ directions  # [candidates, 32], [32]
    for size in range(1, _MOST_WRITERS + 1):
        if len(candidates) ** size > 200_000:
            return
        sets = list(combinations(range(len(candidates)), size))
        if not sets:
            return
        left = (outputs[torch.tensor(sets)].sum(1) - change).norm(dim=1) / change.norm()
        for index in left.argsort()[:8].tolist():
            if left[index] < 0.05:
                yield tuple(candidates[number] for number in sets[index])


def _adds_up(before: Tensor, after: Tensor, calls: Sequence[BlockCall]) -> bool:
    """In half precision to the bit, in some order, since rounding would hide a small writer; else as far as rounding goes."""
    stream = before.reshape(-1, before.shape[-1])
    result = after.reshape(-1, after.shape[-1])
    outputs = [call.rows for call in calls]
    if after.dtype in (torch.bfloat16, torch.float16):
        return any(_share_equal(total, result) > 0.999 for total in _sums(stream, outputs))
    terms = torch.stack([stream.double(), *(output.double() for output in outputs)])  # [writers + 1, batch * tokens, width]
    total, size = terms.sum(0), terms.abs().sum(0)
    narrowest = max(torch.finfo(tensor.dtype).eps for tensor in (stream, result))
    change = (result.double() - stream.double()).norm(dim=-1, keepdim=True) / result.shape[-1] ** 0.5
    fits = (total - result.double()).abs() <= 8 * narrowest * size + 1e-5 * change
    return bool(fits.double().mean() > 0.999)


def _sums(stream: Tensor, outputs: list[Tensor]) -> Iterable[Tensor]:
    """The sum in the orders in which models take it, each rounded as it would be there."""

    def added(tensors: Sequence[Tensor]) -> Tensor:
        return functools.reduce(torch.add, tensors)

    for order in (outputs, outputs[::-1]):
        yield added([stream, *order])
        for split in range(1, len(order)):  # some are added up before the stream gets them
            yield stream + added(order[:split]) + added(order[split:])
        yield added(order) + stream
    yield added([stream.float(), *(output.float() for output in outputs)]).to(stream.dtype)


def _share_equal(total: Tensor, result: Tensor) -> float:
    return float((total == result).double().mean())


def _fit(before: Tensor, after: Tensor, candidates: list[BlockCall]) -> tuple[tuple[BlockCall, ...], tuple[float, ...], float]:
    """The parts of a block that make up its output when each, and the stream, has a factor; none where these do not either.

    Returns:
        The calls, their factors, and that of the stream.
    """
    parts = [call for call in candidates if "." not in call.path]
    columns = {call: call.rows.double().flatten().cpu() for call in parts}
    stream, result = before.double().flatten().cpu(), after.double().flatten().cpu()
    change = (result - stream).norm()
    rounding = 4 * torch.finfo(after.dtype).eps * result.norm()
    best: tuple[tuple[BlockCall, ...], tuple[float, ...], float] = ((), (), 1.0)
    least = float(max(_SLIGHT * change, rounding))
    for size in (1, 2, 3):
        for some in combinations(parts, size):
            matrix = torch.stack([*(columns[call] for call in some), stream], 1)  # [numbers, writers + 1]
            factors = torch.linalg.lstsq(matrix, result[:, None]).solution[:, 0]
            left = float((matrix @ factors - result).norm())
            if left < least:  # one more part must explain much more
                *scales, of_stream = factors.tolist()
                best, least = (some, tuple(scales), of_stream), left
        least /= 4
    return best


def _why_none(calls: tuple[BlockCall, ...], scales: tuple[float, ...], of_stream: float) -> str:
    if not calls:
        return "its block normalises or gates what it adds: no modules of it add up to the change of the stream"
    total = " + ".join(f"{scale:.3g} x {call.path}" for scale, call in zip(scales, calls, strict=True))
    if abs(of_stream) < _SLIGHT:
        return f"what its block gives is {total}, without the stream as it came"
    return f"its block adds {total} to {of_stream:.3g} x the stream"


# ---- what a writer is


def _writer(call: BlockCall, part: BlockCall, mixes: bool | None, scale: float, calls: list[BlockCall], stack: Stack) -> Writer:
    name = f"{part.path} {type(part.module).__name__}"
    attends = bool(_ATTENTION.search(name)) and not _OTHER_THAN_ATTENTION.search(name)
    projection = min((c for c in calls if _is_projection(c, part, call)), key=_depth, default=None)
    heads = None
    if attends and projection is not None:
        outputs = {c.path: c.output for c in calls if c.output is not None and not c.again}
        heads = find_heads(part.module, projection.path, next(iter(projection.inputs.values())), outputs, stack)
    end = None if projection is None else projection.path
    return Writer(call.path, part.path, end, attends if mixes is None else mixes, attends, scale, heads)


def _depth(call: BlockCall) -> int:
    return call.path.count(".")


def _around(calls: list[BlockCall], chosen: tuple[BlockCall, ...], after: Tensor) -> list[BlockCall]:
    """Modules that hold all of the block (a wrapper of checkpointing), or several writers."""
    return [c for c in calls if same(c.output, after) or sum(w.path.startswith(c.path + ".") for w in chosen) > 1]


def _part(call: BlockCall, calls: list[BlockCall], around: list[BlockCall]) -> BlockCall:
    """The module that does the work: before a post-norm, and all of what a last linear map is the end of."""
    while all(parameter.dim() <= 1 for parameter in call.module.parameters()) and call.inputs:
        given = next(iter(call.inputs.values()))
        makers = [c for c in calls if c is not call and same(c.output, given)]
        if not makers:
            break
        call = min(makers, key=_depth)
    outer = [c for c in calls if call.path.startswith(c.path + ".") and c not in around]
    return min(outer, key=_depth, default=call)


def _is_projection(call: BlockCall, part: BlockCall, writer: BlockCall) -> bool:
    """A linear map in a part, or the part itself, that gives what the part or its writer gives."""
    inside = call is part or call.path.startswith(part.path + ".")
    linear = any(isinstance(getattr(call.module, name, None), int) for name in ("in_features", "nx"))
    return inside and linear and call.output is not None and any(_equal_rows(call.output, whole.output) for whole in (part, writer))


def _equal_rows(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))
