"""Covariance of the keys of running text, by layer: what an edit has to leave alone.

C = E[k k^T], uncentred, over the tokens of ordinary text (Meng et al. 2022, arXiv 2202.05262, section 3.1). Some ten tokens for each neuron
are enough, not the hundred thousand articles of the first papers (FastMEMIT, arXiv 2506.04226).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import whole_number
from steer.edits.edited_map import EditedMap, edited_maps
from steer.edits.factor import Factor
from steer.edits.key_source import check_source, key_source, tokenizer_digest, weights_digests
from steer.edits.key_sums import KeySums, text_rows
from steer.errors import DamagedFileError, EditError, WrongModelError
from steer.files import load_artifact, save_artifact
from steer.model.accumulator import Accumulator
from steer.model.anatomy import Anatomy
from steer.model.capture import capture
from steer.model.devices import without_autocast
from steer.model.embedded import cache_folder
from steer.model.memory import in_halves
from steer.model.site import Site
from steer.model.tokens import Row, rows_hash
from steer.model.watcher import watchers_of
from steer.reading import check_kinds, damage_of, place_of

log = logging.getLogger(__name__)

KIND = "covariance"
PART = "part of a covariance"
TOKENS_PER_NEURON = 12
ROW_TOKENS = 512  # longer texts are cut: attention takes the square of it
PASS_TOKENS = 4096  # padded tokens of a pass; one that does not fit into memory is halved
SAVE_SECONDS = 60.0  # between two saves of a fit that runs


@dataclass(frozen=True, eq=False)
class Covariance:
    """Sums over keys, by layer; those of disjoint texts add up with `+`.

    Attributes:
        sums: [f, f] fp64, sum of k k^T.
        tokens: number of keys in each sum.
        source: where the keys come from: `model`, `weights` by layer, `tokenizer`, and `data`, digests of the texts.

    Example:
        >>> covariance = Covariance.fit(model, tokenizer, texts, layers=[7, 8])
        >>> covariance.factor(8).leverage(read_keys(model, [locate(tokenizer, fact.prompt, fact.subject)], [8])[8])
    """

    sums: dict[int, Tensor]
    tokens: dict[int, int]
    source: dict[str, Any]
    _factors: dict[tuple[int, float], Factor] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> list[int]:
        return sorted(self.sums)

    def __repr__(self) -> str:
        return f"Covariance(layers {', '.join(map(str, self.layers))}: {min(self.tokens.values())} tokens)"

    def facts(self, layers: Sequence[int]) -> dict[str, Any]:
        """What is kept with an edit, JSON-able: `tokens` by layer, and `data`, digests of the texts."""
        return {"tokens": {str(layer): self.tokens[layer] for layer in layers if layer in self.tokens}, "data": self.source["data"]}

    def moment(self, layer: int) -> Tensor:
        """[f, f] fp64: C = E[k k^T] at a layer. Raises EditError for a layer that was not fitted, or one with fewer tokens than f."""
        if layer not in self.sums:
            raise _no_layer(layer, self.layers)
        check_enough(self.tokens[layer], len(self.sums[layer]))
        return self.sums[layer] / self.tokens[layer]

    def factor(self, layer: int, ridge: float = 1e-4) -> Factor:
        """The Cholesky factor of C at a layer, worked out once. Raises as `moment` and `Factor`.

        Args:
            ridge: share of the mean of the diagonal that is added to it.
        """
        if (layer, ridge) not in self._factors:
            self._factors[layer, ridge] = Factor(self.moment(layer), ridge, f"layer {layer}")
        return self._factors[layer, ridge]

    def check(self, model: nn.Module, layers: Sequence[int] | None = None, tokenizer: Any = None) -> None:
        """Looks whether these are the keys of a model as it is now, whatever edits changed in its down projections.

        Args:
            layers: that are needed; all that there are when None.
            tokenizer: looked at too when given.

        Raises:
            WrongModelError: another model, or weights that were trained since. TokenizerError: another tokenizer. EditError: a layer that
                was not fitted.
        """
        anatomy = Anatomy.find(model)
        wanted = self.layers if layers is None else list(layers)
        for layer in wanted:
            if layer not in self.sums:
                raise _no_layer(layer, self.layers)
        check_source(self.source, {"model": anatomy.fingerprint(), "weights": {}}, repr(self))
        for edited in edited_maps(anatomy, wanted):
            if edited.in_width != len(self.sums[edited.layer]):
                raise _other_width(edited, len(self.sums[edited.layer]))
        digests = weights_digests(anatomy, wanted, with_edited=False)
        found: dict[str, Any] = {"model": anatomy.fingerprint(), "weights": {str(layer): digest for layer, digest in digests.items()}}
        if tokenizer is not None:
            found["tokenizer"] = tokenizer_digest(tokenizer)
        check_source(self.source, found, repr(self))

    def __add__(self, other: Covariance) -> Covariance:
        """The covariance of the texts of both. Raises WrongModelError, TokenizerError; EditError: other layers, or the same texts twice."""
        if not isinstance(other, Covariance):
            return NotImplemented
        if self.layers != other.layers:
            raise _other_layers(self, other)
        check_source(self.source, other.source, repr(other))
        if common := set(self.source["data"]) & set(other.source["data"]):
            raise _same_texts(sorted(common))
        return Covariance(
            sums={layer: self.sums[layer] + other.sums[layer] for layer in self.layers},
            tokens={layer: self.tokens[layer] + other.tokens[layer] for layer in self.layers},
            source={**self.source, "data": sorted([*self.source["data"], *other.source["data"]])},
        )

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Writes all layers, see `steer.files.save_artifact`."""
        tensors = {f"layers.{layer}": self.sums[layer] for layer in self.layers}
        return save_artifact(path, KIND, tensors, {"tokens": {str(layer): self.tokens[layer] for layer in self.layers}, **self.source})

    @classmethod
    def load(cls, path: str | Path) -> Covariance:
        """Reads what `save` wrote; `check` says whether it fits a model. Raises DamagedFileError, WrongKindError, FileError."""
        manifest, tensors = load_artifact(path, KIND)
        with damage_of(path, "sums of keys by layer, with the number of tokens of each"):
            check_kinds(manifest, {"tokens": dict, "model": dict, "weights": dict, "tokenizer": str, "data": list})
            sums = {int(name.removeprefix("layers.")): total for name, total in tensors.items()}
            tokens = {int(layer): int(number) for layer, number in manifest.pop("tokens").items()}
            if not sums or sums.keys() != tokens.keys() or any(str(layer) not in manifest["weights"] for layer in sums):
                raise ValueError(f"sums of the layers {sorted(sums)}, numbers of tokens of {sorted(tokens)}")
            if any(total.dim() != 2 or total.shape[0] != total.shape[1] or total.dtype != torch.float64 for total in sums.values()):
                raise ValueError("sums that are no square matrices in double precision")
        return cls(sums, tokens, manifest)

    # ---- fitting

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: Any,
        texts: Sequence[str | Row],
        layers: Sequence[int],
        *,
        max_tokens: int | None = None,
        folder: str | Path | None = None,
        progress: bool = True,
    ) -> Covariance:
        """Sums the keys of texts, for all layers in one pass that stops after the last of them; nothing of the model changes.

        Padding, the first token of each text and tokens like it are left out, see `steer.edits.key_sums.ordinary_tokens`. Each layer is
        kept on disk under a name that changes with the weights, the tokenizer, the texts and the number of tokens, and is read from
        there the next time. A fit that was killed goes on where it last saved, at most a minute before. While something is attached to the
        model, which acts on the keys, nothing is read or kept.

        On several ranks, let each fit its own texts and add the results.

        Args:
            texts: running text, or rows of tokens; some hundred paragraphs.
            layers: blocks whose down projections may be edited.
            max_tokens: texts are read until there are so many; 12 for each neuron when None.
            folder: of the files; `covariance` in the user's cache when None.
            progress: show a bar where there is a terminal.

        Raises:
            EditError: fewer tokens than neurons, no texts, or a layer that cannot be edited. NonFiniteError: a key is NaN or infinite.
            TokenizerError, ConfigError, StorageFullError.
        """
        anatomy = Anatomy.find(model)
        maps = edited_maps(anatomy, layers)
        widest = max(edited.in_width for edited in maps)
        max_tokens = TOKENS_PER_NEURON * widest if max_tokens is None else max_tokens
        whole_number(max_tokens, "`max_tokens`", least=1)
        rows = text_rows(tokenizer, texts, _row_tokens(anatomy), max_tokens)
        check_enough(sum(len(row.ids) - 1 for row in rows), widest)
        wanted = [edited.layer for edited in maps]
        source = {**key_source(anatomy, wanted, tokenizer), "data": [rows_hash(rows)]}
        if watchers_of(model):  # what is attached changes the keys, and no digest knows of it
            found = _fit(model, maps, rows, None, progress)
            return cls({layer: sums.total for layer, sums in found.items()}, {layer: sums.tokens for layer, sums in found.items()}, source)
        place = cache_folder() / "covariance" if folder is None else place_of(folder)
        files = _files(place, anatomy, wanted, source)
        fitted = {layer: covariance for layer, file in files.items() if (covariance := _read(file)) is not None}
        missing = [edited for edited in maps if edited.layer not in fitted]
        if missing:
            key = _digest([file.name for layer, file in files.items() if layer not in fitted])
            part = place / f"part-{key}.safetensors"
            for layer, sums in _fit(model, missing, rows, part, progress).items():
                of_layer = {**source, "weights": {str(layer): source["weights"][str(layer)]}}
                fitted[layer] = cls({layer: sums.total}, {layer: sums.tokens}, of_layer)
                fitted[layer].save(files[layer])
            part.unlink(missing_ok=True)
        return cls({layer: fitted[layer].sums[layer] for layer in wanted}, {layer: fitted[layer].tokens[layer] for layer in wanted}, source)


