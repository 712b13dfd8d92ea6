"""Response masks of batches, and the passes that they are filled into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callback_helpers import SITE, make_plan
from families import FAMILIES
from torch import Tensor

from steer.errors import ContextError
from steer.training.batches import BatchResponseMask, response_mask

MASK = torch.tensor([[False, True, True], [False, False, True]])
IDS = torch.tensor([[11, 12, 13, 14], [15, 16, 17, 18]])


@pytest.mark.parametrize(
    ("batch", "mask"),
    [
        ({"labels": torch.where(MASK, 5, -100)}, MASK),
        ({"labels": torch.where(MASK, 5, -100), "completion_mask": torch.ones(2, 3)}, MASK),
        ({"completion_mask": MASK.long()}, MASK),
        ({"completion_mask": torch.ones(2, 3), "tool_mask": MASK.long()}, MASK),
        ({"assistant_masks": MASK.long(), "tool_mask": torch.zeros(2, 3)}, MASK),
        ({"labels": torch.tensor([0, 1]), "completion_mask": MASK}, MASK),  # a class for each row says nothing of tokens
        ({"labels": torch.rand(2, 3)}, None),
        ({"input_ids": IDS}, None),
        ([IDS, MASK], None),
        (None, None),
    ],
)
def test_the_mask_of_a_batch(batch: Any, mask: Tensor | None) -> None:
    read = response_mask(batch)
    assert read is mask is None or read is not None and mask is not None and read.dtype is torch.bool and torch.equal(read, mask)


def test_the_mask_reaches_passes_that_carry_no_labels() -> None:
    model, mask = FAMILIES["llama"](), BatchResponseMask()
    with make_plan().attached(model) as attachment:
        mask.install(model)
        mask.read({"completion_mask": MASK})  # of the last 3 of 4 tokens, as GRPO's
        model(input_ids=IDS, use_cache=False)
        assert attachment.fired() == {f"add@{SITE}": 3}
        model(input_ids=IDS, labels=IDS, use_cache=False)  # labels take precedence
        assert attachment.fired() == {f"add@{SITE}": 3 + 8}
        for rows in (IDS[:1], torch.cat([IDS, IDS])):  # other rows than those of the batch
            with pytest.raises(ContextError, match="cannot tell prompt from response"):
                model(input_ids=rows, use_cache=False)
        mask.clear()
        with pytest.raises(ContextError, match="cannot tell prompt from response"):
            model(input_ids=IDS, use_cache=False)
        mask.read({"completion_mask": MASK})
        mask.remove()
        with pytest.raises(ContextError, match="cannot tell prompt from response"):
            model(input_ids=IDS, use_cache=False)
