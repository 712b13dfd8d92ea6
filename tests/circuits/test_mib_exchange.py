"""Circuits and scores of tiny models to files of EAP-IG and MIB and back: signs, key-value groups, and files of other models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from circuits.component_helpers import TARGET, pairs, rows
from families import FAMILIES, HEADS, KV_HEADS, LAYERS, WIDTH
from torch import Tensor, nn

from steer.circuits import Circuit, ComponentScores, Pairs, attribute
from steer.circuits.mib import read_mib, write_mib
from steer.circuits.mib_circuit import MibCircuit, MibShape
from steer.errors import ConfigError, WrongModelError

SHAPE = MibShape(LAYERS, HEADS, WIDTH)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return FAMILIES["llama"]()


@pytest.fixture(scope="module")
def scores(model: nn.Module) -> ComponentScores:
    return attribute(model, pairs(model, (4, 4)), TARGET, method="eap", progress=False)


def file_of(path: Path, edges: Tensor, nodes: Tensor | None = None, **others: Tensor) -> Path:
    plain = torch.zeros(edges.shape)
    return write_mib(path, MibCircuit(SHAPE, others.pop("scores", plain), edges, edges.any(1) if nodes is None else nodes, **others))


def column(name: str) -> int:
    return SHAPE.readers().index(name)


@pytest.mark.parametrize("ending", ["json", "pt"])
def test_a_circuit_of_edges_comes_back(ending: str, model: nn.Module, scores: ComponentScores, tmp_path: Path) -> None:
    circuit = scores.top_edges(40)
    found = Circuit.import_mib(circuit.export_mib(tmp_path / f"c.{ending}"), model)
    assert torch.equal(found.edges, circuit.edges) and torch.equal(found.nodes, circuit.nodes) and found.graph == circuit.graph
    assert found.facts["model"] == circuit.facts["model"] and len(found.facts["imported"]["sha256"]) == 64
    content = read_mib(tmp_path / f"c.{ending}")
    assert torch.equal(content.scores > 0, content.edges), "its edges are those with the highest scores"


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_circuit_of_nodes_has_all_edges_out_of_them(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    circuit = Circuit.of_nodes(model, ["a0.h1", "m1"])
    path = circuit.export_mib(tmp_path / "c.json")
    file = read_mib(path)
    assert file.shape.parallel is (family == "gpt_neox")
    assert torch.equal(file.edges, file.nodes[:, None] & file.shape.possible()) and int(file.nodes.sum()) == 2
    found = Circuit.import_mib(path, model)
    assert found.edges is None and found.node_names == ["a0.h1", "m1"]


def test_a_group_is_all_of_its_heads(model: nn.Module, tmp_path: Path) -> None:
    """Heads 2 and 3 share keys; an edge to one of them alone is widened, and the circuit says so."""
    edges = torch.zeros(SHAPE.n_writers, SHAPE.n_readers, dtype=torch.bool)
    edges[0, [column("a1.h2<k>"), column("a1.h3<k>")]] = True
    whole = Circuit.import_mib(file_of(tmp_path / "whole.json", edges), model)
    assert list(whole.graph.edges(whole.edges)) == ["input->a1.g1<k>"] and "widened" not in whole.facts["imported"]
    edges[0, column("a1.h3<k>")] = False
    with pytest.warns(UserWarning, match="1 edges go to some heads.*input->a1.g1<k>"):
        part = Circuit.import_mib(file_of(tmp_path / "part.json", edges), model)
    assert torch.equal(part.edges, whole.edges) and part.facts["imported"]["widened"] == ["input->a1.g1<k>"]


@pytest.mark.parametrize("sign", ["helps", "corruption_raises"])
def test_scores_come_back(sign: str, model: nn.Module, scores: ComponentScores, tmp_path: Path) -> None:
    circuit = scores.top_edges(30)
    path = scores.export_mib(tmp_path / "s.pt", circuit, sign=sign)
    found = ComponentScores.import_mib(path, model, sign=sign)
    assert torch.allclose(found.edge_scores, scores.edge_scores, rtol=1e-5, atol=1e-7) and scores.edge_scores.abs().max() > 1e-3
    assert torch.allclose(found.node_scores, scores.node_scores, rtol=1e-5, atol=1e-7)
    assert found.facts["imported"]["sign"] == sign and torch.equal(Circuit.import_mib(path, model).edges, circuit.edges)
    file, kept = read_mib(path), (-1 if sign == "corruption_raises" else 1) * scores["m0->a1.g0<v>"]
    shares = file.scores[SHAPE.writers().index("m0"), column("a1.h0<v>") : column("a1.h0<v>") + HEADS // KV_HEADS]
    assert shares.tolist() == pytest.approx([kept * KV_HEADS / HEADS] * len(shares), rel=1e-5), "heads of a group have equal shares"
    again = ComponentScores.load(found.save(tmp_path / "own"))
    assert torch.equal(again.edges, found.edges) and again.facts == found.facts


def test_corruption_raises_is_the_sign_of_corrupted_minus_clean_times_the_gradient(model: nn.Module, tmp_path: Path) -> None:
    """The last MLP's edge to the logits, computed by hand from what it writes in both runs."""
    clean, corrupted = rows(5), rows(5, seed=50)
    written, stream = [], []
    hooks = [
        model.model.layers[-1].mlp.register_forward_hook(lambda module, args, out: written.append(out.detach())),
        model.model.norm.register_forward_pre_hook(lambda module, args: stream.append(args[0])),
    ]
    outputs = [model(input_ids=torch.tensor([row[0].ids])) for row in (clean, corrupted)]
    for hook in hooks:
        hook.remove()
    target = outputs[0].logits[0, -1, 5] - outputs[0].logits[0, -1, 9]
    gradient = torch.autograd.grad(target, stream[0])[0]
    by_hand = float(((written[1] - written[0]) * gradient).sum())
    found = attribute(model, Pairs.of(model, clean, corrupted), TARGET, method="eap", progress=False)
    file = read_mib(found.export_mib(tmp_path / "s.json", sign="corruption_raises"))
    assert float(file.scores[-1, -1]) == pytest.approx(by_hand, rel=1e-4) and abs(by_hand) > 1e-4
    assert found[f"m{LAYERS - 1}->logits"] == pytest.approx(-by_hand, rel=1e-4)


