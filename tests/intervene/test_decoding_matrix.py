"""Prepared edits of every operator, with gates, row slots and a kept norm, on caches that are cropped, reordered and copied."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hand import ids, padded, vector
from intervene.operator_cases import CASES
from intervene.test_decoding import ordinary
from torch import Tensor
from transformers import DynamicCache

from steer.intervene import CosineGate, Intervention, Plan, ProbeGate

GATES = {
    "no gate": None,
    "hard": ProbeGate(vector(seed=20), 0.2),
    "soft": ProbeGate(vector(seed=20), 0.2, sharpness=0.7) | CosineGate(vector(seed=21), 0.1, sharpness=5.0),
    "row": ProbeGate(vector(seed=20), 0.2, sharpness=0.7, per="row"),
}


def decoded(model, plan: Plan, rows: list[int] | None, *, prepared: bool) -> list[Tensor]:
    """Logits [3, 1, vocabulary] of tokens decoded on a cache that loses a token, changes its rows and is copied on the way."""
    batch = padded("left")
    cache = DynamicCache(config=model.config)
    mask = batch["attention_mask"]
    logits = []
    with torch.no_grad(), plan.attached(model) as attachment:
        if rows is not None:
            attachment.set_rows(rows)
        if not prepared:
            ordinary(model, attachment)

        def decode(seed: int, cache: DynamicCache, mask: Tensor) -> Tensor:
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            logits.append(model(ids(3, 1, seed), attention_mask=mask, past_key_values=cache, use_cache=True).logits)
            return mask

        model(batch["input_ids"], attention_mask=mask, past_key_values=cache, use_cache=True)
        mask = decode(1, cache, mask)
        mask = decode(2, cache, mask)
        cache.crop(-1)
        mask = decode(7, cache, mask[:, :-1])
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        mask = decode(3, cache, mask[order])
        copied = copy.deepcopy(cache)
        decode(4, cache, mask)
        decode(5, copied, mask)
        attachment.enable(False)
        decode(6, copy.deepcopy(copied), torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1))
    return logits


@pytest.mark.parametrize("name", CASES)
def test_every_operator_prepared_as_it_edits_by_itself(name, tiny):
    model = tiny("llama").eval()
    site = "layers.1.attn.z" if name == "head_shift" else "layers.1.output"
    for gate, norm, slots, scope in itertools.product(GATES, (False, True), (False, True), ("generated", "all", "generated[1:4]")):
        operator = CASES[name].make(seeds=(0, 1, 2) if slots else (0,))
        strength = [0.5, -1.0, 0.0] if slots and operator.linear_in_strength else [0.5, 0.7, 0.0] if slots else 0.5
        plan = Plan(Intervention(operator, site, scope, strength, gate=GATES[gate], preserve_norm=norm))
        rows = [1, 0, 2] if slots else None
        together = decoded(model, plan, rows, prepared=True)
        alone = decoded(model, plan, rows, prepared=False)
        for first, second in zip(together, alone, strict=True):
            assert torch.allclose(first, second, rtol=1e-5, atol=2e-5), (gate, norm, slots, scope, (first - second).abs().max())
