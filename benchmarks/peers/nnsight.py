"""nnsight: a trace that reads the layers and stops, and traces that add to them, at every step of generation."""

from __future__ import annotations

from contextlib import contextmanager

import nnsight
import torch

DISTRIBUTIONS = ("nnsight",)


class Arm:
    def __init__(self, model, tokenizer):
        self.wrapped = nnsight.TransformersModel(model, tokenizer=tokenizer, task="text-generation")

    def extract(self, pairs, layers, batch):
        texts = [text for pair in pairs for text in pair]
        blocks = self.wrapped.model.layers
        by_layer = {layer: [] for layer in layers}
        for start in range(0, len(texts), batch):
            with self.wrapped.trace(texts[start : start + batch]) as tracer:  # pads on the left
                read = nnsight.save([])
                for layer in layers:
                    read.append(blocks[layer].output[:, -1])
                tracer.stop()
            for layer, h in zip(layers, read, strict=True):
                by_layer[layer].append(h)
        return {layer: (h[::2] - h[1::2]).mean(0) for layer, h in ((layer, torch.cat(batches)) for layer, batches in by_layer.items())}

    @contextmanager
    def steered(self, vectors):
        self.vectors = vectors
        yield

    def forward(self, ids):
        blocks, vectors = self.wrapped.model.layers, self.vectors
        with self.wrapped.trace(ids, use_cache=True):
            for layer, v in vectors.items():
                blocks[layer].output = blocks[layer].output + v
            logits = self.wrapped.output.logits.save()
        return logits

    def generate(self, ids, new):
        blocks, vectors = self.wrapped.model.layers, self.vectors
        with self.wrapped.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False) as tracer:
            for _ in tracer.iter[:new]:
                for layer, v in vectors.items():
                    blocks[layer].output = blocks[layer].output + v
            generated = tracer.result.save()
        return generated
