"""repeng: `ControlVector.train` and `ControlModel`.

It has no mean difference. `pca_center` is its method nearest to one; what it gives has length 1.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from repeng import ControlModel, ControlVector, DatasetEntry

DISTRIBUTIONS = ("repeng",)


class Arm:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def extract(self, pairs, layers, batch):
        entries = [DatasetEntry(positive=positive, negative=negative) for positive, negative in pairs]
        trained = ControlVector.train(self.model, self.tokenizer, entries, hidden_layers=layers, batch_size=batch, method="pca_center")
        return {layer: torch.from_numpy(direction) for layer, direction in trained.directions.items()}

    @contextmanager
    def steered(self, vectors):
        with self.controlled_by(ControlVector("llama", {layer: v.numpy() for layer, v in vectors.items()})):
            yield

    def applied(self, setting):
        return self.controlled_by(ControlVector.import_gguf(setting["control_vector"]))

    @contextmanager
    def controlled_by(self, vector):
        self.controlled = ControlModel(self.model, list(vector.directions))
        self.controlled.set_control(vector)
        try:
            yield
        finally:
            self.controlled.unwrap()

    def forward(self, ids):
        return self.controlled(input_ids=ids, use_cache=True).logits

    def generate(self, ids, new):
        return self.controlled.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
