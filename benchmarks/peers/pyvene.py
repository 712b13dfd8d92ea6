"""pyvene: `CollectIntervention` at the last token, and an intervention that adds a constant.

`intervene_on_prompt=True` makes it steer the prompt too, as the other arms do; by default it steers decoded tokens only.
"""

from __future__ import annotations

from contextlib import contextmanager

import pyvene as pv
import torch

DISTRIBUTIONS = ("pyvene",)


class AddVector(pv.ConstantSourceIntervention):
    """Adds a constant; pyvene's own `AdditionIntervention` takes a source per call."""

    def __init__(self, vector, **kwargs):
        super().__init__(**kwargs, keep_last_dim=True)
        self.register_buffer("vector", vector)

    def forward(self, base, source=None, subspaces=None, **kwargs):
        return base + self.vector


class Arm:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def extract(self, pairs, layers, batch):
        texts = [text for pair in pairs for text in pair]
        collecting = [{"layer": layer, "component": "block_output", "intervention_type": pv.CollectIntervention} for layer in layers]
        wrapped = pv.IntervenableModel(pv.IntervenableConfig(collecting), model=self.model)
        by_layer = {layer: [] for layer in layers}
        for start in range(0, len(texts), batch):
            inputs = self.tokenizer(texts[start : start + batch], return_tensors="pt", padding=True)
            last = [[[int(end)] for end in inputs["attention_mask"].sum(1) - 1]] * len(layers)
            (_, collected), _ = wrapped(inputs, unit_locations={"sources->base": (None, last)})
            for layer, h in zip(layers, collected, strict=True):
                by_layer[layer].append(h[:, 0])
        return {layer: (h[::2] - h[1::2]).mean(0) for layer, h in ((layer, torch.cat(batches)) for layer, batches in by_layer.items())}

    @contextmanager
    def steered(self, vectors):
        adding = [{"layer": layer, "component": "block_output", "intervention": AddVector(v)} for layer, v in vectors.items()]
        self.wrapped = pv.IntervenableModel(adding, model=self.model)
        yield

    def forward(self, ids):
        return self.wrapped({"input_ids": ids}, unit_locations=None, use_cache=True)[1].logits

    def generate(self, ids, new):
        base = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return self.wrapped.generate(base, unit_locations=None, intervene_on_prompt=True, max_new_tokens=new, do_sample=False)[1]
