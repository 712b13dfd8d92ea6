"""TransformerLens: `run_with_cache` that stops after the last layer asked for, and `hooks` around the bridge."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge

DISTRIBUTIONS = ("transformer-lens",)


class Arm:
    def __init__(self, model, tokenizer):
        self.bridge = TransformerBridge.boot_transformers(model.config._name_or_path, hf_model=model, tokenizer=tokenizer)

    def extract(self, pairs, layers, batch):
        texts = [text for pair in pairs for text in pair]
        names = {layer: f"blocks.{layer}.hook_out" for layer in layers}
        by_layer = {layer: [] for layer in layers}
        for start in range(0, len(texts), batch):
            ids = self.bridge.to_tokens(texts[start : start + batch], prepend_bos=False, padding_side="left")
            _, cache = self.bridge.run_with_cache(ids, names_filter=list(names.values()), stop_at_layer=max(layers) + 1)
            for layer, name in names.items():
                by_layer[layer].append(cache[name][:, -1])
        return {layer: (h[::2] - h[1::2]).mean(0) for layer, h in ((layer, torch.cat(batches)) for layer, batches in by_layer.items())}

    def steered(self, vectors):
        return self.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_out", lambda h, hook, v=v: h + v) for layer, v in vectors.items()])

    def forward(self, ids):
        return self.bridge(ids, return_type="logits")

    def generate(self, ids, new):
        return self.bridge.generate(ids, max_new_tokens=new, stop_at_eos=False, do_sample=False, return_type="tokens", verbose=False)
