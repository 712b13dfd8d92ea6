"""Circuit files of EAP-IG and of the MIB leaderboard, `.json` and `.pt`: read and written as matrices of edges.

A file holds a `cfg`, and for every writer and every edge its score and whether it is in the circuit. JSON names each edge,
`a0.h1->a2.h0<k>`; `.pt`, of torch.save, has the names of rows and columns and the matrices. Scores have the sign of their method: EAP-IG's
are positive where what the corrupted run writes raises the metric, and MIB takes the negated metric.

Models whose heads share keys and values are ungrouped in these files, see `key_value_groups`.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.circuits.mib_circuit import MibCircuit, MibShape
from steer.errors import ConfigError, DamagedFileError, SteerError
from steer.files import atomic_write
from steer.reading import damage_of, other_kind, place_of, read_json
from steer.tensor_files import read_torch, tensor_format

_PT_KEYS = ("cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph")
_WHAT = "a circuit file of EAP-IG or MIB"


# ---- reading


def read_mib(path: str | Path) -> MibCircuit:
    """Reads a circuit file of EAP-IG or MIB; JSON or torch.save, by its content. Nothing is unpickled but tensors and plain containers.

    Edges that a JSON file does not name have score 0 and are not in the circuit.

    Raises:
        DamagedFileError: something is missing, has another shape or type, or names a node or an edge that its `cfg` does not have.
        NonFiniteError: NaN or infinity in a score. UnsafeFileError: a pickle of other classes. WrongKindError: another file.
        FileError: it cannot be read.
    """
    path = place_of(path)
    found = tensor_format(path)
    if found not in ("json", "torch"):
        raise other_kind(path, f"{_WHAT}, JSON or torch.save", found or "something else")
    content = read_json(path) if found == "json" else read_torch(path)
    with damage_of(path, _WHAT):
        try:
            return _of_json(content) if found == "json" else _of_pt(content)
        except (ConfigError, DamagedFileError) as error:
            raise _of_file(error, path) from error


def _shape_of(cfg: Any) -> MibShape:
    """From a `cfg`, which may hold more of a model's configuration."""
    return MibShape(cfg["n_layers"], cfg["n_heads"], cfg["d_model"], cfg["parallel_attn_mlp"])


def _of_json(content: Any) -> MibCircuit:
    _check_keys(content, ("cfg", "nodes", "edges"))
    nodes, edges = content["nodes"], content["edges"]
    shape = _shape_of(content["cfg"])
    writers, readers = shape.writers(), shape.readers()
    if nodes.keys() - {"logits"} != set(writers):
        raise _other_nodes(nodes, writers)
    possible = shape.possible()
    rows, columns = ({name: place for place, name in enumerate(names)} for names in (writers, readers))
    scores, in_graph = torch.zeros(possible.shape), torch.zeros(possible.shape, dtype=torch.bool)
    places, values, chosen = [], [], []
    for name, edge in edges.items():
        writer, _, reader = name.partition("->")
        if writer not in rows or reader not in columns or not possible[rows[writer], columns[reader]]:
            raise _unknown_edge(name)
        places.append(rows[writer] * len(readers) + columns[reader])
        values.append(_number(edge, "score", name))
        chosen.append(_bool(edge, "in_graph", name))
    where = torch.tensor(places, dtype=torch.long)
    scores.view(-1)[where], in_graph.view(-1)[where] = torch.tensor(values), torch.tensor(chosen, dtype=torch.bool)
    own = [nodes[name] for name in writers]
    node_scores = None
    if any("score" in node for node in own):
        node_scores = torch.tensor(
            [_number(node, "score", name) if "score" in node else math.nan for name, node in zip(writers, own, strict=True)]
        )
    return MibCircuit(
        shape,
        scores,
        in_graph,
        torch.tensor([_bool(node, "in_graph", name) for name, node in zip(writers, own, strict=True)]),
        node_scores,
        _neurons(nodes, shape, "neurons", torch.bool),
        _neurons(nodes, shape, "neurons_scores", torch.float32),
    )


