"""steer: one streaming capture that stops after the last layer asked for, and one plan of additions.

`steer.extract` makes the same capture, of a part of the texts, and a second one of the texts held out; here all of them are read, as in the
other arms.
"""

from __future__ import annotations

import torch

from steer.directions.extractor import EXTRACTORS
from steer.directions.moments import ContrastMoments
from steer.intervene import Add, Intervention, Plan
from steer.model.capture import capture
from steer.model.site import Site
from steer.model.tokens import plain

DISTRIBUTIONS = ("torchsteer",)


class Arm:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def extract(self, pairs, layers, batch, method="mean_difference"):
        rows = [plain(self.tokenizer, text) for pair in pairs for text in pair]
        sides = torch.tensor([True, False] * len(pairs))
        extractor = EXTRACTORS.get(method)
        moments = {Site.parse(f"layers.{layer}.output"): ContrastMoments(sides, paired=True, needs=extractor.needs) for layer in layers}
        capture(self.model, rows, dict(moments), span="last", group=2, max_tokens=batch * max(len(row.ids) for row in rows))
        return {layer: extractor.direction(layer_moments) for layer, layer_moments in zip(layers, moments.values(), strict=True)}

    def steered(self, vectors):
        return Plan([Intervention(Add(v), f"layers.{layer}.output") for layer, v in vectors.items()]).attached(self.model)

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=True).logits

    def generate(self, ids, new):
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
