"""Probability of a concept's words: whether an edit makes a model speak of something, measured on text that does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import ConfigError
from steer.experiment.metric import HIGHER, METRICS, Item, Metric, item_key, passage
from steer.model.annotations import response_tokens
from steer.model.capture import batches, evaluating
from steer.model.devices import input_device
from steer.model.tokens import Row, collate, pad_id


@METRICS.register("concept_probability")
class ConceptProbability(Metric):
    """Log of the probability that the next token is a word of a concept, a mean over the tokens of a passage: ln mean_t sum_w p(w | x_<t).

    exp of a difference of two arms is the factor by which the concept became likelier; the mean over items is that of the logarithms, in
    which no single passage outweighs the others. Counted are words that are one token behind a space; others are left out.

    Args:
        words: of the concept; those of the concept of `experiment.features` when None.
        text: key of the passage in an item.
    """

    unit = "nat"
    better = HIGHER

    def __init__(self, words: Sequence[str] | None = None, text: str = "text") -> None:
        self.words = None if words is None else check_words(words)
        self.text = item_key(text, "text")
        self.keys = (text,)

    def choose(self, words: Sequence[str]) -> None:
        """Sets the words, where none were given."""
        if self.words is None:
            self.words = check_words(words)

    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
        if self.words is None:
            raise _no_words()
        tokens = torch.tensor([list(word_tokens(tokenizer, self.words).values())])
        found, _ = next_word(model, [passage(tokenizer, item, self.text) for item in items], tokens, pad=pad_id(tokenizer))
        return dict(zip([item["id"] for item in items], found[:, 0].tolist(), strict=True))


def check_words(words: Any) -> tuple[str, ...]:
    """The words of a concept. Raises ConfigError for what is no list of texts."""
    if isinstance(words, str) or not isinstance(words, Sequence) or not words:
        raise _no_list(words)
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise _no_list(words)
    return tuple(word.strip() for word in words)


def word_tokens(tokenizer: Any, words: Sequence[str]) -> dict[str, int]:
    """Word -> its token behind a space, of the words that are one token. Raises ConfigError when none is."""
    ids = {word: tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words}
    unknown = getattr(tokenizer, "unk_token_id", None)
    single = {word: of_word[0] for word, of_word in ids.items() if len(of_word) == 1 and of_word[0] != unknown}
    if not single:
        raise _no_single_token(words, {word: len(of_word) for word, of_word in ids.items()})
    return single


def next_word(model: nn.Module, rows: Sequence[Row], tokens: Tensor, *, pad: int, max_tokens: int = 2048) -> tuple[Tensor, Tensor]:
    """In one pass, log of the mean probability of some tokens as the next one, and the mean loss of the text itself, both in nat.

    Args:
        rows: texts; counted is what is predicted in place of each response token.
        tokens: [concepts, words] ids, whose probabilities are added within a concept.

    Returns:
        [len(rows), concepts] and [len(rows)] fp64, in the order of `rows`.
    """
    device = input_device(model)
    of_words = torch.zeros(len(rows), len(tokens), dtype=torch.float64)
    losses = torch.zeros(len(rows), dtype=torch.float64)
    with evaluating(model):
        for chosen in batches(rows, max_tokens):
            batch = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in chosen], pad).items()}
            labels = batch.pop("labels")
            with response_tokens(model, labels != -100):
                logits = model(**batch, use_cache=False).logits  # [batch, tokens, vocabulary]
            targets = labels[:, 1:]
            inside = targets != -100
            scored = logits[:, :-1][inside].float()  # [scored tokens, vocabulary]
            total = scored.logsumexp(-1, keepdim=True)
            logprobs = scored[:, tokens.to(device)].logsumexp(-1) - total  # [scored tokens, concepts]
            table = logprobs.new_full((*inside.shape, len(tokens)), -torch.inf)
            table[inside] = logprobs
            loss = torch.zeros(inside.shape, device=device).masked_scatter(
                inside, (total - scored.gather(-1, targets[inside][:, None]))[:, 0]
            )
            count = inside.sum(1)
            of_words[chosen] = (table.logsumexp(1) - count[:, None].log()).double().cpu()
            losses[chosen] = (loss.sum(1) / count).double().cpu()
    return of_words, losses


# ---- errors


def _no_words() -> ConfigError:
    return ConfigError(
        "metric 'concept_probability' has no words",
        expected="words=[...], or an experiment with a section `features`, whose concept it takes",
        found="none",
        remedy="e.g. {metric: concept_probability, words: [film, movie, actor]}",
    )


def _no_list(words: Any) -> ConfigError:
    return ConfigError("these are no words of a concept", expected="a list of texts", found=repr(words)[:80], remedy="e.g. [film, movie]")


def _no_single_token(words: Sequence[str], lengths: dict[str, int]) -> ConfigError:
    return ConfigError(
        "no word of the concept is one token",
        expected="at least one, whose probability one prediction holds",
        found=", ".join(f"'{word}' {length} tokens" for word, length in list(lengths.items())[:6]) or "no words",
        remedy="choose shorter or commoner words",
    )
