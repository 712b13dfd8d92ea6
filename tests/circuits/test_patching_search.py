"""ACDC and causal scrubbing find and confirm a planted path; ACDC decides as one run after the other would."""

from __future__ import annotations

import pytest
import torch
from circuits.component_helpers import TARGET, exact_model, pairs, rows, run_of
from circuits.planted import EDGES, planted
from families import FAMILIES
from hand import hook_count
from torch import Tensor

from steer.circuits import Circuit, Pairs, acdc, attribute, causal_scrubbing, zero_ablation
from steer.circuits.component_run import TakenOut
from steer.errors import ConfigError, WrongModelError
from steer.model.tokens import Row

QUIET = {"progress": False}


# ---- ACDC


def test_acdc_finds_the_planted_path():
    model = planted()
    both = Pairs.of(model, rows(5, 5), rows(5, 5, seed=50))
    for target in (None, TARGET):
        circuit = acdc(model, both, 1e-4, target, **QUIET)
        assert sorted(circuit.graph.edges(circuit.edges)) == sorted(EDGES)
        assert circuit.facts["loss"] == pytest.approx(circuit.facts["start_loss"], abs=1e-3)
    by_zero = acdc(model, both, 1e-4, candidates=[*EDGES, "input->logits", "a0.h0->m2"], ablation=zero_ablation(), **QUIET)
    assert sorted(by_zero.graph.edges(by_zero.edges)) == sorted(EDGES) and by_zero.ablation.kind == "zero"


def test_no_edge_survives_an_infinite_threshold_and_all_do_a_negative_one():
    model = FAMILIES["llama"](num_hidden_layers=2)
    both = pairs(model, (5,))
    nothing = acdc(model, both, float("inf"), **QUIET)
    assert not nothing.edges.any() and nothing.facts["loss"] > 0.01
    everything = acdc(model, both, -1e-3, **QUIET)
    assert torch.equal(everything.edges, everything.graph.possible) and everything.facts["loss"] == pytest.approx(0, abs=1e-6)


def one_after_the_other(model, both: Pairs, threshold: float, candidates: Tensor) -> Tensor:
    """[writers, readers] bool, the edges that stay."""
    run = run_of(model, "resample")
    nodes = TakenOut.nothing(run.graph).nodes
    out = run.graph.possible & ~candidates
    loss = -float(run.values([TakenOut(nodes, {}, out)]).mean())
    for reader, writer in reversed(candidates.T.nonzero().tolist()):
        tried = out.clone()
        tried[writer, reader] = True
        new = -float(run.values([TakenOut(nodes, {}, tried)]).mean())
        if new - loss < threshold:
            out, loss = tried, new
    return run.graph.pruned(run.graph.possible & ~out)


def test_edges_tried_together_are_decided_as_one_after_the_other(tmp_path):
    model = exact_model("llama")
    both = pairs(model)
    candidates = attribute(model, both, TARGET, **QUIET).top_edges(40)
    expected = one_after_the_other(model, both, 2e-3, candidates.edges)
    found = acdc(model, both, 2e-3, TARGET, candidates=candidates, max_tokens=256, **QUIET)
    assert torch.equal(found.edges, expected) and 0 < int(expected.sum()) < 40
    again = Circuit.load(found.save(tmp_path / "circuit"))
    assert torch.equal(again.edges, found.edges) and again.facts["candidates"] == int(candidates.edges.sum())
    assert again.ablation.kind == "resample"


