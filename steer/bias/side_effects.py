"""Side effects of a mitigation: the loss on neutral text, by source, and the plain facts that a model still completes.

Measure the model, measure it again with the mitigation in force, and subtract:

    before = side_effects(model, sources)
    with fitted.acting(model):
        after = side_effects(model, sources)
    print(after.minus(before))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type
from steer.errors import ConfigError
from steer.model.annotations import response_tokens
from steer.model.capture import batches, evaluating
from steer.model.devices import input_device
from steer.model.likelihood import target_logprobs
from steer.model.load import tokenizer_of
from steer.model.text_loss import ratio_change, text_losses
from steer.model.tokens import Row, check_tokenizer, collate, plain, rows_hash

LEAST_SOURCES = 3  # what was fitted on text of one kind hides its cost there
ALL = "all"  # the sources together


@dataclass(frozen=True)
class Change:
    """A paired difference with its 95 % interval.

    Attributes:
        n: texts or items that it is over.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True, eq=False)
class SideEffects:
    """What neutral text costs a model, and which plain facts it completes.

    Attributes:
        losses: by source, [texts] nat in all. tokens: by source, [texts] of which they are.
        completed: [items] whether the answer is the likeliest next token. logprobs: [items] of the answer, nat.
        items: the cloze items that this tokenizer can answer with one token; left_out: how many it cannot.
        digest: of all texts and items; two measurements can be compared where it is the same.

    Example:
        >>> sources = {"news": texts, "stories": other_texts, "web": ["the sun is warm", "you and i"]}
        >>> items = [{"prompt": "the cat sat on the", "answer": " mat"}, {"prompt": "the sun is", "answer": " warm"}]
        >>> effects = steer.bias.side_effects(model, sources, items=items)
        >>> effects.loss["all"], effects.accuracy  # nat per token, share of the cloze items
    """

    losses: dict[str, Tensor] = field(repr=False)
    tokens: dict[str, Tensor] = field(repr=False)
    completed: Tensor = field(repr=False)
    logprobs: Tensor = field(repr=False)
    items: list[dict[str, str]] = field(repr=False)
    left_out: int
    digest: str = field(repr=False)

    @property
    def loss(self) -> dict[str, float]:
        """Nats per token, by source and over all of them."""
        by_source = {source: float(losses.sum() / self.tokens[source].sum()) for source, losses in self.losses.items()}
        tokens = sum(float(count.sum()) for count in self.tokens.values())
        return {**by_source, ALL: sum(float(losses.sum()) for losses in self.losses.values()) / tokens}

    @property
    def accuracy(self) -> float:
        """Share of the cloze items that are completed."""
        return float(self.completed.double().mean())

    def minus(self, before: SideEffects) -> SideEffectsChange:
        """What changed since a measurement on the same texts. Raises ConfigError where they are others."""
        of_type(before, SideEffects, "the measurement to compare with", "pass what side_effects gave without the mitigation")
        if before.digest != self.digest:
            raise _other_texts()
        loss = {source: _per_token(self.losses[source] - before.losses[source], self.tokens[source]) for source in self.losses}
        changes = torch.cat([self.losses[source] - before.losses[source] for source in self.losses])
        loss[ALL] = _per_token(changes, torch.cat(list(self.tokens.values())))
        flips = self.completed.double() - before.completed.double()
        ones = torch.ones(len(flips), dtype=torch.float64)
        return SideEffectsChange(
            loss, before.accuracy, self.accuracy, _per_token(flips, ones), _per_token(self.logprobs - before.logprobs, ones)
        )


