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
from steer.model.shared_blocks import Passes, shared_passes
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
    sums, tokens = summed_logprobs(model, rows, pad=pad, max_tokens=max_tokens)
    scores = sums / tokens
    if not bool(torch.isfinite(scores).all()):
        raise _scores_error(scores)
    return scores


@torch.no_grad()
def summed_logprobs(model: nn.Module, rows: Sequence[Row], *, pad: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Log-probability of each text's response, in nat, and its number of tokens, without a table of log-probabilities.

    Args:
        rows: without a prompt, all but the first token of a text count.

    Returns:
        [len(rows)] fp64, and [len(rows)].
    """
    sums = torch.zeros(len(rows), dtype=torch.float64)
    passes = shared_passes(model)
    with evaluating(model):
        for chosen in batches(rows, max_tokens):
            for part, of_part in in_halves(chosen, lambda part: _sums(model, [rows[i] for i in part], pad, passes)):
                sums[part] = of_part
    return sums, torch.tensor([len(row.ids) - first_predicted(row) for row in rows])


def _sums(model: nn.Module, rows: Sequence[Row], pad: int, passes: Passes) -> Tensor:
    """[rows] fp64, of one batch."""
    batch = {name: tensor.to(input_device(model)) for name, tensor in collate(rows, pad).items()}
    labels = batch.pop("labels")
    with passes(batch), response_tokens(model, labels != -100):
        logits = model(**batch, use_cache=False).logits  # [rows, tokens, vocabulary]
    sums = []
    for row, of_row in zip(rows, logits, strict=True):
        start = first_predicted(row)
        # a view: what is predicted lies in one piece, and a copy of the logits would cost as much as their softmax
        sums.append(target_logprobs(of_row[start - 1 : len(row.ids) - 1], torch.tensor(row.ids[start:])).double().sum())
    return torch.stack(sums).cpu()


def first_predicted(row: Row) -> int:
    """Place of the first token of the response that something stands before."""
    return max(row.prompt, 1)


def _scores_error(scores: Tensor) -> NonFiniteError:
    return NonFiniteError(
        "log-probabilities are not finite",
        expected="a finite number for each text",
        found=f"{int((~torch.isfinite(scores)).sum())} of {len(scores)} are NaN or infinite",
        remedy="the model diverged: lower the learning rate or the strength",
    )