def _neurons(nodes: Mapping[str, Any], shape: MibShape, key: str, dtype: torch.dtype) -> Tensor | None:
    """[writers, d_model] of all nodes, None where no node has any. EAP-IG writes all heads of a block at each of its heads."""
    writers = shape.writers()
    if not any(key in nodes[name] for name in writers):
        return None
    found = (
        torch.full((len(writers), shape.d_model), math.nan)
        if dtype.is_floating_point
        else torch.zeros(len(writers), shape.d_model, dtype=dtype)
    )
    for row, name in enumerate(writers):
        if key not in nodes[name] and dtype.is_floating_point:
            continue  # not scored
        numbers = nodes[name][key]
        kinds = (int, float) if dtype.is_floating_point else (bool,)
        is_block = name.startswith("a") and len(numbers) == shape.n_heads and all(isinstance(inner, list) for inner in numbers)
        own = numbers[(row - 1) % (shape.n_heads + 1)] if is_block else numbers
        if not isinstance(own, list) or len(own) != shape.d_model or any(type(number) not in kinds for number in own):
            raise _wrong_entry(f"'{key}' of node '{name}'", f"{shape.d_model} of {' or '.join(kind.__name__ for kind in kinds)}", own)
        found[row] = torch.tensor(own, dtype=dtype)
    return found


def _of_pt(content: Any) -> MibCircuit:
    _check_keys(content, _PT_KEYS)
    shape = _shape_of(content["cfg"])
    for key, names in (("src_nodes", shape.writers()), ("dst_nodes", shape.readers())):
        if list(content[key]) != names:
            raise _other_order(key, content[key], names)
    optional = {"node_scores": "nodes_scores", "neurons": "neurons_in_graph", "neuron_scores": "neurons_scores"}
    tensors = {"scores": content["edges_scores"], "edges": content["edges_in_graph"], "nodes": content["nodes_in_graph"]}
    tensors |= {name: content[key] for name, key in optional.items() if content.get(key) is not None}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise _wrong_entry(f"`{optional.get(name, name)}`", "a tensor", tensor)
    return MibCircuit(shape, **tensors)


def _check_keys(content: Any, keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in content] if isinstance(content, Mapping) else list(keys)
    if missing:
        raise _missing_keys(content, keys, missing)


def _number(entry: Mapping[str, Any], key: str, name: str) -> float:
    if type(entry[key]) not in (int, float):
        raise _wrong_entry(f"'{key}' of '{name}'", "a number", entry[key])
    return float(entry[key])


def _bool(entry: Mapping[str, Any], key: str, name: str) -> bool:
    if type(entry[key]) is not bool:
        raise _wrong_entry(f"'{key}' of '{name}'", "true or false", entry[key])
    return entry[key]


# ---- writing


def write_mib(path: str | Path, circuit: MibCircuit) -> Path:
    """Writes a circuit file that EAP-IG and MIB read: `.json` or `.pt` by the ending. Replaces a file in one step.

    Raises:
        ConfigError: another ending, or neurons of a node of which only some have scores, which JSON cannot say. StorageFullError: no room.
    """
    path = place_of(path)
    if path.suffix not in (".json", ".pt"):
        raise _unknown_ending(path)
    return atomic_write(path, json.dumps(_as_json(circuit)) if path.suffix == ".json" else _as_pt(circuit))


def _cfg(shape: MibShape) -> dict[str, Any]:
    return {"n_layers": shape.n_layers, "n_heads": shape.n_heads, "parallel_attn_mlp": shape.parallel, "d_model": shape.d_model}


def _as_json(circuit: MibCircuit) -> dict[str, Any]:
    shape = circuit.shape
    writers, readers = shape.writers(), shape.readers()
    nodes: dict[str, dict[str, Any]] = {name: {"in_graph": chosen} for name, chosen in zip(writers, circuit.nodes.tolist(), strict=True)}
    if circuit.node_scores is not None:
        for name, score in zip(writers, circuit.node_scores.tolist(), strict=True):
            if not math.isnan(score):  # else it was not scored, which EAP-IG says by leaving it out
                nodes[name]["score"] = score
    for key, neurons in (("neurons", circuit.neurons), ("neurons_scores", circuit.neuron_scores)):
        if neurons is not None:
            for name in writers:
                _add_neurons(nodes[name], key, neurons[_rows_of(shape, name)], name)
    edges = {}
    scores, chosen = circuit.scores.tolist(), circuit.edges.tolist()
    for row, column in shape.possible().nonzero().tolist():
        edges[f"{writers[row]}->{readers[column]}"] = {"score": scores[row][column], "in_graph": chosen[row][column]}
    return {"cfg": _cfg(shape), "nodes": {**nodes, "logits": {"in_graph": True}}, "edges": edges}


