"""LoRA fine-tuning of a causal language model on rows, and the adapter that comes of it, put on and taken off again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from steer.errors import ConfigError, NonFiniteError
from steer.model.capture import evaluating
from steer.model.devices import input_device
from steer.model.precision import FLOAT32, products_in
from steer.model.restoring import restoring
from steer.model.tokens import Row, collate


def train_lora(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    rank: int,
    max_length: int,
    seed: int,
    precision: str = FLOAT32,
) -> tuple[dict[str, Tensor], list[float]]:
    """Trains a LoRA adapter on all linear maps of the blocks with AdamW, at a constant rate and without dropout; the model stays as it was.

    Returns:
        The adapter's tensors, on the CPU, and the loss of every step.
    """
    device = input_device(model)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses = []
    with lora_on(model, rank, seed=seed) as adapted, torch.enable_grad():
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        for _ in range(steps):
            while len(order) < batch_size:
                order += torch.randperm(len(rows), generator=generator).tolist()
            chosen, order = order[:batch_size], order[batch_size:]
            batch = collate([rows[i] for i in chosen], 0, max_length=max_length)
            with products_in(precision, device):
                loss = adapted(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise _diverged(losses)
        adapter = {
            name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
        }
    return adapter, losses


@contextmanager
def lora_on(model: nn.Module, rank: int, *, seed: int = 0, adapter: Mapping[str, Tensor] | None = None) -> Iterator[Any]:
    """The model with a LoRA adapter, a new one or the given one, in evaluation mode; as it was afterwards, on every exit path.

    Raises:
        ConfigError: a model that has adapters already.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise _has_adapters(model)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with_gradients = torch.is_grad_enabled()
    adapted: list[Any] = []

    def put_back() -> None:
        while adapted:
            adapted.pop().unload()
        vars(model).pop("peft_config", None)  # PEFT leaves it, and warns at the next adapter
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)

    with restoring(put_back), evaluating(model), torch.set_grad_enabled(with_gradients):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted.append(get_peft_model(model, config))
        if adapter is not None:
            set_peft_model_state_dict(adapted[0], dict(adapter))
        yield adapted[0].eval()


# ---- errors


def _has_adapters(model: nn.Module) -> ConfigError:
    return ConfigError(
        "this model has adapters already",
        expected="a base model",
        found=type(model).__name__,
        remedy="merge them first: model.merge_and_unload()",
    )


def _diverged(losses: list[float]) -> NonFiniteError:
    return NonFiniteError(
        "the fine-tune of cda diverged",
        expected="a finite loss at every step",
        found=f"{losses[-1]} at step {len(losses) - 1}",
        remedy="lower learning_rate",
    )
