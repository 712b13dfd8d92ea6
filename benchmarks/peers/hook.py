"""Forward hooks by hand: what a user writes who uses no library. Extraction runs the whole forward pass."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch

DISTRIBUTIONS = ()


class Arm:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @contextmanager
    def hooks(self, functions):
        with ExitStack() as stack:
            for layer, hook in functions.items():
                stack.callback(self.model.model.layers[layer].register_forward_hook(hook).remove)
            yield

    def extract(self, pairs, layers, batch):
        texts = [text for pair in pairs for text in pair]
        by_layer = {layer: [] for layer in layers}

        def keep(layer):
            return lambda module, args, output: by_layer[layer].append(output[torch.arange(len(last)), last])

        with self.hooks({layer: keep(layer) for layer in layers}):
            for start in range(0, len(texts), batch):
                inputs = self.tokenizer(texts[start : start + batch], return_tensors="pt", padding=True)
                last = inputs["attention_mask"].sum(1) - 1
                self.model(**inputs, use_cache=False)
        return {layer: (h[::2] - h[1::2]).mean(0) for layer, h in ((layer, torch.cat(batches)) for layer, batches in by_layer.items())}

    def steered(self, vectors):
        return self.hooks({layer: lambda module, args, output, v=v: output + v for layer, v in vectors.items()})

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=True).logits

    def generate(self, ids, new):
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
