"""`steer features evaluate`: figures of a dictionary, on text and on labelled texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from steer.commands.ab import quieten_libraries
from steer.commands.config import dtype_named
from steer.commands.features_texts import labelled_texts, texts_by_class
from steer.errors import ConfigError
from steer.features.evaluation import Perturbation, SparseProbe, reconstruction, sparse_probing, targeted_perturbation
from steer.features.load import load_dictionary
from steer.features.training import read_texts, token_rows
from steer.features.training.finished import defined
from steer.files import atomic_write
from steer.model.load import load

METRICS = "metrics.json"


def run(config: DictConfig) -> dict[str, Any]:
    """Measures what there is text for, prints it, and writes metrics.json."""
    quieten_libraries()
    if config.data is None and not config.labelled and config.classes is None:
        raise _nothing_to_measure()
    dictionary = load_dictionary(config.dictionary.path, config.dictionary.folder, layer=config.dictionary.layer)
    model, tokenizer = load(config.model.name, dtype=dtype_named(config.model.dtype))
    # files are read before the model runs for minutes
    tasks = {str(name): labelled_texts(tokenizer, path) for name, path in config.labelled.items()}
    classes = None if config.classes is None else texts_by_class(config.classes)
    console, metrics = Console(), dict[str, Any]()
    if config.data is not None:
        texts = read_texts(str(config.data), split=config.text.split, field=config.text.field, subset=config.text.subset)
        rows = token_rows(tokenizer, texts, context=config.context, seed=config.seed, max_tokens=config.max_tokens)
        kept = reconstruction(model, dictionary, rows)
        metrics["reconstruction"] = defined(kept)
        console.print(_figures(kept))
    if tasks:
        probes = sparse_probing(model, dictionary, tasks, k=list(config.k), holdout=config.holdout, seed=config.seed, progress="texts")
        metrics["sparse_probing"] = {name: probe.described() for name, probe in probes.items()}
        console.print(_probes(probes))
    if classes is not None:
        options = {"counts": list(config.ablated), "holdout": config.holdout, "seed": config.seed, "progress": "texts"}
        perturbation = targeted_perturbation(model, dictionary, classes, tokenizer=tokenizer, **options)
        metrics["targeted_perturbation"] = perturbation.described()
        console.print(_perturbation(perturbation))
    atomic_write(Path(config.folder) / METRICS, json.dumps(metrics, indent=2) + "\n")
    console.print(f"figures in {Path(config.folder) / METRICS}", soft_wrap=True)
    return metrics


def _figures(figures: dict[str, float]) -> Table:
    table = Table("figure", "value", title="reconstruction")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    return table


def _probes(probes: dict[str, SparseProbe]) -> Table:
    counts = list(next(iter(probes.values())).accuracy)
    table = Table(
        "task", *(f"{k} feature{'s' * (k > 1)}" for k in counts), "dense", "random labels", "majority", title="accuracy of probes"
    )
    for name, probe in probes.items():
        table.add_row(name, *(f"{value:.3f}" for value in (*probe.accuracy.values(), probe.dense, probe.random_labels, probe.majority)))
    return table


def _perturbation(perturbation: Perturbation) -> Table:
    table = Table("features ablated", "score", "own class", "other classes", "random features", title="targeted perturbation")
    for count in perturbation.score:
        values = (getattr(perturbation, name)[count] for name in ("score", "intended", "unintended", "random"))
        table.add_row(str(count), *(f"{value:.3f}" for value in values))
    return table


# ---- errors


def _nothing_to_measure() -> ConfigError:
    return ConfigError(
        "'steer features evaluate' has nothing to measure on",
        expected="data=, labelled.<name>= or classes=",
        found="none of them",
        remedy="'steer features evaluate --help' says what each is for",
    )
