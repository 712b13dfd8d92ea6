"""pyreft: a LoReFT of rank 4 with random weights at every token of one block's output, saved as pyreft saves it."""

from __future__ import annotations

from contextlib import contextmanager

import pyreft
import torch

DISTRIBUTIONS = ("pyreft", "pyvene")
RANK = 4


class Arm:
    def __init__(self, model, tokenizer):
        self.model = model

    @contextmanager
    def applied(self, setting):
        torch.manual_seed(0)
        sizes = {"embed_dim": self.model.config.hidden_size, "low_rank_dimension": RANK}
        intervention = pyreft.LoreftIntervention(**sizes, dtype=torch.float32)  # bfloat16 unless told
        place = {"layer": setting["layer"], "component": "block_output", "low_rank_dimension": RANK, "intervention": intervention}
        self.reft = pyreft.get_reft_model(self.model, pyreft.ReftConfig(representations=place), set_device=False)
        self.reft.save(setting["folder"])
        yield

    def forward(self, ids):
        everywhere = [[list(range(ids.shape[1]))] * len(ids)]
        return self.reft({"input_ids": ids}, unit_locations={"sources->base": (None, everywhere)}, use_cache=False)[1].logits