@dataclass(frozen=True)
class SideEffectsChange:
    """What a mitigation cost.

    Attributes:
        loss: nats per token, by source and under `all`.
        accuracy_before, accuracy_after: share of the cloze items that are completed; accuracy: their difference.
        logprob: of the answers, nat per item.

    Example:
        >>> sources = {"news": texts, "stories": other_texts, "web": ["the sun is warm", "you and i"]}
        >>> items = [{"prompt": "the cat sat on the", "answer": " mat"}, {"prompt": "the sun is", "answer": " warm"}]
        >>> before, after = (steer.bias.side_effects(stage, sources, items=items, tokenizer=tokenizer) for stage in (base, tuned))
        >>> after.minus(before).loss["all"], after.minus(before).accuracy
    """

    loss: dict[str, Change]
    accuracy_before: float
    accuracy_after: float
    accuracy: Change
    logprob: Change

    def __str__(self) -> str:
        lines = [f"loss on {source}: {change} nats per token" for source, change in self.loss.items()]
        lines.append(f"cloze: {self.accuracy_before:.1%} -> {self.accuracy_after:.1%} completed, answers {self.logprob} nats")
        return "\n".join(lines)


def side_effects(
    model: nn.Module,
    sources: Mapping[str, Sequence[str] | Sequence[Row]],
    *,
    tokenizer: Any = None,
    items: Sequence[Mapping[str, str]] | None = None,
    max_tokens: int = 2048,
) -> SideEffects:
    """Measures the loss on neutral text and a cloze set of plain facts; whatever is in force on the model stays so.

    Args:
        model: a causal language model.
        sources: at least three kinds of text, each at least two texts or rows, that nothing was fitted on. Of a text every token but the
            first counts, of a row its response.
        tokenizer: of the model; the one that `steer.load` gave with it when None.
        items: mappings with `prompt` and `answer`, which begins with its space; the 60 that the package ships when None.
        max_tokens: padded tokens per batch.

    Raises:
        ConfigError: too few sources, texts or items, or a text in two sources. TokenizerError, NonFiniteError.

    Example:
        >>> sources = {"news": texts, "stories": other_texts, "web": ["the sun is warm", "you and i"]}
        >>> items = [{"prompt": "the cat sat on the", "answer": " mat"}, {"prompt": "the sun is", "answer": " warm"}]
        >>> before = steer.bias.side_effects(model, sources, items=items)
        >>> with plan.attached(model):
        ...     cost = steer.bias.side_effects(model, sources, items=items).minus(before)
    """
    tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
    check_tokenizer(tokenizer)
    rows = _rows_of(sources, tokenizer)
    known, answers, left_out = _answerable(cloze_items() if items is None else items, tokenizer)
    measured = {source: text_losses(model, of_source, max_tokens=max_tokens) for source, of_source in rows.items()}
    losses = {source: found.nats for source, found in measured.items()}
    tokens = {source: found.tokens for source, found in measured.items()}
    completed, logprobs = _next_token(model, answers, max_tokens)
    digest = rows_hash([*(row for of_source in rows.values() for row in of_source), *answers])
    return SideEffects(losses, tokens, completed, logprobs, known, left_out, digest)


