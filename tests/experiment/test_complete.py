"""Completions: greedy, the same in a padded batch as alone, and without a trace on the model or the random state."""

from __future__ import annotations

import pytest
import torch
from callback_helpers import SITE, vector
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor

from steer.errors import TokenizerError
from steer.experiment.complete import complete
from steer.intervene import Add, Intervention, Plan
from steer.model.tokens import encode

PROMPTS = ["where is the cat", "tell the dog a good song", "who are you ?"]


@torch.no_grad()
def greedy(model: torch.nn.Module, tokenizer: object, prompt: str, tokens: int) -> str:
    """By hand: no batch, no cache, no generate."""
    ids = list(encode(tokenizer, prompt).ids)
    start = len(ids)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:  # end of sequence
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_padded_batch_says_what_each_prompt_gets_alone(family: str) -> None:
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()
    said = complete(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert said == [greedy(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert len(set(said)) > 1


def test_modes_and_random_state_are_restored() -> None:
    model = FAMILIES["llama"]().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    complete(model, tiny_tokenizer(), PROMPTS, max_new_tokens=3)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plan_acts_on_the_decoded_tokens() -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    plain = complete(model, tokenizer, PROMPTS, max_new_tokens=6)
    plan = Plan(Intervention(Add(vector(length=40.0)), SITE, scope="response", phases=("generate",)))
    with plan.attached(model) as attachment:
        steered = complete(model, tokenizer, PROMPTS, max_new_tokens=6)
        assert 0 < attachment.fired()["add@layers.1.output"] <= 5 * len(PROMPTS), "the first token comes from the prompt"
    assert steered != plain
    assert complete(model, tokenizer, PROMPTS, max_new_tokens=6) == plain


def test_no_pad_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(TokenizerError, match="no pad token"):
        complete(FAMILIES["llama"](), tokenizer, PROMPTS)


def test_the_type_of_the_answer() -> None:
    said = complete(FAMILIES["llama"](), tiny_tokenizer(), PROMPTS[:1], max_new_tokens=1)
    assert isinstance(said, list) and isinstance(said[0], str) and not isinstance(said, Tensor)
