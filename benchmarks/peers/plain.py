"""The plain model, without a hook: never steered; its vectors come from transformers' own `output_hidden_states`.

The last entry of those has been through the final norm, so the vector of the last layer is not that layer's output.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

DISTRIBUTIONS = ()


class Arm:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def extract(self, pairs, layers, batch):
        texts = [text for pair in pairs for text in pair]
        by_layer = {layer: [] for layer in layers}
        for start in range(0, len(texts), batch):
            inputs = self.tokenizer(texts[start : start + batch], return_tensors="pt", padding=True)
            last = inputs["attention_mask"].sum(1) - 1
            states = self.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
            for layer in layers:
                by_layer[layer].append(states[layer + 1][torch.arange(len(last)), last])
        return {layer: (h[::2] - h[1::2]).mean(0) for layer, h in ((layer, torch.cat(batches)) for layer, batches in by_layer.items())}

    def steered(self, vectors):
        return nullcontext()

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=True).logits

    def generate(self, ids, new):
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
