"""Information flow routes: shares of what is read, against a llama written out."""

import sys

import pytest
import torch
from circuits.attribution_helpers import CLEAN, MaskedLlama, close, rows
from families import FAMILIES

from steer.circuits import ComponentScores, information_flow
from steer.errors import ConfigError

TEXTS = CLEAN


def flow(model, **how) -> ComponentScores:
    return information_flow(model, rows(TEXTS), progress=False, **how)


def test_shares_are_those_of_a_llama_written_out(tiny):
    model = tiny("llama")
    written_out, scores = MaskedLlama(model), flow(model)
    expected = torch.zeros_like(scores.edge_scores)
    for prompt in TEXTS:
        with torch.no_grad():
            written = written_out(prompt, torch.zeros(expected.shape))[1]  # [writers, tokens, width]
        for reader in range(expected.shape[1]):
            sees = scores.graph.possible[:, reader]
            for token in range(len(prompt)):
                parts = written[sees, token]
                x = parts.sum(0)
                near = torch.tensor([max(0.0, float(x.abs().sum() - (x - u).abs().sum())) for u in parts])
                expected[sees, reader] += (near / near.sum()).double() / len(prompt) / len(TEXTS)
    assert close(scores.edge_scores, expected, 1e-4)
    assert close(scores.node_scores, expected.sum(1) / scores.graph.possible.sum(1), 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_reader_reads_is_shared_out_in_full(tiny, family):
    scores = flow(tiny(family))
    assert bool((scores.edge_scores >= 0).all()) and close(scores.edge_scores.sum(0), torch.ones(scores.edge_scores.shape[1]), 1e-5)
    assert not scores.edge_scores[~scores.graph.possible].any()


def test_roles_and_small_chunks_add_up(tiny, monkeypatch):
    model = tiny("llama")
    whole = flow(model)
    monkeypatch.setattr(sys.modules["steer.circuits.information_flow"], "CHUNK_BYTES", 1)
    labels = [["a" if place % 2 else "b" for place in range(len(prompt))] for prompt in TEXTS]
    by_role = flow(model, positions=labels)
    assert set(by_role.roles) == {"a", "b"} and close(by_role.edge_scores, whole.edge_scores, 1e-5)


def test_a_circuit_can_be_made_of_shares_and_no_text_is_refused(tiny):
    model = tiny("llama")
    assert flow(model).top_edges(120).node_names
    with pytest.raises(ConfigError, match="no prompts"):
        information_flow(model, [])
