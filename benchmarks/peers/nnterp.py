"""nnterp: `collect_token_activations_batched`, which stops the forward pass, and `StandardizedTransformer.steer`."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from nnterp import StandardizedTransformer
from nnterp.nnsight_utils import collect_token_activations_batched

DISTRIBUTIONS = ("nnterp", "nnsight")


class Arm:
    def __init__(self, model, tokenizer):
        self.wrapped = StandardizedTransformer(model, tokenizer=tokenizer)
        self.wrapped.tokenizer.padding_side = "left"

    def extract(self, pairs, layers, batch):
        texts = [text for pair in pairs for text in pair]
        h = collect_token_activations_batched(self.wrapped, texts, batch, layers=layers)
        return dict(zip(layers, (h[:, ::2] - h[:, 1::2]).mean(1), strict=True))

    @contextmanager
    def steered(self, vectors):
        self.vectors = vectors
        yield

    def forward(self, ids):
        wrapped, vectors = self.wrapped, self.vectors
        with wrapped.trace(ids, use_cache=True):
            for layer, v in vectors.items():
                wrapped.steer(layers=layer, steering_vector=v)
            logits = wrapped.logits.save()
        return logits

    def generate(self, ids, new):
        wrapped, vectors = self.wrapped, self.vectors
        with wrapped.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False) as tracer:
            with tracer.iter[:new]:
                for layer, v in vectors.items():
                    wrapped.steer(layers=layer, steering_vector=v)
            generated = wrapped.generator.output.save()
        return generated
