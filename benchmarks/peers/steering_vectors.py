"""steering-vectors: `train_steering_vector` (mean difference, whole forward passes) and `SteeringVector.apply`."""

from __future__ import annotations

import steering_vectors as sv
import torch

DISTRIBUTIONS = ("steering-vectors",)


class Arm:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def extract(self, pairs, layers, batch):
        samples = [tuple(pair) for pair in pairs]  # the positive and the negative texts of a batch go through the model apart
        trained = sv.train_steering_vector(self.model, self.tokenizer, samples, layers=layers, batch_size=batch, read_token_index=-1)
        return trained.layer_activations

    def steered(self, vectors):
        return sv.SteeringVector(layer_activations=vectors).apply(self.model)

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=True).logits

    def generate(self, ids, new):
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
