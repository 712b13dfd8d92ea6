"""`steer features find`: features of concepts, found in a dictionary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from steer.commands.ab import quieten_libraries
from steer.commands.config import dtype_named, listed
from steer.commands.features_texts import labelled_texts
from steer.errors import ConfigError
from steer.features.load import load_dictionary
from steer.features.search import SEARCHES, FoundFeatures, find_features
from steer.features.training import read_texts
from steer.model.load import load

FOUND, PLOT = "found.safetensors", "found.svg"


def run(config: DictConfig) -> FoundFeatures:
    """Searches, prints the table, and writes it."""
    quieten_libraries()
    settings: Any = OmegaConf.to_container(config.settings, resolve=True)
    search = made_search(config.by, settings)
    concepts: dict[str, Any] = {str(name): listed(words) or [] for name, words in config.concepts.items()}
    dictionary = load_dictionary(config.dictionary.path, config.dictionary.folder, layer=config.dictionary.layer)
    model, tokenizer = load(config.model.name, dtype=dtype_named(config.model.dtype))
    concepts |= {str(name): labelled_texts(tokenizer, path) for name, path in config.labelled.items()}
    texts, report = (
        None if where is None else read_texts(str(where), split=config.text.split, field=config.text.field, subset=config.text.subset)
        for where in (config.data, config.report_data)
    )
    options = {name: config[name] for name in ("top", "least", "holdout", "context", "max_tokens", "seed")}
    found = find_features(
        model, dictionary, concepts, tokenizer=tokenizer, texts=texts, report_texts=report, by=search, progress="texts", **options
    )
    console, folder = Console(), Path(config.folder)
    found.save(folder / FOUND)
    console.print(found.table())
    try:
        found.plot(folder / PLOT)
    except ConfigError as error:  # matplotlib is an extra
        console.print(f"no plot: {error}", soft_wrap=True)
    console.print(f"found features in {folder}", soft_wrap=True)
    return found


def made_search(by: str, settings: dict[str, Any]) -> Any:
    """The search of that name with its settings. Raises ConfigError."""
    search = SEARCHES.get(by)
    try:
        return search(**settings)
    except TypeError as error:
        raise _unknown_setting(by, settings, error) from error


# ---- errors


def _unknown_setting(by: str, settings: dict[str, Any], error: TypeError) -> ConfigError:
    return ConfigError(
        f"the search '{by}' cannot be made with these settings",
        expected="settings that it takes, which docs/features.md lists",
        found=f"{', '.join(settings)}: {error}",
        remedy="correct or leave out settings",
    )
