"""Graphs of components, scores and circuits: counts and names, pruning, what edges add up to on every family, files and damage."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from circuits.attribution_helpers import CLEAN, CORRUPTED, close, pairs, target
from damage import DAMAGE
from families import FAMILIES
from processes import run_on_ranks
from torch import Tensor

from steer.circuits import Circuit, ComponentGraph, ComponentScores, attribute, attribute_chunks, mean_ablation
from steer.circuits.components import LayerShape
from steer.circuits.edge_contraction import products
from steer.circuits.stream_readers import stream_readers
from steer.errors import AnatomyError, ConfigError, DamagedFileError, NonFiniteError, SiteError, SteerError, WrongKindError, WrongModelError
from steer.kernels import edge_scores
from steer.model.anatomy import Anatomy

PARALLEL = {"gpt_neox", "falcon"}
POST_NORM = {"gemma2", "gemma3", "olmo2"}
NO_PROJECTION = {"mixtral", "qwen3_moe"}  # mixtures of experts, whose neurons are no one tensor


def graph(*shapes: tuple[int, int], parallel: bool = False) -> ComponentGraph:
    return ComponentGraph(tuple(LayerShape(heads, groups, parallel) for heads, groups in shapes))


# ---- counts and names


def test_counts_of_known_models():
    assert graph(*[(12, 12)] * 12).n_edges == 32_491  # GPT-2 small
    assert graph(*[(9, 3)] * 30).n_edges == 70_651  # SmolLM2-135M, with its own 3 key-value heads
    assert graph(*[(32, 8)] * 32).n_edges == 805_681  # Llama 3 8B
    assert graph(*[(32, 32)] * 32).n_edges == 1_592_881  # the same with a copy for each query head
    small = graph(*[(12, 12)] * 12)
    assert (len(small.writers), len(small.readers)) == (157, 445)


def test_blocks_in_parallel_have_no_edge_from_their_heads_to_their_mlp():
    serial, parallel = graph((4, 2), (4, 2)), graph((4, 2), (4, 2), parallel=True)
    assert serial.n_edges - parallel.n_edges == 8
    edge = serial.writer_place("a1.h3"), serial.reader_place("m1")
    assert serial.possible[edge] and not parallel.possible[edge]


def test_every_name_leads_to_its_place():
    shapes = graph((4, 2), (4, 4))
    assert [shapes.writer_place(writer.name) for writer in shapes.writers] == list(range(len(shapes.writers)))
    assert [shapes.reader_place(reader.name) for reader in shapes.readers] == list(range(len(shapes.readers)))
    assert {"a0.h3<q>", "a0.g1<k>", "a1.h3<v>", "m1", "logits"} <= {reader.name for reader in shapes.readers}
    one = torch.zeros_like(shapes.possible)
    one[shapes.writer_place("a0.h1"), shapes.reader_place("a1.h2<k>")] = True
    assert list(shapes.edges(one)) == ["a0.h1->a1.h2<k>"]


@pytest.mark.parametrize(("what", "name"), [("writer", "a0.h4"), ("writer", "a0.g1<k>"), ("reader", "a0.h1<k>"), ("reader", "m2")])
def test_an_unknown_name_is_refused(what, name):
    with pytest.raises(ConfigError, match=rf"no {what} '{name}'"):
        getattr(graph((4, 2), (4, 2)), f"{what}_place")(name)


# ---- pruning


def pruned_slowly(shapes: ComponentGraph, edges: Tensor) -> Tensor:
    """One edge after another is taken out until none is left that lies on no way from the input to the logits."""
    kept = {tuple(edge) for edge in (edges & shapes.possible).nonzero().tolist()}
    users = {place: _users(shapes, place) for place in range(len(shapes.readers))}
    while True:
        reached = {0} | {writer for _, reader in kept for writer in users[reader]}
        with_exit = {writer for writer, _ in kept}
        last = len(shapes.readers) - 1
        left = {(u, v) for u, v in kept if u in reached and (v == last or any(writer in with_exit for writer in users[v]))}
        if left == kept:
            result = torch.zeros_like(shapes.possible)
            for edge in kept:
                result[edge] = True
            return result
        kept = left


def _users(shapes: ComponentGraph, place: int) -> list[int]:
    reader = shapes.readers[place]
    if reader.kind == "logits":
        return []
    if reader.kind == "mlp":
        return [shapes.writer_place(f"m{reader.layer}")]
    shape = shapes.layers[reader.layer]
    share = 1 if reader.kind == "q" else shape.heads // shape.groups
    return [shapes.writer_place(f"a{reader.layer}.h{reader.index * share + i}") for i in range(share)]


@pytest.mark.parametrize("seed", range(12))
def test_pruning_leaves_what_lies_on_a_way_from_input_to_logits(seed):
    shapes = graph((4, 2), (2, 1), (4, 4), parallel=seed % 3 == 0)
    edges = torch.rand(shapes.possible.shape, generator=torch.Generator().manual_seed(seed)) < 0.02 + 0.012 * seed
    edges[0, 0] = True
    pruned = shapes.pruned(edges)
    assert torch.equal(pruned, pruned_slowly(shapes, edges))
    assert torch.equal(shapes.pruned(pruned), pruned)


def test_pruning_takes_out_what_only_a_dead_end_kept():
    shapes = graph((1, 1), (1, 1))
    names = ["input->a0.h0<v>", "a0.h0->m0", "m0->a1.h0<q>"]
    edges = torch.zeros_like(shapes.possible)
    for name in names:
        writer, reader = name.split("->")
        edges[shapes.writer_place(writer), shapes.reader_place(reader)] = True
    assert not shapes.pruned(edges).any()
    edges[shapes.writer_place("a1.h0"), -1] = True
    assert sorted(shapes.edges(shapes.pruned(edges))) == sorted([*names, "a1.h0->logits"])


# ---- models


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_add_up_to_nodes(tiny, family):
    model = tiny(family)
    scores = attribute(model, pairs(model), target, method="eap", neurons=family not in NO_PROJECTION, progress=False)
    assert close(scores.edge_scores.sum(1), scores.node_scores)
    assert bool(scores.node_scores.all()) and scores.edges.shape[1:] == scores.graph.possible.shape
    if family not in NO_PROJECTION | POST_NORM:  # what an MLP writes is linear in its neurons
        of_mlps = torch.stack([scores.node_scores[scores.graph.mlp_at(layer)] for layer in scores.neurons])
        assert close(torch.stack([of_layer.sum() for of_layer in scores.neurons.values()]), of_mlps)


@pytest.mark.parametrize("family", FAMILIES)
def test_how_blocks_read_the_stream(tiny, family):
    model = tiny(family)
    blocks = stream_readers(model, Anatomy.find(model))
    assert {block.parallel for block in blocks} == {family in PARALLEL}
    assert {block.post_norm is not None for block in blocks} == {family in POST_NORM}
    assert {block.attention is None for block in blocks} == {family == "olmo2"}


def test_a_block_that_reads_something_else_is_refused(tiny):
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 1}),
                                        with_kwargs=True)  # fmt: skip
    with pytest.raises(AnatomyError, match=r"attention in block 1[\s\S]*edges=False"):
        attribute(model, pairs(model), target, method="eap", progress=False)


def test_neurons_of_experts_are_refused(tiny):
    model = tiny("mixtral")
    with pytest.raises(SiteError, match=r"mlp\.neurons"):
        attribute(model, pairs(model), target, method="eap", neurons=True, progress=False)


# ---- files


@pytest.fixture(scope="module")
def scores() -> ComponentScores:
    model = FAMILIES["llama"]()
    return attribute(model, pairs(model), target, method="eap", neurons=True, progress=False)


def circuits(scores: ComponentScores) -> list[Circuit]:
    model = FAMILIES["llama"]()
    ablation = mean_ablation(model, pairs(model).corrupted.rows)
    return [scores.top_nodes(3).with_ablation(ablation), scores.top_edges(40), scores.top_neurons(5)]


@pytest.mark.parametrize("name", ["scores", "scores.safetensors"])
def test_scores_come_back_from_a_file(scores, tmp_path, name):
    loaded = ComponentScores.load(scores.save(tmp_path / name))
    assert torch.equal(loaded.nodes, scores.nodes) and torch.equal(loaded.edges, scores.edges)
    assert loaded.graph == scores.graph and loaded.facts == scores.facts and loaded.prompts == 2 and loaded.roles == scores.roles
    assert loaded.neurons.keys() == scores.neurons.keys()
    assert all(torch.equal(loaded.neurons[layer], scores.neurons[layer]) for layer in scores.neurons)
    bare = ComponentScores.load(dataclasses.replace(scores, edges=None, neurons={}).save(tmp_path / f"bare_{name}"))
    assert bare.edges is None and bare.neurons == {}


@pytest.mark.parametrize("number", range(3))
def test_circuits_come_back_from_a_file(scores, tmp_path, number):
    circuit = circuits(scores)[number]
    loaded = Circuit.load(circuit.save(tmp_path / "circuit"))
    assert torch.equal(loaded.nodes, circuit.nodes) and loaded.facts == circuit.facts and loaded.graph == circuit.graph
    assert (loaded.edges is None) == (circuit.edges is None) and (loaded.edges is None or torch.equal(loaded.edges, circuit.edges))
    assert {layer: amounts.tolist() for layer, amounts in loaded.neurons.items()} == {
        layer: amounts.tolist() for layer, amounts in circuit.neurons.items()
    }
    if circuit.ablation is not None:
        assert loaded.ablation.kind == "mean" and loaded.ablation.facts == circuit.ablation.facts
        assert all(torch.equal(loaded.ablation.values[site], value) for site, value in circuit.ablation.values.items())


def test_a_file_of_another_kind_is_refused(scores, tmp_path):
    with pytest.raises(WrongKindError):
        Circuit.load(scores.save(tmp_path / "scores"))
    with pytest.raises(WrongKindError):
        ComponentScores.load(circuits(scores)[0].save(tmp_path / "circuit"))


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("kind", ["scores", "circuit"])
def test_a_damaged_file_is_told_or_reads_as_something_whole(scores, tmp_path, how, kind):
    whole = scores if kind == "scores" else circuits(scores)[0]
    folder = whole.save(tmp_path / "whole")
    for seed in range(40):
        chance = random.Random(seed)
        for file in sorted(Path(folder).iterdir()):
            before = file.read_bytes()
            if how == "rewritten" and file.suffix != ".json":
                continue
            file.write_bytes(DAMAGE[how](before, chance))
            try:
                loaded = type(whole).load(folder)
            except SteerError:
                pass
            else:
                assert loaded.nodes.shape[-1] == len(loaded.graph.writers) and repr(loaded)
            finally:
                file.write_bytes(before)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("scores", {"layers": [{"heads": 4, "groups": 2, "parallel": False}]}),
        ("scores", {"roles": ["a", "b"]}),
        ("scores", {"prompts": 0}),
        ("circuit", {"layers": [{"heads": 4, "groups": 2, "parallel": False}]}),
        ("circuit", {"layers": [{"heads": 4, "groups": "x", "parallel": False}]}),
    ],
)
def test_a_manifest_that_does_not_fit_its_tensors_is_damage(scores, tmp_path, kind, change):
    whole = scores if kind == "scores" else circuits(scores)[0]
    folder = Path(whole.save(tmp_path / "whole"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises((DamagedFileError, ConfigError)):
        type(whole).load(folder)


@pytest.mark.parametrize(
    "change", [{"roles": ("a", "b")}, {"prompts": 0}, {"edges": torch.zeros(1, 3, 3)}, {"neurons": {9: torch.zeros(1, 4)}}]
)
def test_scores_that_do_not_fit_together_are_refused(scores, change):
    with pytest.raises(ConfigError, match="scores"):
        dataclasses.replace(scores, **change)


def test_scores_that_are_not_finite_are_refused(scores, tmp_path):
    bad = dataclasses.replace(scores, nodes=torch.full_like(scores.nodes, torch.nan))
    with pytest.raises(NonFiniteError):
        ComponentScores.load(bad.save(tmp_path / "bad"))


# ---- joined


def test_scores_of_parts_join_to_those_of_all(tiny):
    model = tiny("llama")
    all_pairs = pairs(model)
    parts = [one_pair(model, number) for number in range(2)]
    first, second = (attribute(model, part, first_target, method="eap", neurons=True, progress=False) for part in parts)
    joined, whole = first.joined(second), attribute(model, all_pairs, first_target, method="eap", neurons=True, progress=False)
    assert close(joined.edges, whole.edges, 1e-5) and close(joined.nodes, whole.nodes, 1e-5) and joined.prompts == 2
    assert all(close(joined.neurons[layer], whole.neurons[layer], 1e-5) for layer in whole.neurons)
    assert joined.facts["value"] == pytest.approx(whole.facts["value"]) and joined.facts["pairs"]["count"] == 2
    chunks = attribute_chunks(model, ((part, first_target) for part in parts), method="eap", neurons=True, progress=False)
    assert torch.equal(chunks.edges, joined.edges) and chunks.facts == joined.facts


def test_no_chunk_is_refused(tiny):
    with pytest.raises(ConfigError, match="no pairs"):
        attribute_chunks(tiny("llama"), iter(()))


def score_on_rank(expected: Tensor) -> None:
    """Each of two processes scores one pair; together they have the scores of both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        model, number = FAMILIES["llama"](), dist.get_rank()
        own = attribute(model, one_pair(model, number), first_target, method="eap", progress=False)
        both = own.all_reduced()
        assert both.prompts == 2 and both.facts["pairs"]["count"] == 2 and close(both.edges, expected, 1e-5)
        other = own if number == 0 else dataclasses.replace(own, edges=None)
        with pytest.raises(WrongModelError, match="joined"):
            other.all_reduced()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_scores_of_one(tiny):
    model = tiny("llama")
    run_on_ranks(score_on_rank, attribute(model, pairs(model), first_target, method="eap", progress=False).edges)


def test_scores_of_one_process_are_all_there_are(scores):
    assert scores.all_reduced() is scores


def one_pair(model, number: int):
    return pairs(model, [CLEAN[number]], [CORRUPTED[number]])


def first_target(logits: Tensor, prompt: int) -> Tensor:
    return target(logits, 0)


def test_scores_of_other_models_do_not_join(tiny, scores):
    other = tiny("gpt2")
    with pytest.raises(WrongModelError, match="joined"):
        scores.joined(attribute(other, pairs(other), target, method="eap", progress=False))


def test_the_kernel_of_edge_scores_gives_the_product_that_a_cpu_takes() -> None:
    written, read = torch.randn(7, 5, 32), torch.randn(11, 5, 32)
    by_kernel = edge_scores(written.transpose(0, 1), None, read.transpose(0, 1))
    assert torch.allclose(products(written, read), by_kernel, atol=1e-4)
