"""Heads of an attention module: its query, key and value projections, and how their columns belong to heads.

The names of the projections are a table, since structure does not tell a query from a key. What can be checked is: under a causal mask the
first token sees itself alone, so there each head passes its value on, which proves the columns of the values and thereby the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steer.model.stacks import Stack

_SEPARATE = ("q_proj", "k_proj", "v_proj")
# names of fused projections, with the layouts that occur under that name
_FUSED = {
    "query_key_value": ("groups",),
    "qkv_proj": ("blocks",),
    "c_attn": ("blocks", "groups"),
    "Wqkv": ("blocks",),
}


@dataclass(frozen=True)
class Heads:
    """Query, key and value projections of one attention module.

    Attributes:
        paths: of the projections of `q`, `k` and `v` in the block, of those that there are.
        layout: of a fused projection: `blocks` = [Q | K | V], `groups` = per key-value group [q ... q | k | v]; None when each is separate.
        n_heads, n_kv_heads, head_dim: of this module.
    """

    paths: tuple[tuple[str, str], ...]
    layout: str | None
    n_heads: int
    n_kv_heads: int
    head_dim: int

    def path(self, part: str) -> str | None:
        """The projection of `q`, `k` or `v`."""
        return dict(self.paths).get(part)

    def width(self, part: str) -> int:
        return (self.n_heads if part == "q" else self.n_kv_heads) * self.head_dim

    def columns(self, part: str) -> slice | Tensor | None:
        """Which columns of its projection are `q`, `k` or `v`; None for all."""
        heads, groups, size = self.n_heads, self.n_kv_heads, self.head_dim
        if self.layout is None:
            return None
        if self.layout == "blocks":
            start = {"q": 0, "k": heads, "v": heads + groups}[part] * size
            return slice(start, start + self.width(part))
        grouped = torch.arange((heads + 2 * groups) * size).view(groups, heads // groups + 2, size)
        rows = {"q": slice(0, -2), "k": slice(-2, -1), "v": slice(-1, None)}[part]
        return grouped[:, rows].flatten()


def find_heads(attention: nn.Module, projection: str, z: Tensor, outputs: Mapping[str, Tensor], stack: Stack) -> Heads | None:
    """The projections beside an output projection, where their sizes fit and a fused layout is proven.

    Args:
        projection: path of the output projection in the block.
        z: [batch, tokens, heads * head_dim] its input.
        outputs: of the modules of the block, by path.
    """
    size = _head_dim(attention, z.shape[-1])
    if size is None or z.shape[-1] % size:
        return None
    n_heads = z.shape[-1] // size
    prefix = projection.rpartition(".")[0]
    beside = {path.rpartition(".")[2]: path for path in outputs if path.rpartition(".")[0] == prefix}
    separate = {name[0]: beside[name] for name in _SEPARATE if name in beside}
    sizes = {part: outputs[path].shape[-1] for part, path in separate.items()}
    if separate:
        if sizes.get("q", z.shape[-1]) != z.shape[-1]:  # it gives a gate, too
            separate.pop("q")
        n_kv_heads = sizes.get("v", sizes.get("k", z.shape[-1])) // size
        return Heads(tuple(separate.items()), None, n_heads, n_kv_heads, size)
    for name, layouts in _FUSED.items():
        if name in beside:
            fused = outputs[beside[name]]
            n_kv_heads = (fused.shape[-1] // size - n_heads) // 2
            for layout in layouts if n_kv_heads > 0 and n_heads % n_kv_heads == 0 else ():
                heads = Heads(tuple((part, beside[name]) for part in "qkv"), layout, n_heads, n_kv_heads, size)
                if fused.shape[-1] == (n_heads + 2 * n_kv_heads) * size and _passes_values_on(heads, fused, z, stack):
                    return heads
    return Heads((), None, n_heads, n_heads, size)


def _head_dim(attention: nn.Module, width: int) -> int | None:
    """Size of one head, by the attributes of the module that holds it or of the config."""
    for module in attention.modules():
        for name in ("head_dim", "head_size", "attention_head_size"):
            if isinstance(size := getattr(module, name, None), int) and size > 0:
                # latent attention has heads of one size for queries and another for values
                return getattr(module, "v_head_dim", None) or size
        for name in ("num_heads", "num_attention_heads", "n_heads"):
            if isinstance(number := getattr(module, name, None), int) and number > 0:
                return width // number
    return None


def _passes_values_on(heads: Heads, fused: Tensor, z: Tensor, stack: Stack) -> bool:
    """At the first token of each text z is the value, repeated for the query heads of its group."""
    if stack.axes is None:
        return False
    lead = [stack.shape[axis] for axis in range(2)]
    columns = heads.columns("v")
    values = fused.reshape(*lead, -1)[..., columns].movedim(stack.axes[1], 0)[0]  # [batch, key-value heads * head_dim]
    first = z.reshape(*lead, -1).movedim(stack.axes[1], 0)[0]
    values = values.unflatten(-1, (heads.n_kv_heads, heads.head_dim)).repeat_interleave(heads.n_heads // heads.n_kv_heads, -2).flatten(-2)
    precision = torch.finfo(z.dtype).eps ** 0.5
    return bool((values - first).abs().max() <= precision * first.abs().max())
