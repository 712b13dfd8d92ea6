"""Log-probabilities of given texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steer.errors import NonFiniteError
from steer.model.annotations import response_tokens
from steer.model.capture import batches, evaluating
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
    wanted = targets != -100
    picked = logits[:, :-1][wanted].float().log_softmax(-1).gather(-1, targets[wanted][:, None])[:, 0]
    return torch.zeros(wanted.shape, device=logits.device).masked_scatter(wanted, picked).sum(1), wanted.sum(1)


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of given tokens, in nat, without a table of all of them.

    Args:
        logits: [n, vocabulary]. targets: [n] token ids.

    Returns:
        [n] fp32.
    """
    logits = logits.float()
    return logits.gather(-1, targets.to(logits.device)[:, None])[:, 0] - logits.logsumexp(-1)


def response_logprobs(model: nn.Module, rows: Sequence[Row], *, pad: int, max_tokens: int = 2048) -> Tensor:
    """Mean log-probability per response token, in nat.

    A plan that is attached stays in force; the response tokens are announced to it.

    Args:
        model: a causal language model.
        rows: texts with at least one response token each.
        pad: any token id.
        max_tokens: padded tokens per batch.

    Returns:
        [len(rows)] fp64, in the order of `rows`.

    Raises:
        NonFiniteError: the model's output is NaN or infinite.
    """
    device = next(model.parameters()).device
    scores = torch.zeros(len(rows), dtype=torch.float64)
    with evaluating(model):
        for chosen in batches(rows, max_tokens):
            batch = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in chosen], pad).items()}
            labels = batch.pop("labels")
            with response_tokens(model, labels != -100):
                logits = model(**batch, use_cache=False).logits
            total, count = response_sums(logits, labels)
            scores[chosen] = (total / count).double().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise NonFiniteError(
            "log-probabilities are not finite",
            expected="a finite number for each text",
            found=f"{int((~torch.isfinite(scores)).sum())} of {len(scores)} are NaN or infinite",
            remedy="the model diverged: lower the learning rate or the strength",
        )
    return scores
