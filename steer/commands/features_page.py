"""`steer features page`: what the features of a dictionary are, read on text and written on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from steer.commands.ab import quieten_libraries
from steer.commands.config import dtype_named
from steer.errors import ConfigError
from steer.features.load import load_dictionary
from steer.features.reading import EXPLAINERS, FeatureReading, read_features, to_neuronpedia
from steer.features.training import read_texts
from steer.model.load import load
from steer.report import write_feature_page

PAGE, READING, NEURONPEDIA = "page.html", "reading.safetensors", "neuronpedia"
EXPORT_KEYS = ("model", "source_set", "title", "creator", "creator_id")
SIZES = ("top", "spread", "before", "after", "tokens", "nearest", "bins", "context", "max_tokens", "seed")


def run(config: DictConfig) -> FeatureReading:
    """Reads features, and writes the reading and the page."""
    quieten_libraries()
    export: Any = OmegaConf.to_container(config.neuronpedia, resolve=True)
    if export and (missing := [key for key in EXPORT_KEYS if export.get(key) is None]):
        raise _incomplete_export(missing)
    if config.explainer is not None:
        EXPLAINERS.get(config.explainer)  # before the model runs for minutes
    dictionary = load_dictionary(config.dictionary.path, config.dictionary.folder, layer=config.dictionary.layer)
    model, tokenizer = load(config.model.name, dtype=dtype_named(config.model.dtype))
    texts = read_texts(str(config.data), split=config.text.split, field=config.text.field, subset=config.text.subset)
    features = None if config.features is None else list(config.features)
    sizes = {name: config[name] for name in SIZES}
    reading = read_features(model, dictionary, texts, tokenizer=tokenizer, features=features, progress="texts", **sizes)
    folder, console = Path(config.folder), Console()
    reading.save(folder / READING)  # an explainer may take long, or fail
    if config.explainer is not None:
        settings: Any = OmegaConf.to_container(config.settings, resolve=True)
        reading = reading.explain(config.explainer, **settings)
        reading.save(folder / READING)
    write_feature_page(folder / PAGE, reading, title=config.title)
    if export:
        to_neuronpedia(reading, folder / NEURONPEDIA, **export)
    console.print(f"{reading!r}", markup=False)
    console.print(f"page {folder / PAGE}", soft_wrap=True)
    return reading


# ---- errors


def _incomplete_export(missing: list[str]) -> ConfigError:
    return ConfigError(
        "the export to Neuronpedia lacks keys",
        expected=", ".join(f"neuronpedia.{key}=..." for key in EXPORT_KEYS),
        found=f"no {', '.join(missing)}",
        remedy="add them, or leave out neuronpedia",
    )
