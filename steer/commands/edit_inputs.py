"""What `steer edit` edits, and the texts that it needs beside: records of the command line or of a file, running text, neutral text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from torch import nn

from steer.commands.config import as_typed
from steer.edits import Fact, FactRecord, known_facts, load_records
from steer.edits.running_text import shipped_texts
from steer.errors import ConfigError
from steer.experiment.data import DataSet
from steer.features.training import read_texts
from steer.features.training.texts import documents
from steer.model.tokens import plain

OF_ONE = ("prompt", "subject", "target")
NEUTRAL = "damage"  # split of a data set that ships with the library
SHIPPED = "gender_pronoun"


def records_of(config: DictConfig, model: nn.Module, tokenizer: Any) -> list[FactRecord]:
    """The one fact of the command line, or the records of `facts`, those that the model knows where that is asked for.

    Raises:
        ConfigError: neither or both of them, or no record that the model knows. Otherwise as `load_records`.
    """
    said = [key for key in OF_ONE if config[key] is not None]
    if config.facts is None:
        if len(said) < len(OF_ONE):
            raise _no_fact(said)
        prompt, subject, target = (as_typed(config, key) or "" for key in OF_ONE)
        return [FactRecord(Fact.of(prompt, subject, target, as_typed(config, "truth")))]
    if said:
        raise _two_sources(said)
    records = load_records(str(config.facts), split=config.split, snippets=config.snippets)
    if config.known is None:
        return records[: config.count]
    records = known_facts(model, tokenizer, records, float(config.known), count=config.count)
    if not records:
        raise _none_known(config.facts, config.known)
    return records


def running_texts(config: DictConfig) -> list[str]:
    """Ordinary text, of which the covariance of keys is taken: `texts`, else the text that ships with the library."""
    if config.texts is not None:
        return _pieces(config, config.texts)
    return shipped_texts()


def neutral_texts(config: DictConfig, tokenizer: Any) -> list[str]:
    """Texts that no edit is about, `neutral_tokens` of them: `neutral`, else another text that ships with the library."""
    if config.neutral is None:
        texts: Sequence[str] = [row["text"] for row in DataSet(SHIPPED).split(NEUTRAL, ("text",))]
    else:
        texts = _pieces(config, config.neutral)
    return some_texts(tokenizer, texts, config.neutral_tokens)


def _pieces(config: DictConfig, where: Any) -> list[str]:
    """The texts of a file, a folder or a data set, cut at blank lines."""
    texts = read_texts(str(where), split=config.text.split, field=config.text.field, subset=config.text.subset)
    return [piece for text in texts for piece in documents(text)]


def some_texts(tokenizer: Any, texts: Sequence[str], tokens: int | None) -> list[str]:
    """Texts from all over a list, until there are so many tokens; all of them for None."""
    if tokens is None:
        return list(texts)
    chosen, left = [], tokens
    step = max(1, len(texts) // 12)
    for place in [place for start in range(step) for place in range(start, len(texts), step)]:
        if left <= 0:
            break
        chosen.append(texts[place])
        left -= len(plain(tokenizer, texts[place]).ids)
    return chosen


# ---- errors


def _no_fact(said: list[str]) -> ConfigError:
    return ConfigError(
        "'steer edit' has nothing to edit",
        expected=f"{', '.join(OF_ONE)}, or facts",
        found=", ".join(said) or "none of them",
        remedy="e.g. 'prompt=The mother tongue of Danielle Darrieux is' 'subject=Danielle Darrieux' target=English, or facts=...",
    )


def _two_sources(said: list[str]) -> ConfigError:
    found, remedy = f"facts and {', '.join(said)}", "leave one of them out"
    return ConfigError("what is edited comes from two places", expected="one fact, or facts", found=found, remedy=remedy)


def _none_known(facts: object, known: float) -> ConfigError:
    return ConfigError(
        f"the model knows no fact of '{facts}'",
        expected=f"true objects whose first token it says with a probability of {known} at least",
        found="none",
        remedy="lower `known`, or set known=null",
    )
