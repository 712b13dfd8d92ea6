"""Circuit files of EAP-IG and MIB: what they say by hand, both ways, between models with and without key-value groups, and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.circuits.key_value_groups import grouped, groups_in_part, ungrouped
from steer.circuits.mib import read_mib, write_mib
from steer.circuits.mib_circuit import MibCircuit, MibShape
from steer.errors import ConfigError, DamagedFileError, FileError, NonFiniteError, SteerError, UnsafeFileError, WrongKindError

SHAPE = MibShape(n_layers=2, n_heads=2, d_model=3)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def circuit(shape: MibShape = SHAPE, whole: bool = True) -> MibCircuit:
    """With scores of everything; the last MLP and its neurons were not scored."""
    writers, readers = shape.n_writers, shape.n_readers
    scores = numbers(writers, readers) * shape.possible()
    edges, nodes = (numbers(writers, readers, seed=1) > 0) & shape.possible(), numbers(writers, seed=2) > 0
    if not whole:
        return MibCircuit(shape, scores, edges, nodes)
    node_scores, neuron_scores = numbers(writers, seed=3), numbers(writers, shape.d_model, seed=4)
    node_scores[-1] = neuron_scores[-1] = torch.nan
    return MibCircuit(shape, scores, edges, nodes, node_scores, numbers(writers, shape.d_model, seed=5) > 0, neuron_scores)


def same(a: MibCircuit, b: MibCircuit) -> bool:
    x, y = a.tensors(), b.tensors()
    equal = (torch.equal(x[name].nan_to_num(77), y[name].nan_to_num(77)) and x[name].dtype is y[name].dtype for name in x)
    return a.shape == b.shape and x.keys() == y.keys() and all(equal)


# ---- the graph


def test_the_graph_has_the_edges_of_theirs() -> None:
    """Numbers of edges as published: GPT-2, and SmolLM2 with its heads ungrouped."""
    assert int(MibShape(12, 12, 768).possible().sum()) == 32_491
    assert int(MibShape(30, 9, 576).possible().sum()) == 123_211


def test_names_stand_in_the_order_of_the_matrices() -> None:
    shape = MibShape(2, 2, 3)
    assert shape.writers() == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    assert shape.readers()[:8] == ["a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0", "a1.h0<q>"]
    assert shape.readers()[-1] == "logits" and len(shape.readers()) == shape.n_readers == 15 and shape.n_writers == 7
    to_mlps = shape.possible()[:, [6, 13]].T.tolist()
    assert to_mlps == [[True] * 3 + [False] * 4, [True] * 6 + [False]]
    parallel = MibShape(2, 2, 3, parallel=True).possible()[:, [6, 13]].T.tolist()
    assert parallel == [[True] + [False] * 6, [True] * 4 + [False] * 3]


# ---- files

BY_HAND: dict[str, Any] = {
    "cfg": {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 2, "n_ctx": 1024},
    "nodes": {
        "input": {"in_graph": True, "neurons": [True, False]},
        "a0.h0": {"in_graph": False, "score": -2.5, "neurons": [[True, True]]},  # of all heads of the block
        "m0": {"in_graph": True, "score": 3, "neurons": [False, False]},
        "logits": {"in_graph": True},
    },
    "edges": {
        "input->a0.h0<v>": {"score": 0.5, "in_graph": True},
        "a0.h0->m0": {"score": -1, "in_graph": False},
        "m0->logits": {"score": 2e-3, "in_graph": True},
    },
}


def test_a_json_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(BY_HAND))
    found = read_mib(path)
    assert found.shape == MibShape(1, 1, 2) and found.nodes.tolist() == [True, False, True]
    #                    q    k   v    mlp  logits
    expected = [[0.0, 0, 0.5, 0, 0], [0, 0, 0, -1, 0], [0, 0, 0, 0, 2e-3]]
    assert torch.equal(found.scores, torch.tensor(expected)) and found.edges.nonzero().tolist() == [[0, 2], [2, 4]]
    assert found.node_scores[0].isnan() and found.node_scores[1:].tolist() == [-2.5, 3]
    assert found.neurons.tolist() == [[True, False], [True, True], [False, False]] and found.neuron_scores is None


@pytest.mark.parametrize("ending", ["json", "pt"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_what_is_written_is_read(ending: str, whole: bool, parallel: bool, tmp_path: Path) -> None:
    made = circuit(MibShape(2, 2, 3, parallel), whole)
    path = write_mib(tmp_path / f"circuit.{ending}", made)
    assert path.is_file() and same(read_mib(path), made)
    assert same(read_mib(path.rename(tmp_path / "without_an_ending")), made), "the form is known by the content"


def test_json_has_what_eap_ig_reads(tmp_path: Path) -> None:
    """Every node and every possible edge by name; neurons of a head are read as those of all heads of its block."""
    made = circuit()
    content = json.loads(write_mib(tmp_path / "c.json", made).read_text())
    assert content["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 3}
    assert list(content["nodes"]) == [*SHAPE.writers(), "logits"] and content["nodes"]["logits"] == {"in_graph": True}
    assert len(content["edges"]) == int(SHAPE.possible().sum())
    assert content["edges"]["a0.h1->a1.h0<k>"] == {"score": made.scores[2, 9].item(), "in_graph": made.edges[2, 9].item()}
    assert (
        content["nodes"]["a1.h1"]["neurons"] == made.neurons[4:6].tolist() and content["nodes"]["m0"]["neurons"] == made.neurons[3].tolist()
    )
    assert content["nodes"]["m1"].keys() == {"in_graph", "neurons"}, "what was not scored has no score"


def test_pt_has_what_eap_ig_reads(tmp_path: Path) -> None:
    made = circuit()
    content = torch.load(write_mib(tmp_path / "c.pt", made), weights_only=True)
    assert list(content)[:6] == ["cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph"]
    assert content["src_nodes"] == SHAPE.writers() and content["dst_nodes"] == SHAPE.readers()
    assert torch.equal(content["edges_scores"], made.scores) and torch.equal(content["neurons_in_graph"], made.neurons)
    assert content["nodes_scores"][-1].isnan() and content["edges_in_graph"].dtype is torch.bool


def test_what_stands_at_edges_that_cannot_be_has_no_meaning(tmp_path: Path) -> None:
    """EAP-IG marks all edges of a node that it takes, later writers' too."""
    plain = circuit(whole=False)
    marked = MibCircuit(SHAPE, torch.where(SHAPE.possible(), plain.scores, torch.nan), plain.edges | ~SHAPE.possible(), plain.nodes)
    assert same(marked, plain)
    assert same(MibCircuit(SHAPE, plain.scores.double(), plain.edges, plain.nodes), plain)