def test_nodes_without_scores_get_the_sum_of_their_edges(model: nn.Module, scores: ComponentScores, tmp_path: Path) -> None:
    content = json.loads(scores.export_mib(tmp_path / "s.json").read_text())
    for node in content["nodes"].values():
        node.pop("score", None)
    (tmp_path / "s.json").write_text(json.dumps(content))
    found = ComponentScores.import_mib(tmp_path / "s.json", model, sign="helps")
    assert torch.allclose(found.node_scores, scores.node_scores, atol=1e-5), "which they are to first order"
    assert found.facts["imported"]["nodes_scored_by_their_edges"] == SHAPE.n_writers
    plain = replace(scores, edges=None)
    of_nodes = ComponentScores.import_mib(plain.export_mib(tmp_path / "n.json"), model, sign="helps")
    assert of_nodes.edges is None and torch.allclose(of_nodes.node_scores, scores.node_scores, rtol=1e-5)
    content["edges"] = {}
    content["nodes"]["m0"]["score"] = 1.0
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="scores some nodes only[\\s\\S]*input, a0.h0"):
        ComponentScores.import_mib(tmp_path / "s.json", model, sign="helps")


def test_what_the_form_cannot_say_is_refused(model: nn.Module, scores: ComponentScores, tmp_path: Path) -> None:
    circuit = scores.top_nodes(2)
    first, *others = scores.graph.layers
    mixed = replace(scores.graph, layers=(replace(first, parallel=True), *others))
    refused = {
        "neurons of MLPs": replace(circuit, neurons={0: torch.ones(64, dtype=torch.float64)}),
        "nothing between": replace(circuit, nodes=circuit.nodes * 0.5),
        "which is not known": replace(circuit, facts={}),
        "one shape for all blocks": replace(circuit, graph=mixed),
    }
    for message, each in refused.items():
        with pytest.raises(ConfigError, match=message):
            each.export_mib(tmp_path / "c.json")
    with pytest.raises(ConfigError, match="sign[\\s\\S]*helps"):
        scores.export_mib(tmp_path / "c.json", sign="plus")
    with pytest.raises(ConfigError, match="sign"):
        ComponentScores.import_mib(tmp_path / "c.json", model, sign="plus")
    with pytest.raises(WrongModelError, match="not one of the model that was scored"):
        scores.export_mib(tmp_path / "c.json", Circuit.of_nodes(FAMILIES["gpt_neox"](), ["m0"]))
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_circuit_of_this_model(model: nn.Module, scores: ComponentScores, tmp_path: Path) -> None:
    path = scores.export_mib(tmp_path / "s.json")
    with pytest.raises(ConfigError, match="marks nothing[\\s\\S]*ComponentScores.import_mib"):
        Circuit.import_mib(path, model)
    other = FAMILIES["llama"](num_hidden_layers=2)
    with pytest.raises(WrongModelError, match="another shape[\\s\\S]*n_layers=2[\\s\\S]*n_layers=3"):
        ComponentScores.import_mib(path, other, sign="helps")
    edges = scores.graph.possible[:1].new_zeros(SHAPE.n_writers, SHAPE.n_readers)
    neurons = torch.ones(SHAPE.n_writers, WIDTH, dtype=torch.bool)
    edges[0, 0] = True
    assert Circuit.import_mib(file_of(tmp_path / "all.json", edges, neurons=neurons), model).node_names == ["input"]
    neurons[0, 3] = False
    with pytest.raises(ConfigError, match="channels of what a node writes"):
        Circuit.import_mib(file_of(tmp_path / "some.json", edges, neurons=neurons), model)
