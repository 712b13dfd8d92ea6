"""steer.bias.measure: one call from a model and the name of a bias data set to a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from steer.bias.dataset import DATASETS, load
from steer.bias.factual import FactualGender, factual_gender_of
from steer.bias.items import BiasData
from steer.bias.scoring import Scorer
from steer.bias.table import ALL, BiasTable
from steer.checks import of_type
from steer.errors import ConfigError


def measure(
    model: nn.Module,
    data: str | BiasData,
    tokenizer: Any = None,
    *,
    path: str | Path | None = None,
    source: str | None = None,
    sample: int | None = None,
    seed: int = 0,
    factual: FactualGender | None = None,
    max_tokens: int = 1024,
    progress: bool = True,
    **options: Any,
) -> BiasTable:
    """Measures bias, and beside it what the model knows of factual gender.

    Args:
        model: a causal language model. A plan that is attached stays in force, in the factual columns too.
        data: the name of a data set, or what `steer.bias.load` gave.
        tokenizer: None for the one that came with the model.
        path, source: of a data set given by its name, as for `steer.bias.load`.
        sample: items by chance; None for all. seed: of this chance, and of permutations and generation.
        factual: measured before on this model, plan included; None to measure it.
        max_tokens: padded tokens per batch.
        progress: a bar where the output is a terminal.
        **options: of the metric, such as `scoring="mean"`.

    Raises:
        ConfigError: an unknown data set or option, a source of data that were loaded, or a group called `all`. TokenizerError,
            NonFiniteError; what `steer.bias.load` raises.

    Example:
        >>> known = steer.bias.factual_gender(model, tokenizer)
        >>> table = steer.bias.measure(model, "crows_pairs", path="crows_pairs_anonymized.csv", factual=known)
        >>> table["all"]
    """
    of_type(data, (str, BiasData), "the data of a bias measurement", f"pass one of {', '.join(DATASETS)}, or what steer.bias.load gave")
    of_type(model, nn.Module, "the model of a bias measurement", "pass the first of what steer.load returns")
    of_type(factual, (FactualGender, type(None)), "what is known of factual gender", "pass what steer.bias.factual_gender gave, or None")
    if isinstance(data, BiasData) and (path is not None or source is not None):
        raise _loaded_already(data, path or source)
    items = load(data, path=path, source=source) if isinstance(data, str) else data
    if ALL in items.groups:
        raise _group_of_all(items)
    if sample is not None:
        items = items.sample(sample, seed)
    dataset = DATASETS.get(items.name)
    scorer = Scorer(model, tokenizer, max_tokens=max_tokens, progress=progress, seed=seed)
    found = dataset.measure(items.items, scorer, **options)
    factual = factual_gender_of(scorer) if factual is None else factual
    facts = {"source": items.source, "items": len(items), "seed": seed, "model": type(model).__name__}
    facts |= {name: value if isinstance(value, str | int | float | bool | None) else str(value) for name, value in options.items()}
    return BiasTable(items.name, found.columns, found.rows, factual, facts, (*items.notes, *found.notes))


# ---- errors


def _loaded_already(data: BiasData, source: object) -> ConfigError:
    return ConfigError("the data of a bias measurement come from two places", expected="loaded data, or a name and path= or source=",
                       found=f"{data!r}, and {source}", remedy=f"pass '{data.name}', or leave path and source out")  # fmt: skip


def _group_of_all(data: BiasData) -> ConfigError:
    return ConfigError(f"a group of these data has the name of the row of all items, '{ALL}'", expected="groups of other names",
                       found=", ".join(data.groups[:8]), remedy=f"rename it in the file of {data.source}")  # fmt: skip
