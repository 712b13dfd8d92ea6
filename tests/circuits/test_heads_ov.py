"""OV scores: planted copying and successor heads are found, and are the head's own maps in models with shared key-value heads."""

from types import SimpleNamespace

import pytest
import torch
from circuits.head_helpers import SIZE, TOKEN, VOCAB, planted_model
from families import FAMILIES, HEAD_DIM
from tiny_tokenizer import tiny_tokenizer

import steer
from steer.circuits.heads import Head, copy_scores, successor_scores
from steer.circuits.heads.ordinals import successions
from steer.errors import AnatomyError, ConfigError, TokenizerError
from steer.intervene import Intervention, Plan

TASK = {"numbers": list(range(4, 14)), "days": [20, 21, None, 22, 23]}


def test_a_planted_head_copies():
    scores = copy_scores(planted_model(), range(3, 20))
    assert scores["copy"][1, 0] == 1 and scores["copy_eigenvalue"][1, 0] > 0.99
    assert float(scores["copy"].flatten()[[0, 1, 3]].max()) < 0.2


def test_a_planted_head_writes_successors():
    model = planted_model()
    assert float(successor_scores(model, TASK, start="embedding")["successor"].max()) < 0.4
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[:VOCAB, TOKEN] = torch.eye(VOCAB).roll(1, 1)
    assert model.transformer.h[1].attn.c_proj.weight.shape[0] == 2 * SIZE
    scores = successor_scores(model, TASK, start="embedding")
    assert scores.top("successor", 1) == [(Head(1, 0), 1.0)]
    assert scores["days"][1, 0] == 1
    assert scores.facts["chance"] == pytest.approx((9 / 10 + 2 / 4) / 11)


@pytest.mark.parametrize("start", ["embedding", "mlp0"])
def test_scores_are_those_of_the_head_s_own_map(start):
    """4 query heads share 2 key-value heads: head 2 of block 1 reads the second."""
    model = FAMILIES["llama"]()
    tokens = torch.arange(5, 25)
    first, block = model.model.layers[0], model.model.layers[1]
    with torch.no_grad():
        x = model.model.embed_tokens(tokens)
        if start == "mlp0":
            x = first.mlp(first.post_attention_layernorm(x))
        v = block.self_attn.v_proj(block.input_layernorm(x))[:, HEAD_DIM : 2 * HEAD_DIM]
        written = v @ block.self_attn.o_proj.weight[:, 2 * HEAD_DIM : 3 * HEAD_DIM].T
        logits = written * model.model.norm.weight @ model.lm_head.weight[tokens].T
    values = torch.linalg.eigvals(logits.double())
    scores = copy_scores(model, tokens.tolist(), start=start)
    assert float(scores["copy"][1, 2]) == float((logits.argmax(-1) == torch.arange(20)).double().mean())
    assert float(scores["copy_eigenvalue"][1, 2]) == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=1e-3)
    successors = float((logits[:-1].argmax(-1) == torch.arange(1, 20)).double().mean())
    assert float(successor_scores(model, {"all": tokens.tolist()}, start=start)["successor"][1, 2]) == pytest.approx(successors)


@pytest.mark.parametrize("family", ["gemma2", "falcon", "olmo2", "qwen3_moe"])
def test_families_with_other_blocks_have_finite_scores(family):
    assert bool(copy_scores(FAMILIES[family](), n=8)["copy_eigenvalue"].isfinite().all())


def test_tasks_without_a_succession_are_refused():
    model = FAMILIES["llama"]()
    assert successions([4, None, 5, 6]) == [(5, 6)]
    with pytest.raises(ConfigError, match="'days' has no succession"):
        successor_scores(model, {"days": [4, None, 5]})
    with pytest.raises(ConfigError, match="too few tokens"):
        successor_scores(model, {})
    with pytest.raises(ConfigError, match="too few tokens"):
        copy_scores(model, [4])
    with pytest.raises(TokenizerError, match="no ordinal words"):
        successor_scores(model, tokenizer=lambda word, **_: SimpleNamespace(input_ids=[4, 5]))
    numbers = successor_scores(model, tokenizer=tiny_tokenizer())  # which knows one to ten, and no other ordinals
    assert set(numbers.scores) == {"successor", "numbers"}


def test_what_does_not_depend_on_the_token_alone_is_refused():
    model = FAMILIES["llama"]()
    gate = Plan(Intervention(steer.Add(torch.arange(32.0)), "layers.1.attn.z"))
    with gate.attached(model), pytest.raises(AnatomyError, match="block 1 .* does not depend on the token alone"):
        copy_scores(model, n=8)