def _add_neurons(node: dict[str, Any], key: str, rows: Tensor, name: str) -> None:
    """Adds those of a node, unless they were not scored."""
    unscored = rows.isnan()
    if bool(unscored.any()) and not bool(unscored.all()):
        raise _scores_of_some(name)
    if not bool(unscored.any()):
        node[key] = rows.tolist()


def _rows_of(shape: MibShape, writer: str) -> slice | int:
    """Rows of the neurons that EAP-IG reads at a node: those of all heads of its block at a head."""
    found = re.fullmatch(r"a(\d+)\.h\d+", writer)
    if found is None:
        return shape.writers().index(writer)
    start = 1 + int(found[1]) * (shape.n_heads + 1)
    return slice(start, start + shape.n_heads)


def _as_pt(circuit: MibCircuit) -> bytes:
    shape = circuit.shape
    content: dict[str, Any] = {"cfg": _cfg(shape), "src_nodes": shape.writers(), "dst_nodes": shape.readers()}
    content |= {"edges_scores": circuit.scores, "edges_in_graph": circuit.edges, "nodes_in_graph": circuit.nodes}
    for key, tensor in (
        ("nodes_scores", circuit.node_scores),
        ("neurons_in_graph", circuit.neurons),
        ("neurons_scores", circuit.neuron_scores),
    ):
        if tensor is not None:
            content[key] = tensor
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# ---- errors

_REMEDY = "get the file again from where it came, or write it with EAP-IG's Graph.to_json or Graph.to_pt"


def _of_file(error: SteerError, path: Path) -> DamagedFileError:
    return DamagedFileError(f"{error.what} (in '{path}')", expected=error.expected, found=error.found, remedy=_REMEDY)


def _missing_keys(content: Any, keys: Sequence[str], missing: Sequence[str]) -> DamagedFileError:
    found = f"no {', '.join(missing)}" if isinstance(content, Mapping) else type(content).__name__
    return DamagedFileError(f"{_WHAT} lacks a part", expected=f"an object with {', '.join(keys)}", found=found, remedy=_REMEDY)


def _other_nodes(nodes: Mapping[str, Any], writers: Sequence[str]) -> DamagedFileError:
    unknown, missing = sorted(nodes.keys() - {"logits"} - set(writers)), [name for name in writers if name not in nodes]
    return DamagedFileError(
        "the nodes of a circuit file are not those of its `cfg`",
        expected=f"{len(writers)} writers, {', '.join(writers[:3])}, ..., {writers[-1]}",
        found=f"missing: {', '.join(missing[:3]) or 'none'}; unknown: {', '.join(unknown[:3]) or 'none'}",
        remedy=_REMEDY,
    )


def _unknown_edge(name: str) -> DamagedFileError:
    return DamagedFileError(
        f"a circuit file names the edge '{name:.60}'",
        expected="an edge from a writer to a later reader, as 'a0.h1->m3' or 'input->a2.h0<q>', of the layers and heads of its `cfg`",
        found=f"{name:.60}",
        remedy=_REMEDY,
    )


def _other_order(key: str, found: Any, names: Sequence[str]) -> DamagedFileError:
    listed = list(found)
    place = next((i for i, (a, b) in enumerate(zip(listed, names, strict=False)) if a != b), min(len(listed), len(names)))
    return DamagedFileError(
        f"`{key}` of a circuit file is not the order of its `cfg`, so that its matrices would be read wrongly",
        expected=f"{len(names)} names, number {place} being {names[place] if place < len(names) else 'none'}",
        found=f"{len(listed)} names, number {place} being {listed[place] if place < len(listed) else 'none'!s:.40}",
        remedy=_REMEDY,
    )


def _wrong_entry(what: str, expected: str, found: Any) -> DamagedFileError:
    return DamagedFileError(f"{what} in a circuit file", expected=expected, found=f"{found!r:.60}", remedy=_REMEDY)


def _unknown_ending(path: Path) -> ConfigError:
    return ConfigError(
        "the form of a circuit file follows from its name",
        expected="a path that ends in .json or .pt",
        found=str(path),
        remedy="choose one",
    )


def _scores_of_some(name: str) -> ConfigError:
    return ConfigError(
        f"some neurons at '{name}' have no score, which JSON cannot say",
        expected="scores of all neurons of a node (of all heads of a block), or of none",
        found="NaN among them",
        remedy="write a .pt file, or give all of them scores",
    )
