"""Counterfactual data augmentation, CDA (Zmigrod et al. 2019, arXiv 1906.04571; one- and two-sided: Webster et al. 2020, arXiv 2010.06032):
a fine-tune on text in which what is said of one group is said of the other. See `steer.bias.counterfactual` for the swapping."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from steer.bias.counterfactual import augmented, counterfactuals
from steer.bias.debiasing import MITIGATIONS, Mitigation
from steer.bias.mitigation._lora import lora_on, train_lora
from steer.checks import finite_number, whole_number
from steer.errors import ConfigError, WrongModelError
from steer.model.anatomy import Anatomy
from steer.model.devices import input_device
from steer.model.fingerprint import differing, warn_of_cast
from steer.model.precision import FLOAT32, settled_precision
from steer.model.tokens import Row, encode, plain, rows_hash


@MITIGATIONS.register("cda")
def cda(
    model: nn.Module,
    texts: Sequence[Any] | None,
    tokenizer: Any,
    *,
    sided: str = "two",
    pairs: Iterable[tuple[str, str]] | None = None,
    steps: int = 60,
    batch_size: int = 8,
    learning_rate: float = 3e-4,
    rank: int = 8,
    max_length: int = 128,
    seed: int = 0,
    precision: str = FLOAT32,
) -> Cda:
    """Counterfactual data augmentation (CDA): a LoRA fine-tune on text with swapped group words.

    Args:
        texts: neutral texts of any kind that speak of people, or mappings with `text`, or with `prompt` and `answer`.
        sided: `two`, text and its swapped form; `one`, the swapped form alone.
        pairs: words to swap, gender words when None; see `steer.bias.counterfactual.Swap`.
        steps: optimiser steps of the fine-tune; 0 for the rows alone.
        batch_size, learning_rate, rank, max_length, seed: of the fine-tune.
        precision: of its passes, see `steer.model.precision`.

    Raises:
        ConfigError: no texts, or numbers out of range. ContrastError: no text has a word to swap. TokenizerError, NonFiniteError.
    """
    if texts is None:
        raise _no_texts()
    whole_number(steps, "`steps` of cda")
    for name, value in (("batch_size", batch_size), ("rank", rank), ("max_length", max_length)):
        whole_number(value, f"`{name}` of cda", least=1)
    whole_number(seed, "`seed` of cda")
    finite_number(learning_rate, "`learning_rate` of cda", above=0)
    precision = settled_precision(precision, next(model.parameters()).dtype, input_device(model))
    pairs = None if pairs is None else list(pairs)
    rows = augmented(texts, sided=sided, pairs=pairs)
    tokens = [_row(tokenizer, row) for row in rows]
    facts = {
        "method": "cda",
        "model": Anatomy.find(model).fingerprint(),
        "sided": sided,
        "pairs": "gender" if pairs is None else [list(pair) for pair in pairs],
        "texts": len(texts),
        "swapped": len(counterfactuals(texts, pairs)),
        "texts_sha256": hashlib.sha256(json.dumps(list(texts), sort_keys=True, ensure_ascii=False, default=dict).encode()).hexdigest(),
        "rows": len(rows),
        "rows_sha256": rows_hash(tokens),
        "training": {"steps": steps},
    }
    adapter: dict[str, Tensor] = {}
    if steps:
        settings = {"batch_size": batch_size, "learning_rate": learning_rate, "rank": rank, "max_length": max_length, "seed": seed}
        adapter, losses = train_lora(model, tokens, steps=steps, precision=precision, **settings)  # type: ignore[arg-type]
        facts["training"] = {"steps": steps, **settings, "precision": precision, "loss": losses}
    return Cda(name="cda", facts=facts, rows=rows, rank=rank, adapter=adapter)


@dataclass(frozen=True, eq=False, kw_only=True)
class Cda(Mitigation):
    """Augmented rows, and the LoRA adapter that a fine-tune on them gave.

    Attributes:
        rows: to train on, of the kind that was given.
        rank: of the adapter.
        adapter: its tensors; empty without a fine-tune.
    """

    rows: list[Any] = field(repr=False)
    rank: int
    adapter: dict[str, Tensor] = field(repr=False)

    def describe(self) -> str:
        steps = self.facts["training"]["steps"]
        tuned = f"LoRA of rank {self.rank}, {steps} steps" if steps else "rows alone"
        return f"CDA, {self.facts['sided']}-sided, {self.facts['swapped']} of {self.facts['texts']} texts swapped, {tuned}"

    @contextmanager
    def acting(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the adapter; the model that is given has it too.

        Raises:
            ConfigError: there was no fine-tune, or the model has adapters already. WrongModelError: another model.
        """
        if not self.adapter:
            raise _not_tuned()
        known, found = self.facts["model"], Anatomy.find(model).fingerprint()
        if differing(known, found):
            raise _other_model(known, found)
        warn_of_cast("the adapter of this cda was", known, found, stacklevel=5)
        with lora_on(model, self.rank, adapter=self.adapter) as adapted:
            yield adapted


def _row(tokenizer: Any, row: str | Mapping[str, Any]) -> Row:
    if isinstance(row, str):
        return plain(tokenizer, row)
    if "text" in row:
        return plain(tokenizer, row["text"])
    if not isinstance(row.get("prompt"), str) or not isinstance(row.get("answer"), str):
        raise _no_answer(row)
    return encode(tokenizer, row["prompt"], row["answer"])


# ---- errors


def _no_texts() -> ConfigError:
    return ConfigError(
        "cda has no texts to augment",
        expected="texts, or rows with `prompt` and `answer`, some of which speak of people",
        found="none",
        remedy="pass neutral text, e.g. paragraphs of an encyclopedia",
    )


def _no_answer(row: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        "a row of cda cannot be trained on",
        expected="text under `text`, or under `prompt` and `answer`",
        found=f"a row with the keys {', '.join(map(str, row))}",
        remedy="complete the row, or pass steps=0 for the rows alone",
    )


def _other_model(known: Any, found: Any) -> WrongModelError:
    return WrongModelError("the adapter of this cda was trained on another model", expected=known, found=found,
                           remedy="fit it on this model")  # fmt: skip


def _not_tuned() -> ConfigError:
    return ConfigError(
        "this cda was not fine-tuned",
        expected="steps of 1 or more",
        found="steps=0",
        remedy="train on `rows` yourself, or fit it with steps=60",
    )
