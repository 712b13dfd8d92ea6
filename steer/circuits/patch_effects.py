"""Activation patching, exactly (Vig et al. 2020; Meng et al. 2022; Heimersheim & Nanda 2024, arXiv 2404.15255).

What each component, edge or activation does to a target when it has its value of another prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer import files
from steer.checks import of_type
from steer.circuits.circuit import Circuit
from steer.circuits.component_run import TakenOut
from steer.circuits.components import HEAD, MLP, ComponentGraph
from steer.circuits.pairs import Pairs
from steer.circuits.patched_run import NOISING, Patch, PatchedRun
from steer.circuits.targets import Target, target_words
from steer.errors import ConfigError
from steer.lens.plot import draw
from steer.model.site import Site
from steer.reading import check_kinds, damage_of

KIND = "patch effects"
EACH = "each"
AT_ONCE = 256  # patches that are made at a time: the mask of one edge has a number for each pair of writer and reader
ALL_TOKENS = "all"  # name of the one position where tokens are patched together
_OF_LAYER = re.compile(r"(?:layers\.|a|m)(\d+)(?:[.]|$)")


def patch_effects(
    model: nn.Module,
    pairs: Pairs,
    target: Target,
    *,
    nodes: Sequence[str] | None = None,
    edges: Sequence[str] | Circuit | None = None,
    sites: Sequence[str | Site] | None = None,
    direction: str = NOISING,
    positions: str | Sequence[str] | None = None,
    max_tokens: int = 512,
    progress: bool = True,
) -> PatchEffects:
    """Patches nodes, edges or whole activations one at a time and reports what each does to the target.

    Each patch is a run of its own, exact, with norms as they come out; runs stand side by side in batches.

    Args:
        pairs: prompts and counterfactuals.
        nodes: names such as `a3.h5`, `m7`, `input`; all heads and MLPs where nothing is named.
        edges: names such as `a3.h5->m7`, or the edges of a circuit.
        sites: e.g. `layers.3.output`, the residual stream after a block.
        direction: `noising` runs the clean prompts and inserts corrupted values: what is needed. `denoising` runs the corrupted ones and
            inserts clean values: what is enough.
        positions: None patches all tokens with a role together; `each` those of each role on their own, see `Pairs.of`; names of roles,
            those tokens together.
        max_tokens: padded tokens of a batch.

    Raises:
        ConfigError: more than one of nodes, edges and sites, an empty list, or an unknown name. SiteError: no such site.

    Example:
        >>> effects = patch_effects(model, pairs, target, nodes=["a23.h3", "a23.h4", "m12"], direction="denoising")
        >>> effects.top(2)
        >>> effects.plot("heads.svg")
    """
    patched = PatchedRun(model, pairs, target, direction=direction, max_tokens=max_tokens)
    names, patch_of = _patches(patched, nodes, edges, sites)
    position_names, roles = _positions(pairs, positions)
    before, other = patched.ends()
    values = torch.zeros(len(roles), len(names), len(pairs), dtype=torch.float64)
    with tqdm(total=values.numel(), desc="patching", unit="run", disable=None if progress else True) as bar:
        for position, of_tokens in enumerate(roles):
            for chosen in torch.arange(len(names)).split(AT_ONCE):
                patches = [replace(patch_of(i), roles=of_tokens) for i in chosen.tolist()]
                values[position, chosen] = patched.values(patches, bar)
    clean, corrupted = (before, other) if direction == NOISING else (other, before)
    facts = patching_facts(patched, pairs, "activation patching", direction)
    return PatchEffects(tuple(names), tuple(position_names), values, clean, corrupted, direction, facts)


@dataclass(frozen=True, eq=False)
class PatchEffects:
    """The target of each prompt with something patched.

    Attributes:
        names: what was patched. positions: at which tokens.
        values: [positions, patches, prompts] fp64 of the target.
        clean, corrupted: [prompts] fp64 without a patch.
        direction: `noising` or `denoising`.
        facts: method, target, pairs and model, JSON-able.

    Raises:
        ConfigError: values that do not fit names, positions and prompts.

    Example:
        >>> effects = patch_effects(model, pairs, target, nodes=["a23.h3", "m12"])
        >>> effects.effects.shape, effects.normalised  # [positions, patches]
    """

    names: tuple[str, ...]
    positions: tuple[str, ...]
    values: Tensor
    clean: Tensor
    corrupted: Tensor
    direction: str
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.positions), len(self.names), len(self.clean))
        if tuple(self.values.shape) != shape:
            raise _other_shape(shape, self.values)

    @property
    def by_prompt(self) -> Tensor:
        """[positions, patches, prompts] by how much the clean value raises the target: clean - patched, or patched - corrupted."""
        return self.clean - self.values if self.direction == NOISING else self.values - self.corrupted

    @property
    def effects(self) -> Tensor:
        """[positions, patches] means over prompts. Positive: the target is higher with the clean value, in both directions."""
        return self.by_prompt.mean(-1)

    @property
    def normalised(self) -> Tensor:
        """[positions, patches] effects as a share of clean - corrupted, means over prompts; NaN where these are the same."""
        whole = float((self.clean - self.corrupted).mean())
        return self.effects / whole if whole else torch.full_like(self.effects, torch.nan)

    @property
    def standard_errors(self) -> Tensor:
        """[positions, patches] of the effects over prompts; NaN with one prompt."""
        if len(self.clean) < 2:
            return torch.full_like(self.effects, torch.nan)
        return self.by_prompt.std(-1) / len(self.clean) ** 0.5

    def __getitem__(self, name: str) -> float:
        """Effect of one patch; at all its positions added up, where there are several. Raises ConfigError."""
        if name not in self.names:
            raise _unknown(name, self.names)
        return float(self.effects[:, self.names.index(name)].sum())

    def top(self, count: int = 10) -> list[tuple[str, str, float]]:
        """Name, position and effect of the largest effects by size."""
        flat = self.effects.flatten()
        order = flat.abs().argsort(descending=True)[:count].tolist()
        return [(self.names[i % len(self.names)], self.positions[i // len(self.names)], float(flat[i])) for i in order]

    def __repr__(self) -> str:
        largest = ", ".join(f"{name} {effect:+.3g}" for name, _, effect in self.top(3))
        at = "" if len(self.positions) == 1 else f" at {len(self.positions)} positions"
        return (
            f"PatchEffects({self.direction}, {len(self.names)} patches{at}, {len(self.clean)} prompts, target "
            f"{float(self.clean.mean()):.3g} clean and {float(self.corrupted.mean()):.3g} corrupted; {largest})"
        )

    # ---- tables and drawings

    def table(self) -> tuple[list[str], list[str], Tensor]:
        """Names of rows and columns, and [rows, columns] effects, NaN where there is none: layers by heads and MLP, or what was patched by
        position."""
        layers = [_OF_LAYER.match(name) for name in self.names]
        is_by_layer = len(self.positions) == 1 and all(found is not None for found in layers)
        if not is_by_layer or any("->" in name for name in self.names):
            return list(self.names), list(self.positions), self.effects.T
        row_of = [int(found[1]) for found in layers if found is not None]
        column_of = [_OF_LAYER.sub("", name, count=1) or MLP for name in self.names]
        rows, columns = sorted(set(row_of)), sorted(set(column_of), key=_number_in)
        found = torch.full((len(rows), len(columns)), torch.nan, dtype=torch.float64)
        for row, column, effect in zip(row_of, column_of, self.effects[0], strict=True):
            found[rows.index(row), columns.index(column)] = effect
        return [str(row) for row in rows], columns, found

    def plot(self, path: str | Path | None = None, *, width: float = 6.0) -> Any:
        """A heat map of `table`, dark where an effect is large, with its sign in the cell. Raises ConfigError without matplotlib.

        Args:
            path: where it is written, as SVG or what its ending says; None to only return it.
            width: of the figure, in inches.
        """
        rows, columns, effects = self.table()
        words = [["" if value != value else f"{value:.2f}" for value in row] for row in effects.tolist()]
        title = f"{self.direction}: effect of the clean value on the {self.facts.get('target', 'target')}"
        return draw(rows, columns, words, effects.abs().numpy(), title, path, width, dark_is_high=True)

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Writes manifest and tensors, atomically."""
        tensors = {"values": self.values, "clean": self.clean, "corrupted": self.corrupted}
        manifest = {"names": list(self.names), "positions": list(self.positions), "direction": self.direction, "facts": self.facts}
        return files.save_artifact(path, KIND, tensors, manifest)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote. Raises DamagedFileError, WrongKindError, UnsafeFileError, NonFiniteError, FileError."""
        manifest, tensors = files.load_artifact(path, KIND)
        with damage_of(path, "effects of patches"):
            check_kinds(manifest, {"names": list, "positions": list, "direction": str, "facts": dict})
            names, positions = tuple(manifest["names"]), tuple(manifest["positions"])
            ends = tensors["clean"], tensors["corrupted"]
            return cls(names, positions, tensors["values"], *ends, manifest["direction"], manifest["facts"])


def patching_facts(patched: PatchedRun, pairs: Pairs, method: str, direction: str) -> dict[str, Any]:
    """What a result depends on."""
    return {
        "method": method,
        "direction": direction,
        "target": target_words(patched.run.target),
        "pairs": {"count": len(pairs), "hash": pairs.hash()},
        "sign": "positive: the target is higher with the clean value",
        "model": patched.run.anatomy.fingerprint(),
    }


# ---- what is patched


def _patches(
    patched: PatchedRun, nodes: Sequence[str] | None, edges: Sequence[str] | Circuit | None, sites: Sequence[str | Site] | None
) -> tuple[list[str], Callable[[int], Patch]]:
    """Names, and the patch of each by its number. Raises ConfigError."""
    given = {name: value for name, value in (("nodes", nodes), ("edges", edges), ("sites", sites)) if value is not None}
    if len(given) > 1:
        raise _several_kinds(list(given))
    graph = patched.run.graph
    if not given:
        nodes = [writer.name for writer in graph.writers if writer.kind in (HEAD, MLP)]
    for name, value in given.items():
        if not isinstance(value, Circuit):
            of_type(value, (list, tuple), f"the {name} that are patched", "pass a list of names")
            if not value:
                raise _nothing_to_patch(name)
    nothing = TakenOut.nothing(graph)
    if sites is not None:
        points = [patched.run.anatomy.point(site) for site in sites]
        return [str(point.site) for point in points], lambda i: Patch(nothing, points[i].site)
    if nodes is not None:
        masks = [nodes_mask(graph, [name]) for name in nodes]
        return list(nodes), lambda i: Patch(TakenOut(masks[i]))
    assert edges is not None
    places = _edge_places(graph, edges)

    def patch_of(i: int) -> Patch:
        mask = torch.zeros_like(graph.possible)
        mask[places[i]] = True
        return Patch(TakenOut(nothing.nodes, {}, mask))

    return [f"{graph.writers[writer].name}->{graph.readers[reader].name}" for writer, reader in places], patch_of


def nodes_mask(graph: ComponentGraph, names: Sequence[str]) -> Tensor:
    """[writers] fp64, 1 at those named. Raises ConfigError for one that the model does not have."""
    mask = torch.zeros(len(graph.writers), dtype=torch.float64)
    for name in names:
        of_type(name, str, "the name of a node", "e.g. 'a3.h5', 'm7' or 'input'")
        mask[graph.writer_place(name)] = 1
    return mask


def edge_place(graph: ComponentGraph, name: str) -> tuple[int, int]:
    """Places of writer and reader of `a3.h5->m7`. Raises ConfigError for an edge that the model does not have."""
    of_type(name, str, "the name of an edge", "e.g. 'a3.h5->m7'")
    writer, _, reader = name.partition("->")
    place = graph.writer_place(writer), graph.reader_place(reader)
    if not graph.possible[place]:
        raise _no_edge(name)
    return place


def _edge_places(graph: ComponentGraph, edges: Sequence[str] | Circuit) -> list[tuple[int, int]]:
    """Sorted by reader, so that the patches of a batch change few of them."""
    if not isinstance(edges, Circuit):
        return [edge_place(graph, name) for name in edges]
    if edges.edges is None or not bool(edges.edges.any()):
        raise _nothing_to_patch("edges")
    return [(writer, reader) for reader, writer in (edges.edges & graph.possible).T.nonzero().tolist()]


def _positions(pairs: Pairs, positions: str | Sequence[str] | None) -> tuple[list[str], list[tuple[int, ...] | None]]:
    """Names, and roles of the tokens of each. Raises ConfigError for a role that no token has."""
    known = pairs.clean.role_names
    if positions is None:
        return [ALL_TOKENS], [None]
    if positions == EACH:
        return [name or ALL_TOKENS for name in known], [(role,) for role in range(len(known))]
    of_type(positions, (list, tuple), "`positions` of patching", "pass None, 'each' or a list of roles")
    if not positions or (unknown := [name for name in positions if name not in known]):
        raise _unknown_roles(unknown if positions else [], known)
    return ["+".join(positions)], [tuple(known.index(name) for name in positions)]


def _number_in(column: str) -> tuple[int, str]:
    """Heads by number, then other parts."""
    digits = re.search(r"\d+", column)
    return (int(digits[0]) if digits else 10**6, column)


# ---- errors


def _other_shape(shape: tuple[int, ...], values: Tensor) -> ConfigError:
    return ConfigError("values of patches do not fit their names, positions and prompts", expected=list(shape), found=list(values.shape),
                       remedy="make them with patch_effects")  # fmt: skip


def _unknown(name: str, names: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"'{name}' was not patched", expected=f"one of {', '.join(names[:4])}, ...", found=name, remedy="name it in the call"
    )


def _several_kinds(given: list[str]) -> ConfigError:
    return ConfigError("a call patches one kind of thing", expected="one of nodes, edges and sites", found=" and ".join(given),
                       remedy="call patch_effects once for each")  # fmt: skip


def _nothing_to_patch(what: str) -> ConfigError:
    return ConfigError(
        f"there are no {what} to patch", expected="at least one", found="none", remedy=f"name {what}, or leave the argument out"
    )


def _no_edge(name: str) -> ConfigError:
    return ConfigError(f"there is no edge '{name}'", expected="a writer that comes before the reader", found=name,
                       remedy="turn it round, or take a later reader")  # fmt: skip


def _unknown_roles(unknown: Sequence[str], known: Sequence[str]) -> ConfigError:
    return ConfigError("no token has a role that `positions` names", expected=f"roles of the pairs: {', '.join(map(repr, known[:8]))}",
                       found=", ".join(map(repr, unknown)) or "no role", remedy="label tokens in Pairs.of(..., positions=...)")  # fmt: skip
