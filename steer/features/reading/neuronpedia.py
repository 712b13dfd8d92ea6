"""Export of a reading of features to the files that Neuronpedia imports in bulk.

The schema is that of `utils/neuronpedia-utils/neuronpedia_utils/db_models` in hijohnnylin/neuronpedia at ebb8426 (August 2026; last changed
in April 2026), in the folders of Neuronpedia's own exports:

    <model>/<source>/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
    <model>/<source>/features|activations|explanations/batch-<n>.jsonl.gz
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steer.checks import of_type, whole_number
from steer.errors import ConfigError
from steer.features.reading.card import Example, FeatureCard
from steer.features.reading.reading import FeatureReading
from steer.files import atomic_write
from steer.model.site import Site

PER_BATCH = 1024  # features of a file
HOOKS = {
    "output": "hook_resid_post",
    "input": "hook_resid_pre",
    "mlp.output": "hook_mlp_out",
    "mlp.input": "hook_mlp_in",
    "attn.output": "hook_attn_out",
}


@dataclass(frozen=True)
class _Place:
    """Where a reading belongs at Neuronpedia."""

    model: str
    source_set: str
    layer: int
    creator: str
    created: str

    @property
    def source(self) -> str:
        """Name of the source: layer and set."""
        return f"{self.layer}-{self.source_set}"


def to_neuronpedia(
    reading: FeatureReading,
    folder: str | Path,
    *,
    model: str,
    source_set: str,
    title: str,
    creator: str,
    creator_id: str,
    layer: int | None = None,
    url: str = "",
    repository: str = "",
    created: datetime | None = None,
) -> Path:
    """Writes a reading as Neuronpedia imports it. Returns the folder of the source.

    What Neuronpedia has and a reading does not (neuron alignment, correlated neurons, decoder weights) is written as empty lists.

    Args:
        model: Neuronpedia's name of the model, e.g. `gpt2-small`.
        source_set: short name of the set of dictionaries, e.g. `res-8k`; a source is `<layer>-<source_set>`.
        title: of the release. creator: its author. creator_id: of the author's account at the server that imports.
        layer: of the dictionary; of its first site when None.
        url: about the release. repository: of the weights on the Hugging Face hub.
        created: time that is written; now when None.

    Raises:
        ConfigError: a site without a layer; a name that cannot be one of a folder.

    Example:
        >>> reading = steer.read_features(model, dictionary, texts, tokenizer=tokenizer, features=[3], context=16)
        >>> release = {"title": "SAE of block 12", "creator": "me", "creator_id": "me"}
        >>> steer.features.reading.to_neuronpedia(reading, "upload", model="smollm2-135m", source_set="res-64", **release)
    """
    for what, name in (("model", model), ("source_set", source_set)):
        of_type(name, str, f"`{what}`", "pass a name such as 'res-8k'")
        if not name or any(sign in name for sign in "/\\") or name.startswith("."):
            raise _no_name(what, name)
    site = Site.parse(reading.facts["reads"][0])
    if layer is None and site.layer is None:
        raise _no_layer(site)
    number: Any = site.layer if layer is None else layer
    whole_number(number, "`layer`")
    place = _Place(model, source_set, number, creator_id, (created or datetime.now(UTC)).isoformat())
    root = Path(folder) / model / place.source
    release = f"{source_set}-release"
    _lines(root / "release.jsonl", [_release(place, release, title, creator, url)])
    _lines(root / "model.jsonl", [_model(place)])
    _lines(root / "sourceset.jsonl", [_source_set(place, release, title, creator)])
    _lines(root / "source.jsonl", [_source(place, reading, repository)])
    hook = f"blocks.{number}.{HOOKS.get(_part(site), _part(site))}"
    for batch, start in enumerate(range(0, len(reading), PER_BATCH)):
        cards = [reading[feature] for feature in reading.features[start : start + PER_BATCH]]
        spread = [_logit_histogram(reading, start + i) for i in range(len(cards))]
        name = f"batch-{batch}.jsonl.gz"
        _packed(root / "features" / name, (_feature(place, card, hook, of_card) for card, of_card in zip(cards, spread, strict=True)))
        _packed(root / "activations" / name, (line for card in cards for line in _activations(place, card)))
        if any(card.name for card in cards):
            _packed(root / "explanations" / name, (_explanation(place, card, reading.named_by) for card in cards if card.name))
    return root


def _part(site: Site) -> str:
    return str(site).split(".", 2)[-1] if site.layer is not None else str(site)


def _release(place: _Place, name: str, title: str, creator: str, url: str) -> dict[str, Any]:
    urls = [url] if url else []
    authors = {"creatorName": creator, "creatorNameShort": creator, "creatorId": place.creator, "creatorEmail": None}
    shown = {"visibility": "PUBLIC", "isNewUi": False, "featured": False, "descriptionShort": title, "urls": urls}
    defaults: dict[str, Any] = {"defaultSourceSetName": None, "defaultSourceId": None, "defaultUmapSourceIds": []}
    return {"name": name, "description": title, **authors, **shown, **defaults, "createdAt": place.created}


def _model(place: _Place) -> dict[str, Any]:
    names = {
        "id": place.model,
        "displayNameShort": place.model,
        "displayName": place.model,
        "instruct": place.model.lower().endswith(("-it", "-instruct")),
    }
    facts = {"tlensId": None, "dimension": None, "visibility": "PUBLIC", "inferenceEnabled": False, "layers": 0, "neuronsPerLayer": 0}
    defaults = {"defaultSourceSetName": None, "defaultSourceId": None, "owner": "", "website": None}
    return {**names, **facts, **defaults, "creatorId": place.creator, "createdAt": place.created, "updatedAt": place.created}


def _source_set(place: _Place, release: str, title: str, creator: str) -> dict[str, Any]:
    names = {"modelId": place.model, "name": place.source_set, "creatorId": place.creator, "creatorName": creator, "releaseName": release}
    shown = {"hasDashboards": True, "visibility": "PUBLIC", "description": title, "type": "", "urls": [], "creatorEmail": None}
    pages = {"showDfa": False, "showCorrelated": False, "showHeadAttribution": False, "showUmap": False}
    defaults = {"defaultOfModelId": None, "defaultRange": 1, "defaultShowBreaks": True}
    return {**names, **shown, **pages, **defaults, "createdAt": place.created}


def _source(place: _Place, reading: FeatureReading, repository: str) -> dict[str, Any]:
    names = {"id": place.source, "modelId": place.model, "setName": place.source_set, "creatorId": place.creator}
    lens = {"saelensConfig": None, "saelensRelease": None, "saelensSaeId": None}
    shown = {"hasDashboards": True, "inferenceEnabled": False, "inferenceHosts": [], "visibility": "PUBLIC", "defaultOfModelId": None}
    maps = {"hasUmap": False, "hasUmapLogSparsity": False, "hasUmapClusters": False}
    texts = {"num_prompts": reading.facts["rows"], "num_tokens_in_prompt": reading.facts["context"], "dataset": None}
    notes = f"{reading.facts['tokens']} tokens at {', '.join(reading.facts['reads'])}"
    weights = {"hfRepoId": repository or None, "hfFolderId": None}
    return {**names, **lens, **weights, **shown, **maps, **texts, "notes": notes, "createdAt": place.created}


def _feature(place: _Place, card: FeatureCard, hook: str, spread: tuple[list[float], list[int]]) -> dict[str, Any]:
    edges, counts = card.histogram
    alignment: dict[str, list[Any]] = {f"neuron_alignment_{part}": [] for part in ("indices", "values", "l1")}
    correlated: dict[str, list[Any]] = {
        f"correlated_{what}_{part}": [] for what in ("neurons", "features") for part in ("indices", "pearson", "l1")
    }
    return {
        "modelId": place.model, "layer": place.source, "index": str(card.feature), "sourceSetName": place.source_set,
        "creatorId": place.creator, "createdAt": place.created, "maxActApprox": card.maximum,
        "hasVector": False, "vector": [], "vectorLabel": None, "vectorDefaultSteerStrength": None, "hookName": hook,
        "topkCosSimIndices": [feature for feature, _ in card.nearest], "topkCosSimValues": [cosine for _, cosine in card.nearest],
        **alignment, **correlated,
        "neg_str": [token for token, _ in card.suppressed], "neg_values": [logit for _, logit in card.suppressed],
        "pos_str": [token for token, _ in card.promoted], "pos_values": [logit for _, logit in card.promoted],
        "frac_nonzero": card.density,
        # bars are read in pairs: as many values (middles of bins) as heights
        "freq_hist_data_bar_heights": list(counts), "freq_hist_data_bar_values": _middles(edges),
        "logits_hist_data_bar_heights": spread[1], "logits_hist_data_bar_values": spread[0],
        "decoder_weights_dist": [],
    }  # fmt: skip


def _activations(place: _Place, card: FeatureCard) -> Iterator[dict[str, Any]]:
    top = [example for example in card.examples if example.is_top]
    others = [example for example in card.examples if not example.is_top]
    for examples in (top, others):
        values = [example.maximum for example in examples]
        for number, example in enumerate(examples):
            yield _activation(place, card, example, number, min(values), max(values), len(examples) / len(card.examples))


def _activation(place: _Place, card: FeatureCard, example: Example, number: int, low: float, high: float, share: float) -> dict[str, Any]:
    largest = {"maxValue": example.maximum, "maxValueTokenIndex": example.peak, "qualifyingTokenIndex": example.peak}
    none = dict.fromkeys(("dataSource", "dataIndex", "dfaTargetIndex", "dfaMaxValue", "logitContributions", "zIndices", "zValues"))
    where = {"modelId": place.model, "layer": place.source, "index": str(card.feature), "creatorId": place.creator}
    shown = {"tokens": list(example.tokens), "values": list(example.values), "minValue": min(example.values), **largest}
    bins = {"binMin": low, "binMax": high, "binContains": share}
    return {
        "id": _key(place, card.feature, example.is_top, number, example.tokens),
        **where,
        **shown,
        **bins,
        **none,
        "dfaValues": [],
        "lossValues": [],
        "createdAt": place.created,
    }


def _explanation(place: _Place, card: FeatureCard, named_by: str) -> dict[str, Any]:
    where = {"modelId": place.model, "layer": place.source, "index": str(card.feature)}
    said = {"description": card.name, "authorId": place.creator, "notes": named_by}
    none = dict.fromkeys(("explanationModelName", "typeName", "embedding", "triggeredById"))
    return {"id": _key(place, card.feature, card.name), **where, **said, **none, "createdAt": place.created}


def _key(place: _Place, *what: object) -> str:
    """An id in the form that Neuronpedia's have, the same whenever the same is exported."""
    return f"c{hashlib.sha256(json.dumps([place.model, place.source, *what]).encode()).hexdigest()[:24]}"


def _logit_histogram(reading: FeatureReading, place: int) -> tuple[list[float], list[int]]:
    """Middles and heights of the bars."""
    if "logit_histogram" not in reading.tensors:
        return [], []
    heights = reading.tensors["logit_histogram"][place].tolist()
    low, high = reading.tensors["logit_range"][place].tolist()
    return _middles([low + (high - low) * step / len(heights) for step in range(len(heights) + 1)]), heights


def _middles(edges: Iterable[float]) -> list[float]:
    listed = list(edges)
    return [(low + high) / 2 for low, high in zip(listed, listed[1:], strict=False)]


def _lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _packed(path: Path, records: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    atomic_write(path, gzip.compress(text.encode(), compresslevel=5, mtime=0))


# ---- errors


def _no_name(what: str, name: object) -> ConfigError:
    remedy = "pass a short name of letters, digits and hyphens"
    return ConfigError(f"`{what}` cannot name a folder", expected="a name such as 'res-8k'", found=repr(name), remedy=remedy)


def _no_layer(site: Site) -> ConfigError:
    return ConfigError(
        f"the site '{site}' has no layer, which Neuronpedia asks for", expected="layer=", found="none", remedy="pass layer=0"
    )
