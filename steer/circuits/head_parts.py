"""Parts of heads: a few directions of what a head writes with, which are ablated while the rest of the head stays.

A part of rank k is k orthonormal rows U of the head's block of `attn.z`. Its ablation is z - amount * (z - constant) U^T U, which is that
of the whole head where k is the width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.circuits.components import HEAD, ComponentGraph
from steer.errors import ConfigError, WrongModelError
from steer.intervene.operators.erase import Erase
from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of

TOLERANCE = 1e-4  # of U U^T from the identity


def check_parts(graph: ComponentGraph, nodes: Tensor, parts: Mapping[str, Tensor]) -> None:
    """Raises ConfigError for parts of what is no head, or none that is in the circuit, and for rows that are not orthonormal."""
    for name, directions in parts.items():
        place = graph.writer_place(name)
        if graph.writers[place].kind != HEAD or not nodes[place]:
            raise _no_head_in_it(name)
        if directions.dim() != 2 or not 0 < len(directions) <= directions.shape[1]:
            raise _not_orthonormal(name, list(directions.shape))
        rows = directions.double()
        error = float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64, device=rows.device)).abs().max())
        if not error < TOLERANCE:  # NaN too
            raise _not_orthonormal(name, f"U U^T off by {error:.3g}")


def in_part(graph: ComponentGraph, parts: Mapping[str, Tensor]) -> Tensor:
    """[writers] bool, heads of which only a part is in the circuit."""
    found = torch.zeros(len(graph.writers), dtype=torch.bool)
    found[[graph.writer_place(name) for name in parts]] = True
    return found


def draw_parts(
    graph: ComponentGraph, nodes: Tensor, parts: Mapping[str, Tensor], into: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random directions of as many heads, of the same ranks, outside the circuit; of its own where too few others are left.

    Args:
        nodes: [writers] amounts of the circuit.
        into: [writers] amounts of the random circuit, whose whole heads are there, and which gets those of the parts.
    """
    is_free = torch.tensor([writer.kind == HEAD for writer in graph.writers]) & (into == 0)
    others, own = (is_free & (nodes == 0)).nonzero().flatten(), (is_free & (nodes != 0)).nonzero().flatten()
    order = torch.cat([places[torch.randperm(len(places), generator=generator)] for places in (others, own)]).tolist()
    found = {}
    for (name, directions), place in zip(parts.items(), order[: len(parts)], strict=True):
        into[place] = nodes[graph.writer_place(name)]
        columns = torch.randn(directions.shape[1], len(directions), generator=generator, dtype=torch.float64)
        found[graph.writers[place].name] = torch.linalg.qr(columns).Q.T  # [rank, head_dim]
    return found


@dataclass(frozen=True, eq=False)
class PartsOfBlock:
    """Parts of the heads of one block, as rows of its `attn.z`.

    Attributes:
        rows: [rank, heads * head_dim] orthonormal, of all of its parts. amounts: [rank].
    """

    layer: int
    rows: Tensor
    amounts: Tensor

    def operator(self, constant: Tensor) -> Erase:
        """z - strength * amount * (z - constant) U^T U. constant: [heads * head_dim]."""
        return Erase((self.amounts[:, None] * self.rows).float(), self.rows.float(), constant.float())


def parts_by_block(anatomy: Anatomy, graph: ComponentGraph, nodes: Tensor, parts: Mapping[str, Tensor]) -> list[PartsOfBlock]:
    """Parts of heads, block by block. Raises WrongModelError for directions as wide as no head of the block."""
    rows: dict[int, list[Tensor]] = {}
    amounts: dict[int, list[Tensor]] = {}
    for name, directions in parts.items():
        place = graph.writer_place(name)
        writer = graph.writers[place]
        layer, head = writer.layer or 0, writer.head or 0
        heads = heads_of(anatomy, layer)
        if directions.shape[1] != heads.head_dim:
            raise _other_head_dim(name, heads.head_dim, directions)
        own = torch.zeros(len(directions), heads.n_heads, heads.head_dim, dtype=torch.float64)
        own[:, head] = directions.double()
        rows.setdefault(layer, []).append(own.flatten(1))  # [rank, heads * head_dim]
        amounts.setdefault(layer, []).append(nodes[place].double().expand(len(directions)))
    return [PartsOfBlock(layer, torch.cat(rows[layer]), torch.cat(amounts[layer])) for layer in sorted(rows)]


# ---- errors


def not_whole(names: Sequence[str], use: str) -> ConfigError:
    return ConfigError(
        f"{use} takes whole heads, and this circuit has parts of heads",
        expected="a circuit without parts",
        found=f"parts of {', '.join(names[:6])}",
        remedy="take the whole heads, dataclasses.replace(circuit, parts={}), or ablate it: circuit.ablation_plan(model)",
    )


def parts_beside_edges() -> ConfigError:
    return ConfigError("a circuit of edges has no parts of heads", expected="edges or parts", found="both",
                       remedy="leave one out; an edge carries all that a head writes")  # fmt: skip


def _no_head_in_it(name: str) -> ConfigError:
    return ConfigError("a part is one of a head in the circuit", expected="the name of a head with an amount other than 0", found=name,
                       remedy="give the head its amount in `nodes`; a part says which directions of it are meant")  # fmt: skip


def _not_orthonormal(name: str, found: object) -> ConfigError:
    return ConfigError(f"directions of a part of '{name}'", expected="[rank, head_dim], orthonormal rows", found=found,
                       remedy="torch.linalg.qr(directions.T).Q.T")  # fmt: skip


def _other_head_dim(name: str, head_dim: int, found: Tensor) -> WrongModelError:
    return WrongModelError(f"the part of '{name}' is that of another model", expected=f"{head_dim} channels of a head",
                           found=found.shape[1], remedy="choose parts on this model, with top_parts")  # fmt: skip
