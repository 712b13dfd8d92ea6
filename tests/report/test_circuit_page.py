"""The page of a circuit: self-contained, every node and edge in it, what was measured, examples under the pointer."""

import re

import pytest
from circuits.circuit_helpers import autoencoder, transcoder
from circuits.test_feature_circuit import TARGET_OF, TOKENS, rows
from report.page_reader import Page

from steer.circuits import feature_circuit
from steer.errors import ConfigError
from steer.report import write_circuit
from steer.report.circuit_plot import layout_of
from steer.report.numbers import number


@pytest.fixture
def circuit(tiny):
    dictionaries = {"tc": transcoder(), "sae": autoencoder()}
    return feature_circuit(tiny("llama"), dictionaries, rows(TOKENS), TARGET_OF, positions="each", nodes=5, edges=30, exact=4)


def test_the_page_says_what_the_circuit_is(circuit, tmp_path, tiny_tokenizer):
    node = circuit.graph.of_kind("feature")[0]
    examples = {node.part: {node.index: ['a "quoted" <text>', "another", "third", "a fourth is left out"]}}
    html = write_circuit(tmp_path / "deep" / "circuit.html", circuit, tokenizer=tiny_tokenizer, examples=examples).read_text()
    page = Page(html)
    assert not page.unbalanced and "https:" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html) and "<script" not in html
    assert "prefers-color-scheme: dark" in html and "var(--arm-0)" in html and "var(--arm-1)" in html
    said = "\n".join(page.said)
    for graph_node, score in zip(circuit.graph.nodes, circuit.graph.scores.tolist(), strict=True):
        if graph_node.kind != "target":
            assert f"{graph_node.name}, score {number(score, signed=True)}" in said
            assert page.row(graph_node.name)[2] == number(score, signed=True)
    for (a, b), weight in zip(circuit.graph.edges.tolist(), circuit.graph.weights.tolist(), strict=True):
        names = circuit.graph.nodes[a].name, circuit.graph.nodes[b].name
        assert f"{names[0]} to {names[1]}: {number(weight, signed=True)}" in said
        assert page.row(*names)[2] == number(weight, signed=True)
    assert 'a "quoted" <text> | another | third' in said and "fourth" not in html
    assert page.row("The circuit's features ablated")[1] == number(circuit.faithfulness.without_circuit)
    token = tiny_tokenizer.decode([rows(TOKENS)[0].ids[0]])
    assert token in page.text["circuit"] and f"{circuit.error_share['sae']:.0%}" in page.text["head"]
    assert "4 nodes were also ablated one by one" in page.text["measured"]


def test_nodes_stand_in_the_row_of_their_site_and_the_column_of_their_role(circuit):
    layout = layout_of(circuit.graph, circuit.graph.facts["roles"])
    assert layout.rows[-1] == "target" and layout.rows.index("tc (layers.1.mlp.output)") < layout.rows.index("sae (layers.1.output)")
    for node, (x, y) in zip(circuit.graph.nodes, layout.at, strict=True):
        if node.kind != "target":
            assert int(node.role) < x < int(node.role) + 1
        assert layout.rows[int(y)].startswith(node.part or node.site or "target")
    assert len(set(layout.at)) == len(layout.at)


def test_a_page_needs_a_circuit(tmp_path):
    with pytest.raises(ConfigError, match="the circuit of a page"):
        write_circuit(tmp_path / "page.html", {"nodes": []})
