"""Tied embeddings: the unembedding (head) of a model is the very weight of its token embedding, and how to give it a copy of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from steer.model.anatomy import Anatomy

SETTING = "tie_word_embeddings"  # transformers' name


def untie(model: nn.Module) -> bool:
    """Gives the head a copy of the embedding, so that each can change without the other. Logits stay the same to the bit.

    The configuration says so too. A model that is loaded with `tie_word_embeddings=False` instead gets a random head, since its file
    holds no weight for one.

    Returns:
        Whether they were tied.
    """
    anatomy = Anatomy.find(model)
    head = tied_head(anatomy)
    if head is not None:
        give_own_weight(head)
    for config in tying_configs(anatomy):
        setattr(config, SETTING, False)
    return head is not None


def tied_head(anatomy: Anatomy) -> nn.Module | None:
    """The head when its weight is that of the embedding."""
    head, embedding = anatomy.unembedding, anatomy.embedding
    if head is None or head is embedding or getattr(head, "weight", None) is not getattr(embedding, "weight", None):
        return None
    return head


def give_own_weight(head: nn.Module) -> None:
    """Puts a copy in the place of a head's weight."""
    shared: Any = head.weight
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)


def tying_configs(anatomy: Anatomy) -> list[Any]:
    """The configurations of the modules around the decoder, and their text parts, that say that the embeddings are tied."""
    configs: dict[int, Any] = {}
    for module in anatomy.chain:
        config = getattr(module, "config", None)
        for part in (config, getattr(config, "get_text_config", lambda: None)()):
            if getattr(part, SETTING, None) is True:
                configs[id(part)] = part
    return list(configs.values())
