"""Log-probabilities of texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steer.errors import NonFiniteError
from steer.model.annotations import response_tokens
from steer.model.capture import batches, evaluating
from steer.model.devices import input_device
from steer.model.memory import in_halves
from steer.model.tokens import Row, collate


def response_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each text's response, in nat, and its number of tokens; differentiable.

    Args:
        logits: [batch, tokens, vocabulary].
        labels: [batch, tokens], -100 outside the response.

    Returns:
        [batch] fp32 and [batch].
    """
    targets = labels[:, 1:]
    in_response = targets != -100
    logprobs = logits[:, :-1][in_response].float().log_softmax(-1).gather(-1, targets[in_response][:, None])[:, 0]
    per_token = torch.zeros(in_response.shape, device=logits.device).masked_scatter(in_response, logprobs)  # [batch, tokens - 1]
    return per_token.sum(1), in_response.sum(1)


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of one token a row, in nat, without a table of all of them.

    Args:
        logits: [n, vocabulary]. targets: [n] token ids.

    Returns:
        [n] fp32.
    """
    logits = logits.float()
    return logits.gather(-1, targets.to(logits.device)[:, None])[:, 0] - logits.logsumexp(-1)


def response_logprobs(model: nn.Module, rows: Sequence[Row], *, pad: int, max_tokens: int = 2048) -> Tensor:
    """Mean log-probability per response token, in nat.

    A plan that is attached stays in force, and is told which tokens are the response.

    Args:
        model: a causal language model.
        rows: texts with at least one response token each.
        pad: any token id.
        max_tokens: padded tokens per batch; one that does not fit into memory is halved.

    Returns:
        [len(rows)] fp64, in the order of `rows`.

    Raises:
        NonFiniteError: the model's output is NaN or infinite.
    """
    scores = torch.zeros(len(rows), dtype=torch.float64)
    with evaluating(model):
        for chosen in batches(rows, max_tokens):
            for part, means in in_halves(chosen, lambda part: _response_means(model, [rows[i] for i in part], pad)):
                scores[part] = means
    if not bool(torch.isfinite(scores).all()):
        raise _scores_error(scores)
    return scores


def _response_means(model: nn.Module, rows: Sequence[Row], pad: int) -> Tensor:
    """[rows] fp64 mean log-probability per response token, of one batch."""
    batch = {name: tensor.to(input_device(model)) for name, tensor in collate(rows, pad).items()}
    labels = batch.pop("labels")
    with response_tokens(model, labels != -100):
        logits = model(**batch, use_cache=False).logits
    total, count = response_sums(logits, labels)
    return (total / count).double().cpu()


def _scores_error(scores: Tensor) -> NonFiniteError:
    return NonFiniteError(
        "log-probabilities are not finite",
        expected="a finite number for each text",
        found=f"{int((~torch.isfinite(scores)).sum())} of {len(scores)} are NaN or infinite",
        remedy="the model diverged: lower the learning rate or the strength",
    )
