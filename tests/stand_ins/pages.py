"""Stand-ins of the pages of docs/: a model and a tokenizer of whole words, so that a page can name sites, tokens and widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import callback_helpers
import torch
from drift import drift_helpers, feature_helpers
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from stand_ins.namespace import StandIns, in_pages


@in_pages
def model(names: StandIns) -> LlamaForCausalLM:
    """Tiny, but with as many blocks as the embedded model, so that its sites can be named."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 30, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).eval()


@in_pages
def tuned(names: StandIns) -> LlamaForCausalLM:
    return model(names)


@in_pages
def train_one_step(names: StandIns) -> Callable[[], None]:
    model = names["model"]

    def step() -> None:
        ids = torch.tensor([[9, 8, 7, 6]])
        model.train()(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad

    return step


@in_pages
def tokenizer(names: StandIns) -> Any:
    return tiny_tokenizer()


@in_pages
def vector(names: StandIns) -> Any:
    return callback_helpers.vector()


@in_pages
def direction(names: StandIns) -> Any:
    return drift_helpers.direction()


@in_pages
def prompts(names: StandIns) -> Any:
    return drift_helpers.prompts(8)


@in_pages
def dictionary(names: StandIns) -> Any:
    own = feature_helpers.dictionary()
    own.density = feature_helpers.DENSITY
    return own
