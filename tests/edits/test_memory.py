"""Memory for fewer texts than a batch has: passes go on in halves, and nothing is counted twice or left half done."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from edits.edit_helpers import CONTEXTS, FACTS, equal_weights, model_of, running_text, weights_of
from edits.editor_helpers import STRONG, TOKENIZER, UNSAID, covariance_of, edit
from torch import nn

from steer.edits import Covariance, already_said, fact_keys, sample_contexts
from steer.edits.editors.constrained_ft import ConstrainedFT
from steer.edits.editors.lora import LoRA
from steer.edits.editors.memit import MEMIT
from steer.edits.locate import answer_row
from steer.model.generation import continuations
from steer.model.likelihood import response_logprobs
from steer.model.text_loss import text_losses
from steer.model.tokens import plain

ROWS = [answer_row(TOKENIZER, fact.prompt, fact.target) for fact in FACTS]
WAYS = {
    "keys": lambda model, folder: torch.stack([keys.combined for keys in fact_keys(model, TOKENIZER, FACTS, CONTEXTS, [0, 1]).values()]),
    "covariance": lambda model, folder: torch.stack(
        [*Covariance.fit(model, TOKENIZER, running_text(9), [0, 1], folder=folder, progress=False).sums.values()]
    ),
    "log-probabilities": lambda model, folder: response_logprobs(model, ROWS, pad=0),
    "losses": lambda model, folder: text_losses(model, [plain(TOKENIZER, text) for text in running_text(4)]).nats,
    "answers": lambda model, folder: torch.tensor(already_said(model, TOKENIZER, FACTS)),
    "contexts": lambda model, folder: torch.tensor([ord(sign) for text in sample_contexts(model, TOKENIZER).prefixes for sign in text]),
    "texts": lambda model, folder: torch.tensor(
        continuations(model, [row.ids for row in ROWS], [4] * 3, pad=0, max_tokens=1024, seed=0, do_sample=False)
    ),
    "values": lambda model, folder: edit(model, UNSAID, MEMIT(value_settings=STRONG, ridge=0.01)).deltas[0].change(),
    "FT-L": lambda model, folder: edit(model, UNSAID, ConstrainedFT(steps=3)).deltas[0].change(),
    "LoRA": lambda model, folder: edit(model, UNSAID, LoRA(steps=3)).deltas[0].change(),
}


@contextmanager
def memory_for(texts: int, model: nn.Module):
    """The second block has none for more, when the first one was run and read already."""

    def full(block, args):
        if len(args[0]) > texts:
            asked.append(len(args[0]))
            raise torch.OutOfMemoryError("no room")

    asked: list[int] = []
    handle = model.model.layers[1].register_forward_pre_hook(full)
    try:
        yield asked
    finally:
        handle.remove()


@pytest.mark.parametrize("way", WAYS)
def test_passes_go_on_in_halves(way, tmp_path):
    model = model_of("llama")
    covariance_of("llama")
    before, expected = weights_of(model), WAYS[way](model, tmp_path / "whole").double()
    with memory_for(1 + len(CONTEXTS) if way == "values" else 1, model) as asked:
        found = WAYS[way](model, tmp_path / "halves").double()
        assert asked
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))
    assert equal_weights(model, before) and not any(parameter.grad is not None for parameter in model.parameters())


def test_what_is_too_large_alone_is_said(tmp_path):
    model = model_of("llama")
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            fact_keys(model, TOKENIZER, FACTS, CONTEXTS, [0, 1])
    finally:
        handle.remove()