def check_enough(tokens: int, width: int) -> None:
    """Raises EditError for fewer tokens than neurons, whose covariance leaves directions out of which nothing is known."""
    if tokens < width:
        raise _too_few(tokens, width)


def _row_tokens(anatomy: Anatomy) -> int:
    has_config = any(getattr(module, "config", None) is not None for module in anatomy.chain)
    positions = getattr(anatomy.config, "max_position_embeddings", None) if has_config else None
    return min(ROW_TOKENS, positions) if isinstance(positions, int) else ROW_TOKENS


def _fit(model: nn.Module, maps: Sequence[EditedMap], rows: Sequence[Row], part: Path | None, progress: bool) -> dict[int, KeySums]:
    """Sums over all rows, from where an earlier fit saved its part; None saves none."""
    done, sums = _begun(part, maps)
    by_site: dict[Site, Accumulator] = {edited.key_site: sums[edited.layer] for edited in maps}
    saved = time.monotonic()
    with tqdm(total=len(rows), initial=done, desc="covariance", unit="text", disable=None if progress else True, leave=False) as bar:
        while done < len(rows):
            for chosen, _ in in_halves(_next_rows(rows, done), lambda chosen: _add_keys(model, chosen, by_site, sums.values())):
                done += len(chosen)
                bar.update(len(chosen))
            if part is not None and done < len(rows) and time.monotonic() - saved >= SAVE_SECONDS:
                _save_part(part, done, sums)
                saved = time.monotonic()
    return sums


