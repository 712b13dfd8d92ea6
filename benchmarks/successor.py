"""Vector arithmetic on what comes after what: mod-10 features at the output of MLP 0 (Gould et al. 2023, arXiv 2312.09230).

The third month, the third day and the number three share a feature in the paper's models: the mean of what MLP 0 gives for tokens whose
index ends in that digit. Adding feature j and taking away feature i on the token of item i should then make the model name the successor
of item j. Features are read off the other kinds of item only, so what is tested is that they are shared. Beside it stand the exact
difference of the two tokens' own outputs, which is as far as an edit at this place can go, and a random vector of the same length.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import steer
from steer.directions.sweep import Predictions, sweep
from steer.intervene import Add, Intervention, Plan
from steer.model.accumulator import pool
from steer.model.tokens import Row

SITE = "layers.0.mlp.output"
ITEMS = {
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "month": "January February March April May June July August September October November December".split(),
    "number": "one two three four five six seven eight nine ten eleven twelve".split(),
}
PROMPTS = {
    "day": "If today is{}, then tomorrow is",
    "month": "If this month is{}, then next month is",
    "number": "A: three B: four\nA: eight B: nine\nA:{} B:",
}
SCALES = (1.0, 2.0)


class _Pooled:
    """Accumulator: the activation on the span of each text, [texts, width]."""

    def __init__(self, texts: int) -> None:
        self.values: Tensor = torch.empty(0)
        self.texts = texts

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        if not len(self.values):
            self.values = torch.zeros(self.texts, h.shape[-1])
        self.values[rows] = pool(h, weight).cpu()


def successor_row(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Share of edits after which the successor of the other item is the likeliest item."""
    started = time.perf_counter()
    tokens = {kind: [tokenizer(f" {item}", add_special_tokens=False).input_ids for item in items] for kind, items in ITEMS.items()}
    ids = {kind: [ids[0] for ids in of_kind if len(ids) == 1] for kind, of_kind in tokens.items()}
    outputs = {kind: _outputs(model, tokenizer, kind, ids[kind]) for kind in ids}
    kinds: dict[str, Any] = {}
    for kind in ids:
        features = _features({source: outputs[source] for source in ids if source != kind})
        kinds[kind] = _edits(model, tokenizer, kind, ids[kind], outputs[kind], features, cyclic=kind != "number")
    return {"concept": "successor", "site": SITE, "kinds": kinds, "seconds": time.perf_counter() - started}


def _prompt(tokenizer: Any, kind: str, item: int) -> tuple[Row, int]:
    """The question about an item, and the place of the item's token in it."""
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in PROMPTS[kind].split("{}"))
    return Row((*before, item, *after), len(before) + 1), len(before)


def _outputs(model: Any, tokenizer: Any, kind: str, items: list[int]) -> Tensor:
    """Outputs of MLP 0 on the item's token in the prompt, [items, width]."""
    pooled = _Pooled(len(items))
    rows, places = zip(*(_prompt(tokenizer, kind, item) for item in items), strict=True)
    steer.capture(model, rows, {steer.Site.parse(SITE): pooled}, span=places[0])
    return pooled.values


def _features(outputs: dict[str, Tensor]) -> Tensor:
    """[10, width]: mean output of the items whose index, from 1, ends in each digit, about the mean of their kind; kinds count alike."""
    sums, counts = torch.zeros(10, next(iter(outputs.values())).shape[1]), torch.zeros(10)
    for values in outputs.values():
        for index, value in enumerate(values - values.mean(0), 1):
            sums[index % 10] += value
            counts[index % 10] += 1
    return sums / counts.clamp_min(1)[:, None]


def _edits(model: Any, tokenizer: Any, kind: str, items: list[int], outputs: Tensor, features: Tensor, *, cyclic: bool) -> dict[str, Any]:
    n = len(items)
    last = n if cyclic else n - 1
    pairs = [(i, j) for i in range(last) for j in range(last) if i != j and (i + 1) % 10 != (j + 1) % 10]
    generator = torch.Generator().manual_seed(0)
    shared = torch.stack([features[(j + 1) % 10] - features[(i + 1) % 10] for i, j in pairs])
    exact = torch.stack([outputs[j] - outputs[i] for i, j in pairs])
    noise = torch.randn(shared.shape, generator=generator)
    noise *= shared.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    tried = {"unedited": torch.zeros_like(shared)}
    for label, vectors in (("shared", shared), ("exact", exact), ("random", noise)):
        tried |= {f"{label} x{scale:g}": vectors * scale for scale in SCALES}
    named = _named(model, tokenizer, kind, items, [i for i, _ in pairs], torch.stack(list(tried.values()), dim=1))
    expected = torch.tensor([(j + 1) % n for _, j in pairs])
    own = torch.tensor([(i + 1) % n for i, _ in pairs])
    return {
        "items": n,
        "edits": len(pairs),
        "cosine": float(torch.cosine_similarity(shared, exact, dim=-1).mean()),
        "successor_unedited": float((named[:, 0] == own).double().mean()),
        "successor_of_the_other": {name: float((named[:, k] == expected).double().mean()) for k, name in enumerate(tried)},
    }


def _named(model: Any, tokenizer: Any, kind: str, items: list[int], of: list[int], vectors: Tensor) -> Tensor:
    """[edits, settings] index of the likeliest item after each edited prompt. of: the item edited; vectors: [edits, settings, width]."""
    named = torch.zeros(vectors.shape[:2], dtype=torch.long)
    for item in sorted(set(of)):
        edits = [k for k, edited in enumerate(of) if edited == item]
        flat = vectors[edits].flatten(0, 1)
        row, place = _prompt(tokenizer, kind, items[item])
        plan = Plan(Intervention(Add(flat), SITE, scope=f"positions[{place}]"))

        def read(predictions: Predictions, edits: list[int] = edits) -> None:
            named[edits] = predictions.logits[:, 0, items].argmax(-1).view(len(edits), -1).cpu()

        sweep(model, plan, [row], len(flat), read, predict="last")
    return named
