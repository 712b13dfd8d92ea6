"""The unembedding runs at some tokens alone, unless somebody else gets its output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from bias.bias_helpers import words_tokenizer
from families import FAMILIES, VOCAB, WIDTH
from torch import Tensor, nn

import steer
from steer.bias.scoring import Scorer
from steer.model.anatomy import Anatomy
from steer.model.logits_at import logits_at, lone_head
from steer.model.tokens import Row

IDS = torch.tensor([[5, 9, 7, 3], [6, 8, 4, 2]])
COLUMNS = torch.tensor([3, 6])


def head_of(model: nn.Module) -> nn.Module | None:
    return lone_head(model, Anatomy.find(model).unembedding)


@contextmanager
def tokens_of(head: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Numbers of tokens that a linear map runs on."""
    seen: list[int] = []
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        if self is head:
            seen.append(x.shape[:-1].numel())
        return forward(self, x)

    with monkeypatch.context() as patched:
        patched.setattr(nn.Linear, "forward", counted)
        yield seen


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_at_some_tokens_are_those_of_a_whole_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[family]()
    head = head_of(model)
    assert head is not None
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        with tokens_of(head, monkeypatch) as seen:
            some = logits_at(model, head, {"input_ids": IDS}, COLUMNS)
    assert seen == [len(COLUMNS)] and "forward" not in vars(head)
    torch.testing.assert_close(some, whole.flatten(0, 1)[COLUMNS])
    assert some.shape == (2, whole.shape[-1])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_under_autocast_the_unembedding_stays_in_float32(family: str) -> None:
    model = FAMILIES[family]()
    inputs = {"input_ids": IDS}
    with torch.no_grad():
        whole = logits_at(model, head_of(model), inputs, COLUMNS)
        with torch.autocast("cpu", torch.bfloat16):
            some = logits_at(model, head_of(model), inputs, COLUMNS)
    assert some.dtype == torch.float32 and not torch.equal(some, some.bfloat16().float())
    torch.testing.assert_close(some, whole, atol=0.1, rtol=0.05)


def test_under_autocast_it_stays_in_float32_for_somebody_who_gets_all_logits() -> None:
    model = FAMILIES["llama"]()
    seen: list[torch.dtype] = []
    handle = model.register_forward_hook(lambda *given: seen.append(given[2].logits.dtype))  # as Self-Debias has one
    assert head_of(model) is None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        some = logits_at(model, None, {"input_ids": IDS}, COLUMNS)
        model(input_ids=IDS)
    handle.remove()
    assert seen == [torch.float32, torch.bfloat16] and some.dtype == torch.float32
    assert "forward" not in vars(model.get_output_embeddings())


class Doubles:
    """Whoever wraps a model."""

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        return None


def test_whoever_gets_the_logits_gets_all_of_them() -> None:
    model = FAMILIES["llama"]()
    assert head_of(model) is model.lm_head
    for module in (model, model.lm_head):
        handle = module.register_forward_hook(Doubles())
        assert head_of(model) is None
        handle.remove()
    handle = model.model.layers[0].register_forward_hook(Doubles())
    assert head_of(model) is model.lm_head  # it does not see the logits
    handle.remove()
    with steer.Plan(steer.Intervention(steer.Add(torch.ones(WIDTH)), "layers.1.output")).attached(model):
        assert head_of(model) is model.lm_head
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert head_of(model) is None
    del model.forward
    model.model.layers[0].compile()
    assert head_of(model) is None


def test_scores_of_next_tokens_do_without_the_other_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    rows = [Row((5, 9, 7, 3), 4), Row((6, 8), 2), Row((4, 4, 9), 3)]
    whole = torch.stack([model(input_ids=torch.tensor([row.ids])).logits[0, -1] for row in rows]).detach()
    found = torch.zeros(3, VOCAB)
    with torch.no_grad(), tokens_of(model.lm_head, monkeypatch) as seen:
        for chosen, logits in Scorer(model, words_tokenizer(), progress=False)._last_logits(rows, "rows"):
            found[chosen] = logits
    assert sum(seen) == 3
    torch.testing.assert_close(found, whole)
