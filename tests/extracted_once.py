"""`steer.extract` that reads a direction once per run of the tests: pages that begin with the same texts, model and sites share it.

The same arguments and the same weights give the same directions, so a page that asks for what another one has read already gets that, from
a file, whichever worker read it. A model that something is attached to is read as ever.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from torch import nn

from steer.directions.contrast import ContrastSet
from steer.directions.direction import Directions
from steer.directions.extract import extract
from steer.model.fingerprint import bits_digest


def folder_of_run(factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "extracted"
    folder.mkdir(exist_ok=True)
    return folder


def extracting_once(folder: Path) -> Callable[..., Directions]:
    """`extract`, with its results kept in a folder."""

    def extract_once(model: nn.Module, contrast: ContrastSet, sites: Sequence[Any], **options: Any) -> Directions:
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            return extract(model, contrast, sites, **options)
        place = folder / key_of(model, contrast, sites, options)
        with FileLock(f"{place}.lock"):
            if not place.exists():
                extract(model, contrast, sites, **options).save(place)
            return Directions.load(place)

    return extract_once


def key_of(model: nn.Module, contrast: ContrastSet, sites: Sequence[Any], options: dict[str, Any]) -> str:
    """Of everything that a direction depends on."""
    weights = {name: bits_digest(parameter) for name, parameter in model.named_parameters()}
    texts = (contrast.positive, contrast.negative, contrast.paired, contrast.groups)
    asked = sorted((name, value) for name, value in options.items() if name != "progress")
    return hashlib.sha256(repr((weights, texts, list(map(str, sites)), asked)).encode()).hexdigest()[:24]