def test_a_search_that_was_stopped_goes_on(tmp_path):
    model = exact_model("llama")
    both = pairs(model)
    candidates = attribute(model, both, TARGET, **QUIET).top_edges(25)
    calls = 0

    def stops(logits: Tensor, prompt: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt
        return TARGET(logits, prompt)

    arguments = {"candidates": candidates, "checkpoint": tmp_path / "search", **QUIET}
    with pytest.raises(KeyboardInterrupt):
        acdc(model, both, 2e-3, stops, **arguments)
    assert hook_count(model) == 0
    first = calls
    found = acdc(model, both, 2e-3, stops, **arguments)
    whole = acdc(model, both, 2e-3, stops, candidates=candidates, **QUIET)
    assert torch.equal(found.edges, whole.edges)
    assert found.facts["runs"] < whole.facts["runs"] + 12 and first == 40
    with pytest.raises(ConfigError, match="another run"):
        acdc(model, both, 3e-3, stops, **arguments)


def test_what_acdc_cannot_search_is_refused(tiny):
    model = tiny("llama")
    both = pairs(model)
    for threshold in (float("nan"), "0.1", True):
        with pytest.raises(ConfigError, match="threshold"):
            acdc(model, both, threshold, **QUIET)
    with pytest.raises(ConfigError, match="no edge to try"):
        acdc(model, both, 0.1, candidates=[], **QUIET)
    with pytest.raises(ConfigError, match="m2->m1"):
        acdc(model, both, 0.1, candidates=["m2->m1"], **QUIET)
    scores = attribute(tiny("gpt2"), pairs(tiny("gpt2")), TARGET, **QUIET)
    with pytest.raises(WrongModelError):
        acdc(model, both, 0.1, candidates=scores.top_edges(20), **QUIET)


def test_candidates_of_a_cast_copy_are_taken_with_a_warning(tiny):
    narrow = tiny("llama").bfloat16()
    candidates = attribute(tiny("llama"), pairs(tiny("llama")), TARGET, **QUIET).top_edges(20)
    with pytest.warns(UserWarning, match="candidates of acdc were made on[\\s\\S]*is a bfloat16 copy"):
        acdc(narrow, pairs(narrow), float("inf"), candidates=candidates, **QUIET)


# ---- causal scrubbing


def shuffled_prompts(count: int = 12) -> list[Row]:
    """Three bags of tokens, each in several orders."""
    generator = torch.Generator().manual_seed(1)
    bags = [torch.randint(3, 96, (5,), generator=generator) for _ in range(3)]
    return [Row(tuple(bags[i % 3][torch.randperm(5, generator=generator)].tolist()), 0) for i in range(count)]


def test_a_true_hypothesis_of_a_path_recovers_everything_and_a_false_one_does_not():
    model, prompts = planted(), shuffled_prompts()
    bags = [tuple(sorted(row.ids)) for row in prompts]
    true = causal_scrubbing(model, dict.fromkeys(EDGES, bags), prompts, _spread_target(bags), resamplings=4, **QUIET)
    assert true.recovered == pytest.approx(1, abs=1e-4) and true.interval == pytest.approx((1, 1), abs=1e-3)
    assert true.facts["of"] == "edges" and 0.1 < true.facts["drawn_for_itself"] < 0.45  # one in four of each bag
    for edge in EDGES:  # each of them is needed
        without = {name: bags for name in EDGES if name != edge}
        assert causal_scrubbing(model, without, prompts, _spread_target(bags), resamplings=16, **QUIET).recovered < 0.6
    wrong = dict.fromkeys(EDGES, [number // 4 for number in range(len(prompts))])
    assert causal_scrubbing(model, wrong, prompts, _spread_target(bags), resamplings=16, **QUIET).recovered < 0.6


def _spread_target(bags):
    """Of each bag the difference between two tokens of its own, so that logits of another bag are wrong."""
    tokens = {bag: (7 * number + 5, 11 * number + 9) for number, bag in enumerate(dict.fromkeys(bags))}

    def target(logits: Tensor, prompt: int) -> Tensor:
        right, wrong = tokens[bags[prompt]]
        return logits[-1, right] - logits[-1, wrong]

    return target


def test_nodes_of_a_hypothesis_write_what_they_write_on_prompts_with_their_key():
    model, prompts = planted(), shuffled_prompts()
    bags = [tuple(sorted(row.ids)) for row in prompts]
    target = _spread_target(bags)
    true = causal_scrubbing(model, {"a0.h1": bags}, prompts, target, resamplings=4, **QUIET)  # MLPs and the input run on
    assert true.recovered == pytest.approx(1, abs=1e-4) and true.facts["of"] == "nodes"
    other = causal_scrubbing(model, {"a0.h2": bags}, prompts, target, resamplings=16, **QUIET)
    assert other.recovered < 0.6
    low, high = other.interval
    assert low < other.recovered < high
    together = {"a0.h1": lambda prompt: bags[prompt], "input->a0.g0<v>": bags, "m1": bags}
    by_edges = causal_scrubbing(model, together, prompts, target, resamplings=2, **QUIET)
    assert by_edges.recovered == pytest.approx(1, abs=1e-4) and by_edges.facts["of"] == "edges"


def test_prompts_that_are_exchanged_for_themselves_change_nothing():
    """Two prompts with their copies: whatever is drawn by key is the same, through norms and softmax, node by node and edge by edge."""
    model = exact_model("llama")
    prompts = [*rows(5, 5), *rows(5, 5)]
    writers = [writer.name for writer in run_of(model).graph.writers]
    keys = [0, 1, 0, 1]
    for hypothesis in (
        dict.fromkeys(writers, keys),
        {**dict.fromkeys(writers[1:], keys), **{edge: keys for edge in _out_of_the_input(model)}},
    ):
        found = causal_scrubbing(model, hypothesis, prompts, TARGET, resamplings=2, **QUIET)
        torch.testing.assert_close(found.scrubbed, found.model.expand(2, -1), rtol=0, atol=2e-5)
    assert found.facts["of"] == "edges" and found.facts["drawn_for_itself"] < 1


def _out_of_the_input(model) -> list[str]:
    graph = run_of(model).graph
    return [f"input->{reader.name}" for reader in graph.readers]


def test_what_cannot_be_scrubbed_is_refused(tiny):
    model = tiny("llama")
    same = rows(5, 5, 5)
    for match, hypothesis, prompts in (
        ("hypothesis is empty", {}, same),
        ("different length", {"m1": [0, 0, 1]}, rows(5, 4, 5)),
        ("nothing can be exchanged", {"m1": lambda prompt: prompt}, same),
        ("keys of 'm1'", {"m1": [0, 0]}, same),
        ("cannot be compared", {"m1": [[], [], []]}, same),
        ("a7.h0", {"a7.h0": [0, 0, 1]}, same),
        ("names an edge twice", {"m1": [0, 0, 1], "m1->logits": [0, 0, 1]}, same),
    ):
        with pytest.raises(ConfigError, match=match):
            causal_scrubbing(model, hypothesis, prompts, TARGET, **QUIET)
    assert hook_count(model) == 0
