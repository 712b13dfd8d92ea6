"""KL divergence from the base model: how far an edit moves predictions that it should leave alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import one_of
from steer.errors import ConfigError, NonFiniteError
from steer.experiment.metric import LOWER, METRICS, Item, Metric, encoded, item_key, passage
from steer.model.annotations import response_tokens
from steer.model.capture import batches, evaluating
from steer.model.devices import input_device
from steer.model.tokens import Row, collate, pad_id

log = logging.getLogger(__name__)


@METRICS.register("kl_to_base")
class KLToBase(Metric):
    """Mean over tokens of KL(base || model) of the next-token distributions, sum_v p_base(v) (log p_base(v) - log p_model(v)), in nat.

    0 for the base itself, however the model is steered at other times. On the tokens of a passage, or of a given answer to a prompt.
    `prepare` keeps the log-probabilities of the base in fp32, tokens x vocabulary x 4 bytes: 200 MB for 1,000 tokens at a vocabulary of
    50,000, five times that at 250,000.

    Args:
        of: `passage` (items with `text`) or `answer` (items with `prompt` and `answer`).
        key: of that text in an item, where it has another name.
    """

    unit = "nat/token"
    better = LOWER

    def __init__(self, of: str = "passage", key: str | None = None) -> None:
        self.of = one_of(of, ("passage", "answer"), "of in 'kl_to_base'")
        self.key = item_key(key or {"passage": "text", "answer": "answer"}[of], "key")
        self.keys = (self.key,) if of == "passage" else ("prompt", self.key)
        self._base: dict[str, tuple[tuple[int, ...], Tensor]] = {}  # item id -> tokens, [tokens, vocabulary] of fp32 on the CPU

    def prepare(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> None:
        base: dict[str, tuple[tuple[int, ...], Tensor]] = {}

        def keep(item: Item, ids: tuple[int, ...], logprobs: Tensor) -> None:
            base[item["id"]] = (ids, logprobs.cpu())

        self._each(model, tokenizer, items, keep)
        self._base = base
        size = sum(logprobs.nbytes for _, logprobs in base.values())
        log.info("kl_to_base keeps the base model's predictions of %d items: %.0f MB", len(base), size / 1e6)

    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
        values: dict[str, float] = {}

        def compare(item: Item, ids: tuple[int, ...], logprobs: Tensor) -> None:
            of_base = self._of_base(item, ids, logprobs).to(logprobs.device)
            per_token = (of_base.exp() * (of_base - logprobs)).nan_to_num(nan=0.0, posinf=torch.inf).sum(-1)  # 0 log 0 is 0; [tokens]
            values[item["id"]] = float(per_token.double().mean())

        self._each(model, tokenizer, items, compare)
        return values

    def _of_base(self, item: Item, ids: tuple[int, ...], logprobs: Tensor) -> Tensor:
        if item["id"] not in self._base:
            raise _no_base(item)
        base_ids, of_base = self._base[item["id"]]
        if of_base.shape[-1] != logprobs.shape[-1]:
            raise _other_vocabulary(of_base.shape[-1], logprobs.shape[-1])
        if base_ids != ids:
            raise _other_tokens(item, len(base_ids), len(ids))
        return of_base

    def _each(self, model: nn.Module, tokenizer: Any, items: Sequence[Item], use: Callable[[Item, tuple[int, ...], Tensor], None]) -> None:
        """Hands on the scored tokens of each item, and the log-probabilities with which they were predicted, [tokens, vocabulary]."""
        rows = [self._row(tokenizer, item) for item in items]
        device = input_device(model)
        with evaluating(model):
            for chosen in batches(rows, max_tokens=1024):
                batch = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in chosen], pad_id(tokenizer)).items()}
                with response_tokens(model, batch.pop("labels") != -100):
                    logits = model(**batch, use_cache=False).logits  # [batch, tokens, vocabulary]
                for i, of_row in zip(chosen, logits, strict=True):
                    row = rows[i]
                    logprobs = of_row[row.prompt - 1 : len(row.ids) - 1].float().log_softmax(-1)
                    if bool(logprobs.isnan().any()):
                        raise _not_finite(items[i])
                    use(items[i], row.ids[row.prompt :], logprobs)

    def _row(self, tokenizer: Any, item: Item) -> Row:
        return passage(tokenizer, item, self.key) if self.of == "passage" else encoded(tokenizer, item, item[self.key])


# ---- errors


def _no_base(item: Item) -> ConfigError:
    what = f"metric 'kl_to_base' does not know what the base model says to item '{item['id']}'"
    remedy = "call `prepare` with the base model and all items before anything acts on it"
    return ConfigError(what, expected="predictions of the base model", found="none", remedy=remedy)


def _other_vocabulary(base: int, model: int) -> ConfigError:
    what = "models with other vocabularies have no KL divergence"
    remedy = "compare models with one vocabulary, or leave kl_to_base out"
    return ConfigError(what, expected=f"the {base} tokens of the base model", found=f"{model} tokens", remedy=remedy)


def _other_tokens(item: Item, base: int, model: int) -> ConfigError:
    what = f"the tokens of item '{item['id']}' are not those that the base model was given"
    found = f"{model} tokens, of the base {base}, which are not all the same"
    remedy = "use one tokenizer and one text for the base and the model"
    return ConfigError(what, expected="the same tokens for both", found=found, remedy=remedy)


def _not_finite(item: Item) -> NonFiniteError:
    what = f"the predictions of item '{item['id']}' are not finite"
    return NonFiniteError(
        what, expected="finite log-probabilities", found="NaN", remedy="the model diverged: lower the learning rate or the strength"
    )
