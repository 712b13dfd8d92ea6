"""The dictionary that a learner has come to, and its folder: the dictionary in our format, metrics.json, statistics and a model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from steer.features.architectures.cross_layer_transcoder import CrossLayerTranscoder
from steer.features.architectures.crosscoder import Crosscoder
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.architectures.transcoder import Transcoder
from steer.features.dictionary import Dictionary
from steer.features.encoder import Encoder
from steer.features.provenance import Origin, Source, Untrained
from steer.features.rows import InMemory
from steer.features.training.learner import Layer, Learner
from steer.files import atomic_write
from steer.model.site import Site

METRICS, CARD = "metrics.json", "README.md"


@torch.no_grad()
def dictionary_of(learner: Learner, *, model: str | None = None, notes: Mapping[str, Any] | None = None) -> Dictionary:
    """The dictionary as it is now, for raw activations: the scales of the training are folded in.

    Its `maxima` and `density` are those of the last quarter of the training, None before that.

    Args:
        notes: for its `source`, JSON-able.
    """
    dictionary = _dictionary(learner, model, notes)
    if int(learner.tokens_counted):
        layers = cast(list[Layer], list(learner.layers))
        dictionary.maxima = torch.cat([layer.largest for layer in layers]).cpu()
        dictionary.density = learner.density().float().cpu()
    return dictionary


def _dictionary(learner: Learner, model: str | None, notes: Mapping[str, Any] | None) -> Dictionary:
    config, scale = learner.config, learner.calibration.scale
    limit = learner.max_norm if math.isfinite(learner.max_norm) else None
    told: dict[str, Any] = {"training": config.described(), **(notes or {})}
    if learner.max_norm_written is not None and math.isfinite(learner.max_norm_written):
        told["max_norm_written"] = learner.max_norm_written
    untrained = Untrained(learner.calibration.first, limit)
    origin = Origin(learner.reads, learner.writes, Source(model=model, folded=("mean norm",), notes=told), untrained)
    bias = _unscaled(learner, learner.bias, learner.writes)
    if config.architecture == "cross_layer_transcoder":
        encoders, decoders = [], []
        for place, layer in enumerate(learner.layers):
            assert isinstance(layer, Layer)
            writes = learner.writes[place:]
            encoders.append(_encoder(layer, layer.encoder * scale[learner.reads[place]], None))
            decoders.append(InMemory(_by_site(_unscaled(learner, layer.decoder, writes), writes)))
        targets = [list(range(place, len(learner.writes))) for place in range(len(learner.reads))]
        return CrossLayerTranscoder(encoders, decoders, targets, _by_site(bias, learner.writes), origin)
    (layer,) = learner.layers
    assert isinstance(layer, Layer)
    rows = torch.cat(
        [part * scale[site] for part, site in zip(_split(learner, layer.encoder, learner.reads), learner.reads, strict=True)], -1
    )
    decoder = _unscaled(learner, layer.decoder, learner.writes)
    if config.architecture == "crosscoder":
        encoder = _encoder(layer, _by_site(rows, learner.reads), None)
        return Crosscoder(encoder, InMemory(_by_site(decoder, learner.writes)), _by_site(bias, learner.writes), origin)
    if config.architecture == "transcoder":
        skip = None if learner.skip is None else learner.skip * (scale[learner.reads[0]] / scale[learner.writes[0]])
        return Transcoder(_encoder(layer, rows, None), InMemory(decoder), bias, origin, skip)
    return SparseAutoencoder(_encoder(layer, rows, bias), InMemory(decoder), bias, origin, config.prefixes)


def _encoder(layer: Layer, rows: Tensor, shift: Tensor | None) -> Encoder:
    bias = None if layer.bias is None else layer.bias.detach().cpu().clone()
    return Encoder(InMemory(rows.cpu()), bias, layer.sparsifier.activation(), shift=shift)


def _split(learner: Learner, tensor: Tensor, sites: Sequence[Site]) -> tuple[Tensor, ...]:
    return tensor.split([len(learner.calibration.mean[site]) for site in sites], -1)


def _unscaled(learner: Learner, tensor: Tensor, sites: Sequence[Site]) -> Tensor:
    """[..., sites side by side] in the units of the model."""
    parts = [part / learner.calibration.scale[site] for part, site in zip(_split(learner, tensor, sites), sites, strict=True)]
    return torch.cat(parts, -1).detach().cpu()


def _by_site(tensor: Tensor, sites: Sequence[Site]) -> Tensor:
    """[..., sites * width] -> [..., sites, width]"""
    return tensor.unflatten(-1, (len(sites), -1))


def save(learner: Learner, folder: Path, metrics: Mapping[str, Any], *, model: str | None, training: Mapping[str, Any], dtype: str) -> Path:
    """Writes the folder of a dictionary: what `steer.load_dictionary` reads, metrics.json and README.md.

    Raises:
        StorageFullError, WrongKindError: as `Dictionary.save`.
    """
    metrics = defined(metrics)
    notes = {**training, "metrics": metrics}
    for name in (METRICS, CARD):  # of an earlier save: a folder with other things than a dictionary is not replaced
        (folder / name).unlink(missing_ok=True)
    dictionary = dictionary_of(learner, model=model, notes=notes)
    dictionary.save(folder, dtype=dtype)
    atomic_write(folder / CARD, card(dictionary, learner, metrics, training))
    atomic_write(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    return folder


def defined(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures with None for NaN, which no JSON file has: no share of the loss is recovered where ablation costs nothing."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in figures.items()}


def card(dictionary: Dictionary, learner: Learner, metrics: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """The model card, as Markdown."""
    config, untrained = learner.config, dictionary.untrained
    sites = ", ".join(f"`{site}`" for site in dictionary.reads)
    to = "" if dictionary.reads == dictionary.writes else f", written to {', '.join(f'`{site}`' for site in dictionary.writes)}"
    longest = "no limit of length" if untrained.max_norm is None else f"tokens with a norm above {untrained.max_norm:.4g}"
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items() if isinstance(value, int | float))
    told = "\n".join(f"- {name}: {value}" for name, value in training.items() if not isinstance(value, dict | list))
    return f"""# {config.name}

A {config.architecture.replace("_", " ")} ({config.sparsifier}) with {dictionary.width} features of `{dictionary.source.model}`,
at {sites}{to}.

    import steer
    dictionary = steer.load_dictionary("<this folder>")

Left out of the training, and of encoding: the first {untrained.first} token(s) of a text; {longest}.

## On held-out text

| figure | value |
| --- | --- |
{rows}

`ce_recovered` is 0 where the activations are replaced by their mean and 1 where they are left as they are.

## Training

{told}
"""
