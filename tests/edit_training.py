"""What the tests of edits in training share: an edit of a tiny Llama that makes a target likely, solved by hand, and readings of it."""

from __future__ import annotations

from typing import Any

import torch
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn

from steer.edits.contexts import Contexts
from steer.edits.edit import Edit, WeightDelta
from steer.edits.fact import Fact
from steer.edits.keys import fact_keys
from steer.edits.make_edit import make_edit

FACTS = (Fact.of("where is the {}", "dog", "house"), Fact.of("i like the {}", "moon", "water"))
CONTEXTS = Contexts(("the sun is warm", "you and i"))
TOKENIZER = tiny_tokenizer()
PATH = "model.layers.1.mlp.down_proj"


def tiny_model(**sizes: int) -> nn.Module:
    return FAMILIES["llama"](**sizes)


def solved_edit(model: nn.Module, name: str = "home", layer: int = 1, size: float = 20.0, facts: tuple[Fact, ...] = FACTS) -> Edit:
    """dW k = size * what makes the logit of the target largest, for the keys k of the facts, whose subjects end their prompts."""
    keys = fact_keys(model, TOKENIZER, facts, CONTEXTS, [layer])[layer].combined.double()  # [n, f]
    rows = torch.cat([model.get_output_embeddings().weight[TOKENIZER(fact.target).input_ids[0]][None] for fact in facts])  # type: ignore[operator]
    gain: Any = model.model.norm.weight  # type: ignore[union-attr]
    wanted = size * torch.nn.functional.normalize((rows * gain).detach().double(), dim=1)  # [n, d]
    u = wanted.mT @ torch.linalg.inv(keys @ keys.mT)
    delta = WeightDelta(PATH.replace("1", str(layer)), layer, u, keys.mT, keys)
    return make_edit(
        model, facts, [delta], editor="by hand", name=name, settings={"weighting": "plain_half"}, contexts=CONTEXTS.to_json(), of=[0, 1]
    )


def weight(model: nn.Module, path: str = PATH) -> Tensor:
    """Of the map itself, also inside PEFT's layers."""
    named: dict[str, Any] = dict(model.named_modules())
    module = next(module for name, module in named.items() if name.endswith(path))
    return getattr(module, "base_layer", module).weight