def cloze_items() -> list[dict[str, str]]:
    """The plain facts that the package ships, as `kind`, `prompt` and `answer`."""
    text = (files("steer.bias") / "data" / "cloze.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _rows_of(sources: Mapping[str, Any], tokenizer: Any) -> dict[str, list[Row]]:
    of_type(sources, Mapping, "the sources of neutral text", "pass {name: [text, ...]}")
    if len(sources) < LEAST_SOURCES or ALL in sources:
        raise _too_few_sources(list(sources))
    rows: dict[str, list[Row]] = {}
    seen: dict[Row, str] = {}
    for source, texts in sources.items():
        of_type(texts, (list, tuple), f"the texts of source '{source}'", "pass a list of texts or rows")
        rows[source] = [text if isinstance(text, Row) else plain(tokenizer, text) for text in texts]
        if len(texts) < 2:
            raise _too_few_texts(source, len(texts))
        for i, row in enumerate(rows[source]):
            if not row.response:
                raise _no_response(source, i)
            if row in seen:
                raise _repeated(source, i, seen[row])
            seen[row] = source
    return rows


def _answerable(items: Sequence[Mapping[str, str]], tokenizer: Any) -> tuple[list[dict[str, str]], list[Row], int]:
    """The items whose answer is one known token, as they are and as rows with the answer as response; and how many others there are."""
    known, rows = [], []
    for i, item in enumerate(items):
        if not isinstance(item, Mapping) or not all(isinstance(item.get(key), str) and item[key] for key in ("prompt", "answer")):
            raise _no_item(i, item)
        prompt = tuple(tokenizer(item["prompt"]).input_ids)
        whole = tuple(tokenizer(item["prompt"] + item["answer"]).input_ids)
        if prompt and len(whole) == len(prompt) + 1 and whole[:-1] == prompt and whole[-1] != tokenizer.unk_token_id:
            known.append(dict(item))
            rows.append(Row(whole, len(prompt)))
    if len(rows) < 2:
        raise _no_items(len(items), len(rows))
    return known, rows, len(items) - len(rows)


def _next_token(model: nn.Module, rows: Sequence[Row], max_tokens: int) -> tuple[Tensor, Tensor]:
    """[rows] whether the one token of each response is the likeliest, and its log-probability."""
    device = input_device(model)
    completed = torch.zeros(len(rows), dtype=torch.bool)
    logprobs = torch.zeros(len(rows), dtype=torch.float64)
    with evaluating(model):
        for chosen in batches(rows, max_tokens):
            batch = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in chosen], 0).items()}
            labels = batch.pop("labels")
            with response_tokens(model, labels != -100):
                logits = model(**batch, use_cache=False).logits
            prompts = torch.tensor([rows[i].prompt for i in chosen], device=logits.device)
            last = logits[torch.arange(len(chosen), device=logits.device), prompts - 1]  # [batch, vocabulary]
            answers = torch.tensor([rows[i].ids[-1] for i in chosen], device=logits.device)
            completed[chosen] = (last.argmax(-1) == answers).cpu()
            logprobs[chosen] = target_logprobs(last, answers).double().cpu()
    return completed, logprobs


def _per_token(changes: Tensor, tokens: Tensor) -> Change:
    """Change per token with an interval over texts, whose tokens are not independent of each other.

    Args:
        changes: [texts] in all. tokens: [texts].
    """
    value, half = ratio_change(changes, tokens)
    return Change(value, value - half, value + half, len(changes))


# ---- errors


def _other_texts() -> ConfigError:
    return ConfigError(
        "two measurements of side effects cannot be subtracted",
        expected="the same texts and items in both, in the same order",
        found="others",
        remedy="measure the model without the mitigation on the same sources",
    )


def _too_few_sources(sources: list[str]) -> ConfigError:
    return ConfigError(
        "neutral text is of too few sources",
        expected=f"at least {LEAST_SOURCES}, none of them called '{ALL}'",
        found=f"{len(sources)} ({', '.join(map(str, sources))})",
        remedy="add text of other kinds: what was fitted on one of them hides its cost there",
    )


def _too_few_texts(source: str, found: int) -> ConfigError:
    return ConfigError(
        f"source '{source}' has too few texts",
        expected="at least 2, for an interval",
        found=found,
        remedy="cut it into several texts, or add some",
    )


def _no_response(source: str, index: int) -> ConfigError:
    return ConfigError(
        f"text {index} of source '{source}' has no token to predict",
        expected="a response",
        found="a row of a prompt alone",
        remedy="make rows of running text with steer.model.tokens.plain",
    )


def _repeated(source: str, index: int, other: str) -> ConfigError:
    return ConfigError(
        f"text {index} of source '{source}' is there twice",
        expected="every text once",
        found=f"the same text in source '{other}'",
        remedy="remove one of them",
    )


def _no_item(index: int, item: object) -> ConfigError:
    return ConfigError(
        f"cloze item {index} lacks a part", expected="text under `prompt` and `answer`", found=repr(item)[:80], remedy="complete it"
    )


def _no_items(given: int, found: int) -> ConfigError:
    return ConfigError(
        "too few cloze items can be answered with one token of this tokenizer",
        expected="at least 2",
        found=f"{found} of {given}",
        remedy="pass items whose answers are words that the tokenizer knows, each with the space in front",
    )