def test_json_cannot_say_that_some_neurons_of_a_node_have_no_score(tmp_path: Path) -> None:
    plain, neuron_scores = circuit(whole=False), numbers(7, 3)
    old = write_mib(tmp_path / "c.json", plain)
    neuron_scores[1, 0] = torch.nan
    made = MibCircuit(SHAPE, plain.scores, plain.edges, plain.nodes, neuron_scores=neuron_scores)
    with pytest.raises(ConfigError, match="some neurons at 'a0.h0'[\\s\\S]*write a .pt file"):
        write_mib(tmp_path / "c.json", made)
    assert same(read_mib(old), plain) and same(read_mib(write_mib(tmp_path / "c.pt", made)), made)


def without(*keys: str) -> Any:
    def change(content: Any) -> None:
        *above, last = keys
        for key in above:
            content = content[key]
        del content[last]

    return change


def put(value: Any, *keys: str) -> Any:
    def change(content: Any) -> None:
        *above, last = keys
        for key in above:
            content = content[key]
        content[last] = value

    return change


EDGE = "input->a0.h0<q>"
JSON_DAMAGE: dict[str, tuple[Any, type[SteerError], str]] = {
    "no cfg": (without("cfg"), DamagedFileError, "no cfg"),
    "no edges": (without("edges"), DamagedFileError, "no edges"),
    "no heads": (without("cfg", "n_heads"), DamagedFileError, "n_heads"),
    "negative layers": (put(-1, "cfg", "n_layers"), DamagedFileError, "1 or more"),
    "layers as text": (put("2", "cfg", "n_layers"), DamagedFileError, "1 or more"),
    "more layers than memory": (put(10**8, "cfg", "n_layers"), DamagedFileError, "a model this large"),
    "wider than memory": (put(10**12, "cfg", "d_model"), DamagedFileError, "a model this large"),
    "a cfg that is no object": (put([1, 2], "cfg"), DamagedFileError, "TypeError"),
    "one layer more": (put(3, "cfg", "n_layers"), DamagedFileError, "missing: a2.h0, a2.h1, m2"),
    "one head less": (put(1, "cfg", "n_heads"), DamagedFileError, "unknown: a0.h1, a1.h1"),
    "a node less": (without("nodes", "m1"), DamagedFileError, "missing: m1"),
    "a node without in_graph": (without("nodes", "m1", "in_graph"), DamagedFileError, "in_graph"),
    "a node that is no object": (put(True, "nodes", "m1"), DamagedFileError, "circuit file"),
    "a node in half": (put(0.5, "nodes", "m1", "in_graph"), DamagedFileError, "true or false"),
    "a score as text": (put("1.0", "edges", EDGE, "score"), DamagedFileError, "a number"),
    "a score that is true": (put(True, "edges", EDGE, "score"), DamagedFileError, "a number"),
    "an edge without a score": (without("edges", EDGE, "score"), DamagedFileError, "score"),
    "not a number": (put(float("nan"), "edges", EDGE, "score"), NonFiniteError, "not finite"),
    "a score beyond fp32": (put(1e300, "edges", EDGE, "score"), NonFiniteError, "`scores` of a circuit"),
    "an edge of another model": (put({"score": 1, "in_graph": True}, "edges", "m0->m7"), DamagedFileError, "'m0->m7'"),
    "an edge backwards": (put({"score": 1, "in_graph": True}, "edges", "m1->m0"), DamagedFileError, "'m1->m0'"),
    "an edge without q, k or v": (put({"score": 1, "in_graph": True}, "edges", "input->a0.h0"), DamagedFileError, "input->a2.h0<q>"),
    "neurons of another width": (put([True], "nodes", "m0", "neurons"), DamagedFileError, "3 of bool"),
    "neurons that are numbers": (put([1, 0, 1], "nodes", "m0", "neurons"), DamagedFileError, "3 of bool"),
    "neurons of all nodes but one": (without("nodes", "m0", "neurons"), DamagedFileError, "neurons"),
    "scores of neurons as text": (put(["a"] * 3, "nodes", "m0", "neurons_scores"), DamagedFileError, "3 of int or float"),
}
PT_DAMAGE: dict[str, tuple[Any, type[SteerError], str]] = {
    "no names": (without("src_nodes"), DamagedFileError, "no src_nodes"),
    "no matrix": (without("edges_scores"), DamagedFileError, "no edges_scores"),
    "names in another order": (put(SHAPE.writers()[::-1], "src_nodes"), DamagedFileError, "number 0 being m1"),
    "a name less": (put(SHAPE.readers()[:-1], "dst_nodes"), DamagedFileError, "number 14 being none"),
    "no list of names": (put(3, "dst_nodes"), DamagedFileError, "TypeError"),
    "another shape": (put(torch.zeros(7, 14), "edges_scores"), DamagedFileError, "\\[7, 15\\]"),
    "whole numbers as scores": (put(torch.zeros(7, 15, dtype=torch.long), "edges_scores"), DamagedFileError, "torch.int64"),
    "scores as a choice": (put(torch.zeros(7, 15), "edges_in_graph"), DamagedFileError, "`edges`"),
    "lists": (put([True] * 7, "nodes_in_graph"), DamagedFileError, "a tensor"),
    "infinity": (put(torch.full((7,), torch.inf), "nodes_scores"), NonFiniteError, "`node_scores`"),
    "not a number": (put(torch.full((7, 15), torch.nan), "edges_scores"), NonFiniteError, "`scores`"),
    "neurons of another width": (put(torch.ones(7, 4, dtype=torch.bool), "neurons_in_graph"), DamagedFileError, "\\[7, 3\\]"),
}