@without_autocast
def _add_keys(model: nn.Module, rows: Sequence[Row], by_site: dict[Site, Accumulator], sums: Iterable[KeySums]) -> None:
    """Adds the keys of texts to the sums, of all of them or of none."""
    for of_layer in sums:
        of_layer.drop()
    capture(model, rows, by_site, span="all", max_tokens=PASS_TOKENS, share=False)
    for of_layer in sums:
        of_layer.take_in()


def _next_rows(rows: Sequence[Row], start: int) -> Sequence[Row]:
    """As many rows as fit into one pass, one at least."""
    stop, widest = start, 0
    while stop < len(rows):
        widest = max(widest, len(rows[stop].ids))
        if stop > start and widest * (stop + 1 - start) > PASS_TOKENS:
            break
        stop += 1
    return rows[start:stop]


# ---- the cache


def _files(place: Path, anatomy: Anatomy, layers: Sequence[int], source: Mapping[str, Any]) -> dict[int, Path]:
    """One file for each layer; its name changes with what the keys depend on, edited down projections of earlier layers included."""
    weights = weights_digests(anatomy, layers, with_edited=True)
    facts = {name: value for name, value in source.items() if name != "weights"}
    return {layer: place / f"{anatomy.kind}-layer{layer}-{_digest([layer, weights[layer], facts])}.safetensors" for layer in layers}


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _read(file: Path) -> Covariance | None:
    """None where there is no file, or a damaged one, which is made again."""
    if not file.exists():
        return None
    try:
        return Covariance.load(file)
    except DamagedFileError as error:
        log.warning("a covariance is fitted again: %s", error)
        return None


