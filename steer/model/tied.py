"""Tied embeddings: the unembedding (head) of a model is the very weight of its token embedding, and how to give it a copy of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from steer.errors import AnatomyError
from steer.model.anatomy import Anatomy

SETTING = "tie_word_embeddings"  # transformers' name


def untie(model: nn.Module) -> bool:
    """Gives the head a copy of the embedding, so that each can change without the other. Logits stay the same to the bit.

    The configuration says so too. A model that is loaded with `tie_word_embeddings=False` instead gets a random head, since its file
    holds no weight for one.

    Returns:
        Whether they were tied.

    Raises:
        AnatomyError: other modules have the same weight, too (the encoder of T5 and BART), and would have to be untied with them.
    """
    anatomy = Anatomy.find(model)
    head = tied_head(anatomy)
    if head is not None:
        _check_shared_by_two(model, head)
        give_own_weight(head)
    for config in tying_configs(anatomy):
        setattr(config, SETTING, False)
    return head is not None


def tied_head(anatomy: Anatomy) -> nn.Module | None:
    """The head, below what PEFT has put around it, when its weight is that of the embedding."""
    if anatomy.unembedding is None or anatomy.unembedding is anatomy.embedding:
        return None
    head, embedding = _without_adapters(anatomy.unembedding), _without_adapters(anatomy.embedding)
    if getattr(head, "weight", None) is not getattr(embedding, "weight", None):
        return None
    return head


def _without_adapters(module: nn.Module | None) -> nn.Module | None:
    """What is inside the layers of PEFT's: those that add to a module, and those that put a trained copy in its place."""
    inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
    return _without_adapters(inner) if isinstance(inner, nn.Module) else module


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


def _check_shared_by_two(model: nn.Module, head: nn.Module) -> None:
    users = [path for path, module in model.named_modules() if module._parameters.get("weight") is head.weight]
    if len(users) > 2:
        raise _shared_by_more(users)


# ---- errors


def _shared_by_more(users: list[str]) -> AnatomyError:
    return AnatomyError(
        "this model cannot be untied",
        expected="one weight for token embedding and head, and for nothing else",
        found=f"one in {', '.join(users)}",
        remedy="keep them tied; a plan that changes the embedding works at run time: `with plan.attached(model):`",
    )