@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_damaged_json(damage: str, tmp_path: Path) -> None:
    change, kind, message = JSON_DAMAGE[damage]
    path = write_mib(tmp_path / "c.json", circuit())
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(kind, match=message) as raised:
        read_mib(path)
    assert str(path) in str(raised.value), "an error names the file"


@pytest.mark.parametrize("damage", PT_DAMAGE)
def test_damaged_pt(damage: str, tmp_path: Path) -> None:
    change, kind, message = PT_DAMAGE[damage]
    path = write_mib(tmp_path / "c.pt", circuit())
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(kind, match=message) as raised:
        read_mib(path)
    assert str(path) in str(raised.value), "an error names the file"


def test_what_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="nothing.json"):
        read_mib(tmp_path / "nothing.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(WrongKindError, match="JSON or torch.save"):
        read_mib(tmp_path / "list.json")
    torch.save({"cfg": Path}, tmp_path / "pickle.pt")
    with pytest.raises(UnsafeFileError):
        read_mib(tmp_path / "pickle.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DamagedFileError, match="list"):
        read_mib(tmp_path / "list.pt")
    with pytest.raises(ConfigError, match=".json or .pt"):
        write_mib(tmp_path / "c.txt", circuit())
    assert not (tmp_path / "c.txt").exists()


def test_matrices_that_do_not_fit() -> None:
    plain = circuit(whole=False)
    with pytest.raises(ConfigError, match="`nodes`[\\s\\S]*\\[7\\]"):
        MibCircuit(SHAPE, plain.scores, plain.edges, plain.nodes[1:])
    with pytest.raises(ConfigError, match="`edges`"):
        MibCircuit(SHAPE, plain.scores, plain.scores, plain.nodes)
    with pytest.raises(NonFiniteError, match="`scores`"):
        MibCircuit(SHAPE, plain.scores + torch.where(SHAPE.possible(), torch.inf, 0), plain.edges, plain.nodes)
    with pytest.raises(ConfigError, match="1 or more"):
        MibShape(2, 0, 3)


# ---- key-value groups

HEADS, GROUPS = 4, (2, 4, 1)  # of three blocks


def columns_of(groups: tuple[int, ...]) -> int:
    return sum(HEADS + 2 * n + 1 for n in groups) + 1


def test_scores_of_the_heads_of_a_group_add_up_to_its_score() -> None:
    """The gradient at the input that a group shares, against those at the copies of an ungrouped model, through keys and softmax."""
    x, weight, queries = numbers(5, 6).double(), numbers(2, 3, 6, seed=1).double(), numbers(HEADS, 5, 3, seed=2).double()
    values, change = numbers(5, seed=3).double(), numbers(7, 5, 6, seed=4).double()

    def metric(inputs: list[Tensor]) -> Tensor:
        """inputs: [5, width] of each head."""
        heads = [(queries[h] @ (inputs[h] @ weight[h // 2].T).T).softmax(-1) @ values for h in range(HEADS)]
        return torch.stack(heads).tanh().sum()

    shared, copies = [x.clone().requires_grad_() for _ in range(2)], [x.clone().requires_grad_() for _ in range(HEADS)]
    of_groups = torch.autograd.grad(metric([shared[0], shared[0], shared[1], shared[1]]), shared)
    of_heads = torch.autograd.grad(metric(copies), copies)
    to_groups, to_heads = (torch.einsum("utd,rtd->ur", change, torch.stack(slopes)) for slopes in (of_groups, of_heads))
    q, mlp, logits = numbers(7, HEADS, seed=5).double(), numbers(7, 1, seed=6).double(), numbers(7, 1, seed=7).double()
    found = grouped(torch.cat([q, to_heads, to_heads, mlp, logits], 1), HEADS, (2,))
    assert torch.allclose(found, torch.cat([q, to_groups, to_groups, mlp, logits], 1), atol=1e-12, rtol=0)
    assert to_groups.abs().amin() > 1e-4


def test_shares_of_a_group_are_equal_and_add_up_to_it() -> None:
    scores = numbers(5, columns_of(GROUPS))
    copied = ungrouped(scores, HEADS, GROUPS)
    assert copied.shape == (5, MibShape(3, HEADS, 1).n_readers) and torch.allclose(grouped(copied, HEADS, GROUPS), scores)
    assert torch.equal(copied[:, HEADS : 2 * HEADS], scores[:, HEADS : HEADS + 2].repeat_interleave(2, 1) / 2)  # k of the first block
    assert torch.equal(copied[:, -1], scores[:, -1]) and torch.allclose(copied.sum(1), scores.sum(1), atol=1e-5)


def test_an_edge_to_a_group_is_one_to_all_of_its_heads() -> None:
    edges = numbers(5, columns_of(GROUPS)) > 0
    copied = ungrouped(edges, HEADS, GROUPS)
    assert copied.dtype is torch.bool and torch.equal(grouped(copied, HEADS, GROUPS), edges)
    assert not groups_in_part(copied, HEADS, GROUPS).any()
    copied[:] = False
    copied[1, HEADS] = copied[2, HEADS + 2 : HEADS + 4] = copied[3, 0] = True  # k of one head, k of a group, q of one head
    taken = grouped(copied, HEADS, GROUPS)
    assert taken.nonzero().tolist() == [[1, HEADS], [2, HEADS + 1], [3, 0]]
    assert groups_in_part(copied, HEADS, GROUPS).nonzero().tolist() == [[1, HEADS]]


@pytest.mark.parametrize("groups", [(3, 1, 1), (0, 4, 1), (), (2, 4)])
def test_groups_that_do_not_fit(groups: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="evenly|does not fit the heads and groups"):
        ungrouped(numbers(5, columns_of(GROUPS)), HEADS, groups)
    with pytest.raises(ConfigError, match="evenly|does not fit the heads and groups"):
        grouped(numbers(5, MibShape(3, HEADS, 1).n_readers), HEADS, groups)
