"""Fine-tuning of changes beside the weights, which the baselines of editing do; the weights themselves stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.edits.answers import already_said
from steer.edits.editor import EditBench
from steer.edits.fact import Fact
from steer.edits.frozen import frozen
from steer.edits.locate import answer_row
from steer.errors import NonFiniteError
from steer.model.capture import batches
from steer.model.devices import input_device
from steer.model.likelihood import target_logprobs
from steer.model.logits_at import logits_at
from steer.model.memory import in_halves
from steer.model.prefix import replaced_forwards
from steer.model.tokens import Row, collate

MAX_TOKENS = 1024  # padded tokens of a pass with gradients; one that does not fit into memory is halved


@dataclass(frozen=True, eq=False)
class Shift:
    """What is trained at one map: its output changes by `of(x)`, differentiable in `parameters`."""

    of: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]


def not_said(bench: EditBench, facts: Sequence[Fact]) -> tuple[list[Fact], tuple[int, ...]]:
    """The facts to be trained, and the numbers of those that the model says already."""
    said = already_said(bench.model, bench.tokenizer, facts)
    return [fact for fact, is_said in zip(facts, said, strict=True) if not is_said], tuple(i for i, is_said in enumerate(said) if is_said)


def fine_tune(
    bench: EditBench,
    facts: Sequence[Fact],
    shifts: Mapping[int, Shift],
    *,
    lr: float,
    steps: int,
    stop_loss: float,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Adam on the log-probabilities of the targets behind the plain prompts, per token and mean over facts.

    Args:
        shifts: what is trained, by layer.
        stop_loss: it ends when the loss is below.
        after_step: called without gradients.

    Raises:
        NonFiniteError: the loss.
    """
    rows = [answer_row(bench.tokenizer, fact.prompt, fact.target) for fact in facts]
    parameters = [parameter for shift in shifts.values() for parameter in shift.parameters]
    optimiser = torch.optim.Adam(parameters, lr=lr)
    forwards = {bench.maps[layer].module: _shifted(bench.maps[layer].module.forward, shift.of) for layer, shift in shifts.items()}
    with frozen(bench.model), replaced_forwards(forwards):
        for step in range(steps):
            total, sums = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
            for chosen in batches(rows, MAX_TOKENS):
                for _, (loss, gradients) in in_halves(chosen, lambda part: _gradients(bench, [rows[i] for i in part], parameters)):
                    total += loss / len(rows)
                    for whole, gradient in zip(sums, gradients, strict=True):
                        whole += gradient / len(rows)
            if not total < float("inf"):
                raise _not_finite(step)
            if total < stop_loss:
                return
            for parameter, whole in zip(parameters, sums, strict=True):
                parameter.grad = whole
            optimiser.step()
            after_step()


def _gradients(bench: EditBench, rows: Sequence[Row], parameters: Sequence[Tensor]) -> tuple[float, tuple[Tensor, ...]]:
    """Loss of texts and its gradients, which come into the parameters only where memory suffices for all of them."""
    with torch.enable_grad():
        loss = _loss(bench, rows)
        return float(loss.detach()), torch.autograd.grad(loss, parameters)


def _loss(bench: EditBench, rows: Sequence[Row]) -> Tensor:
    """Sum over texts of the mean loss per token of their responses."""
    device = input_device(bench.model)
    batch = collate(rows, 0)
    labels = batch.pop("labels")[:, 1:]
    width = batch["input_ids"].shape[1]
    row, column = (labels != -100).nonzero(as_tuple=True)
    inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items()} | {"use_cache": False}
    logits = logits_at(bench.model, bench.anatomy.unembedding, inputs, row * width + column)
    logprobs = target_logprobs(logits, labels[row, column])
    lengths = torch.tensor([text.response for text in rows])
    return -(logprobs / lengths[row].to(logprobs)).sum()


def _shifted(forward: Callable[..., Tensor], shift: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = forward(x, *args, **kwargs)
        return output + shift(x.float()).to(output)

    return run


# ---- errors


def _not_finite(step: int) -> NonFiniteError:
    return NonFiniteError(
        "the loss of a fine-tuned edit is not finite",
        expected="a finite number",
        found=f"NaN or infinity at step {step}",
        remedy="lower the learning rate, or run the model in float32 or bfloat16",
    )
