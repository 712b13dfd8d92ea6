"""Scores are log-probabilities: the same as from one text at a time by hand, whatever the batches, and they see an attached plan."""

from __future__ import annotations

import pytest
import torch
from callback_helpers import make_plan
from families import FAMILIES
from hand import hook_count
from torch import Tensor, nn

from steer.errors import NonFiniteError
from steer.experiment.score import Suite, measure, response_logprobs
from steer.model.tokens import Row


def rows(n: int = 7, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 14, (n,), generator=generator).tolist()
    return [Row(tuple(torch.randint(7, 96, (length,), generator=generator).tolist()), 1 + length // 3) for length in lengths]


@torch.no_grad()
def naive(model: nn.Module, row: Row) -> float:
    """Mean over the response of log softmax, one unpadded text at a time."""
    logits = model(torch.tensor([row.ids])).logits[0].double()
    logprobs = [logits[t - 1].log_softmax(-1)[row.ids[t]] for t in range(row.prompt, len(row.ids))]
    return float(torch.stack(logprobs).mean())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "falcon", "mixtral"])
@pytest.mark.parametrize("max_tokens", [2048, 20])
def test_scores_equal_a_naive_log_softmax(family: str, max_tokens: int) -> None:
    model, texts = FAMILIES[family](), rows()
    logprobs = response_logprobs(model, texts, pad=0, max_tokens=max_tokens)
    assert logprobs.dtype == torch.float64
    assert logprobs.tolist() == pytest.approx([naive(model, row) for row in texts], rel=1e-4)


def test_measures_of_an_arm() -> None:
    model = FAMILIES["llama"]()
    suite = Suite(styled=rows(5, 1), neutral=rows(5, 2), texts=rows(3, 3))
    measures = measure(model, suite, pad=0)
    styled, neutral, texts = (torch.tensor([naive(model, row) for row in part]) for part in (suite.styled, suite.neutral, suite.texts))
    expected = {"behaviour_gap": styled - neutral, "task_logprob": neutral, "neutral_loss": -texts}
    assert list(measures) == list(expected)
    for name, values in expected.items():
        assert measures[name].tolist() == pytest.approx(values.tolist(), rel=1e-3, abs=1e-4), name


def edited_by_hand(model: nn.Module, row: Row, edit: Tensor) -> float:
    """Adds a vector to the response tokens after block 1, one text at a time."""

    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, : row.prompt], output[:, row.prompt :] + edit], 1)

    handle = model.model.layers[1].register_forward_hook(hook)
    try:
        return naive(model, row)
    finally:
        handle.remove()


def test_an_attached_plan_is_in_the_scores_on_the_response_tokens() -> None:
    model, texts = FAMILIES["llama"](), rows()
    plan = make_plan(strength=1.5, phases=("validate", "generate"))
    plain = response_logprobs(model, texts, pad=0)
    with plan.attached(model) as attachment:
        steered = response_logprobs(model, texts, pad=0)
        assert attachment.fired() == {"add@layers.1.output": sum(row.response for row in texts)}
        attachment.set_strength(0.0)
        assert torch.equal(response_logprobs(model, texts, pad=0), plain)
    edit = 1.5 * plan.interventions[0].operator.tensors["vector"][0]
    assert steered.tolist() == pytest.approx([edited_by_hand(model, row, edit) for row in texts], rel=1e-4)
    assert float((steered - plain).abs().min()) > 1e-3


def test_a_plan_for_training_leaves_the_scores_alone() -> None:
    model, texts = FAMILIES["llama"](), rows()
    plain = response_logprobs(model, texts, pad=0)
    with make_plan(phases=("train",)).attached(model):
        assert torch.equal(response_logprobs(model, texts, pad=0), plain)


def test_the_model_is_left_as_it_was() -> None:
    model = FAMILIES["llama"]().train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    response_logprobs(model, rows(), pad=0)
    assert [module.training for module in model.modules()] == modes
    assert hook_count(model) == 0 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_model_is_not_scored(bad: float) -> None:
    model = FAMILIES["llama"]()
    model.model.norm.weight.data[3] = bad
    with pytest.raises(NonFiniteError, match="learning rate"):
        response_logprobs(model, rows(), pad=0)