def _save_part(part: Path, done: int, sums: Mapping[int, KeySums]) -> None:
    tensors = {f"layers.{layer}": of_layer.total for layer, of_layer in sums.items()}
    save_artifact(part, PART, tensors, {"done": done, "tokens": {str(layer): of_layer.tokens for layer, of_layer in sums.items()}})


def _begun(part: Path | None, maps: Sequence[EditedMap]) -> tuple[int, dict[int, KeySums]]:
    """How many rows an earlier fit has read, and its sums; nothing where there is none, or its file is damaged."""
    if part is not None and part.exists():
        try:
            manifest, tensors = load_artifact(part, PART)
            with damage_of(part, "the sums of a fit that has begun"):
                begun = {
                    edited.layer: KeySums(edited.in_width, tensors[f"layers.{edited.layer}"], manifest["tokens"][str(edited.layer)])
                    for edited in maps
                }
                return int(manifest["done"]), begun
        except DamagedFileError as error:
            log.warning("a covariance is fitted from the beginning: %s", error)
    return 0, {edited.layer: KeySums(edited.in_width) for edited in maps}


# ---- errors


def _no_layer(layer: int, known: list[int]) -> EditError:
    return EditError(
        f"the covariance lacks layer {layer}",
        expected=f"one of {', '.join(map(str, known))}",
        found=layer,
        remedy=f"fit it with layers={sorted([*known, layer])}",
    )


def _too_few(tokens: int, width: int) -> EditError:
    return EditError(
        "too few tokens for a covariance of keys",
        expected=f"at least {width}, one for each neuron; {TOKENS_PER_NEURON * width} do well",
        found=tokens,
        remedy="give more text, or a larger max_tokens",
    )


def _other_width(edited: EditedMap, width: int) -> WrongModelError:
    return WrongModelError(
        f"the covariance of layer {edited.layer} does not fit '{edited.path}'",
        expected=f"{edited.in_width} neurons",
        found=width,
        remedy="fit it on this model: Covariance.fit(model, tokenizer, texts, layers)",
    )


def _other_layers(one: Covariance, other: Covariance) -> EditError:
    return EditError(
        "covariances of different layers cannot be added",
        expected=f"layers {one.layers} in both",
        found=f"layers {other.layers}",
        remedy="fit both with the same layers",
    )


def _same_texts(digests: list[str]) -> EditError:
    return EditError(
        "two covariances of the same texts cannot be added",
        expected="disjoint texts",
        found=f"the texts {digests[0][:16]} in both",
        remedy="let each rank fit texts of its own",
    )
