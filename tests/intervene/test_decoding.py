"""Edits of a decoded token are prepared together when its pass opens, and equal what each edit does by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand import ids, padded, vector
from torch import Tensor
from transformers import DynamicCache

from steer.intervene import Ablate, Add, HeadShift, Intervention, Plan
from steer.intervene.attachment import Attachment
from steer.model.watcher import watcher_of

LATER = "generated"


def plan() -> Plan:
    heads = torch.stack([vector(8, seed=7), vector(8, seed=8)])
    return Plan(
        [
            Intervention(Add(vector(seed=0)), "layers.0.output", LATER, strength=0.5),
            Intervention(Add(vector(seed=1)), "layers.1.output", LATER, strength=2.0),
            Intervention(Add(vector(seed=2)), "layers.1.output", LATER),
            Intervention(Ablate(vector(seed=3)), "layers.1.output", LATER),
            Intervention(HeadShift(heads, [0, 3], 4), "layers.2.attn.z", LATER),
            Intervention(Add(vector(seed=4)), "layers.2.output", LATER, preserve_norm=True),
            Intervention(Add(vector(seed=5)), "layers.0.input", "generated~2"),
            Intervention(Add(vector(seed=6)), "layers.2.input", "generated~2"),
        ]
    )


def step(model, cache: DynamicCache, batch: dict[str, Tensor], token: int, grad: bool) -> Tensor:
    """Logits of one more token after a left-padded prompt."""
    rows = batch["input_ids"].shape[0]
    with torch.set_grad_enabled(grad):
        if not cache.get_seq_length():
            model(batch["input_ids"], attention_mask=batch["attention_mask"], past_key_values=cache, use_cache=True)
        seen = cache.get_seq_length() + 1 - batch["input_ids"].shape[1]
        mask = torch.cat([batch["attention_mask"], torch.ones(rows, seen, dtype=torch.long)], 1)
        return model(torch.full((rows, 1), token), attention_mask=mask, past_key_values=cache, use_cache=True).logits.detach()


def ordinary(model, attachment: Attachment) -> None:
    """Removes prepared edits: from now on each edit is computed at its site."""
    for active in attachment.interventions:
        active.prepared = None
    for hook in watcher_of(model).site_hooks:
        hook.prepared = None


def live(attachment: Attachment) -> int:
    """Number of prepared edits that hold for the running pass."""
    return sum(active.prepared is not None and active.prepared.group.live is not None for active in attachment.interventions)


def talk(
    model,
    steered: Plan,
    batch: dict[str, Tensor],
    *,
    prepared: bool = True,
    grad: bool = False,
    rows: list[int] | None = None,
    between: Callable[[Attachment], Any] = lambda _: None,
) -> tuple[list[Tensor], int]:
    """Returns the logits of three tokens and the number of edits prepared for the last one; none are prepared with gradients."""
    cache, logits, known = DynamicCache(config=model.config), [], []
    with steered.attached(model) as attachment:
        if rows is not None:
            attachment.set_rows(rows)
        if not prepared:
            ordinary(model, attachment)
        handle = model.model.norm.register_forward_hook(lambda *_: known.append(live(attachment)))
        try:
            for token in (5, 6, 7):
                logits.append(step(model, cache, batch, token, grad))
                between(attachment)
        finally:
            handle.remove()
        assert live(attachment) == 0  # they end with their pass
    return logits, known[-1]


@pytest.mark.parametrize("batch", [{"input_ids": ids(1, 4), "attention_mask": torch.ones(1, 4, dtype=torch.long)}, padded("left")])
def test_prepared_edits_are_what_each_would_have_made(batch, tiny):
    model = tiny("llama").eval()
    together, known = talk(model, plan(), batch)
    for alone, none in (talk(model, plan(), batch, prepared=False), talk(model, plan(), batch, grad=True)):
        assert known == 8 and none == 0  # nothing where gradients are recorded
        for first, second in zip(together, alone, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    plain = step(model, DynamicCache(config=model.config), batch, 5, False)
    assert (together[0] - plain).abs().max() > 0.1


def test_nothing_is_remembered_from_one_token_to_the_next(tiny):
    """Strengths, switches and vectors that change between two tokens hold from the next token on, however they were changed."""
    model, batch = tiny("llama").eval(), padded("left")
    variants = []
    for options in ({}, {"prepared": False}, {"grad": True}):
        steered = plan()
        steered.interventions[2].operator.train()

        def change(attachment: Attachment) -> None:
            first, second, third, fourth = attachment.interventions[:4]
            attachment.set_strength([-2 * base for base in first.base], first.name)
            attachment.enable(not second.enabled, second.name)
            third.operator.tensors["vector"].data.mul_(-1)  # which leaves no trace in the tensor's version
            for tensor in fourth.operator.tensors.values():
                tensor.copy_(tensor.roll(1, -1))

        variants.append(talk(model, steered, batch, between=change, **options)[0])
    unchanged, _ = talk(model, plan(), batch)
    for first, *rest in zip(*variants, strict=True):
        for second in rest:
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert torch.equal(variants[0][0], unchanged[0])
    assert all((logits - plain).abs().max() > 1e-2 for logits, plain in zip(variants[0][1:], unchanged[1:], strict=True))


def test_rows_may_change_between_tokens(tiny):
    model, batch = tiny("llama").eval(), padded("left")
    vectors = torch.stack([vector(seed=n) for n in range(3)])

    def slotted() -> Plan:
        strengths = [0.5, -1.0, 2.0]
        return Plan(
            [
                Intervention(kind(vectors if kind is Add else vectors.unsqueeze(1)), f"layers.{n}.output", LATER, strengths)
                for n, kind in enumerate((Add, Ablate))
            ]
        )

    def change(attachment: Attachment) -> None:
        attachment.set_rows((attachment.interventions[0].rows + 1) % 3)

    together, known = talk(model, slotted(), batch, rows=[0, 1, 2], between=change)
    alone, none = talk(model, slotted(), batch, rows=[0, 1, 2], between=change, prepared=False)
    assert (known, none) == (2, 0)
    for first, second in zip(together, alone, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    unchanged, _ = talk(model, slotted(), batch, rows=[0, 1, 2])
    assert torch.equal(together[0], unchanged[0])
    assert all((logits - plain).abs().max() > 1e-2 for logits, plain in zip(together[1:], unchanged[1:], strict=True))


def test_stacked_plans_with_the_same_names_add_their_own(tiny):
    model, batch = tiny("llama").eval(), padded("left")
    plans = [Plan([Intervention(Add(k * vector(seed=n)), f"layers.{n}.output") for n in (0, 1)]) for k in (1, 3)]
    merged = Plan([Intervention(Add(4 * vector(seed=n)), f"layers.{n}.output") for n in (0, 1)])
    known = []
    with plans[0].attached(model) as single, plans[1].attached(model, stack=True) as stacked:
        handle = model.model.norm.register_forward_hook(lambda *_: known.append(live(single) + live(stacked)))
        logits = step(model, DynamicCache(config=model.config), batch, 5, False)
        handle.remove()
        assert known[-1] == 4
    with merged.attached(model):
        torch.testing.assert_close(step(model, DynamicCache(config=model.config), batch, 5, False), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_as_a_single_intervention_does(dtype, tiny):
    model, batch = tiny("llama").to(dtype).eval(), padded("left")
    both = Plan([Intervention(Add(vector(seed=n)), f"layers.{n}.output", strength=0.3) for n in (0, 1)])
    together, known = talk(model, both, batch)
    for alone, none in (talk(model, both, batch, prepared=False), talk(model, both, batch, grad=True)):
        assert (known, none) == (2, 0) and all(torch.equal(first, second) for first, second in zip(together, alone, strict=True))
