"""Keys: what down projections take at the last token of a subject, for all layers in one pass that stops after the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.edits.contexts import Contexts
from steer.edits.edited_map import edited_maps
from steer.edits.fact import Fact
from steer.edits.locate import Located
from steer.model.accumulator import Accumulator, TextAccumulator, pool
from steer.model.anatomy import Anatomy
from steer.model.capture import batches, capture
from steer.model.devices import without_autocast
from steer.model.memory import in_halves
from steer.model.site import Site
from steer.model.tokens import Row


@dataclass(frozen=True, eq=False)
class FactKeys:
    """Keys of n facts at one layer, on the CPU in fp32.

    Attributes:
        layer: of the map.
        plain: [n, f] in the plain prompt.
        prefixed: [n, f] mean over the contexts; `plain` where there are none.
        combined: [m, f] as the weighting has it: one key of each fact, or with `both` two of those that have two.
        of: [m] the fact that each row of `combined` belongs to, ascending.
        outputs: [m, d] what the map itself gives for the same texts, combined alike: W k, and the bias where there is one; None unless
            they were asked for.

    Example:
        >>> keys = fact_keys(model, tokenizer, facts, contexts, [8], outputs=True)[8]
        >>> keys.plain.shape, keys.outputs.shape  # [n, f], [m, d]
    """

    layer: int
    plain: Tensor
    prefixed: Tensor
    combined: Tensor
    of: Tensor
    outputs: Tensor | None

    def __repr__(self) -> str:
        return f"FactKeys(layer {self.layer}: {len(self.combined)} keys of {len(self.plain)} facts, width {self.plain.shape[1]})"


class _AtToken(TextAccumulator):
    """Keeps one activation of each text. values: [texts, width] fp32 on the CPU."""

    def __init__(self, texts: int) -> None:
        self.texts = texts
        self.values = torch.empty(0)

    def reduce(self, h: Tensor, weight: Tensor) -> Tensor:
        return pool(h, weight)  # of one token

    def add(self, values: Tensor, rows: Tensor) -> None:
        if not len(self.values):
            self.values = torch.empty(self.texts, values.shape[1])
        self.values[rows] = values.float()  # trainers may wrap the forward of a model in autocast


@without_autocast
def read_at(model: nn.Module, located: Sequence[Located], sites: Sequence[Site], *, max_tokens: int = 4096) -> dict[Site, Tensor]:
    """[n, width] fp32 activations on the CPU, by site, at the last token of the subject of each text.

    Nothing behind that token is run, and no layer behind the last site. Texts are padded on their right; what is attached to the model
    stays in force, and its training mode is put back.

    Args:
        located: texts and places, see `steer.edits.locate.locate`.
        max_tokens: padded tokens of a batch; one that does not fit into memory is halved.
        sites: where activations are read.

    Raises:
        SiteError, NonFiniteError. ConfigError: no texts, or tokens that the model does not know.

    Example:
        >>> located = [locate(tokenizer, fact.prompt, fact.subject)]
        >>> site = steer.Site.parse("layers.8.output")
        >>> read_at(model, located, [site])[site].shape  # [n, width]
    """
    rows = [Row(text.ids[: text.last + 1], text.last + 1) for text in located]
    read: list[dict[Site, Tensor]] = []
    order: list[int] = []
    for chosen in [*batches(rows, max_tokens)] or [[]]:  # capture says that there are none
        for part, values in in_halves(chosen, lambda part: _captured(model, [rows[i] for i in part], sites, max_tokens)):
            order += part
            read.append(values)
    places = torch.tensor(order).argsort()
    return {site: torch.cat([values[site] for values in read])[places] for site in sites}


def _captured(model: nn.Module, rows: Sequence[Row], sites: Sequence[Site], max_tokens: int) -> dict[Site, Tensor]:
    """[texts, width] activations at the last token of each text."""
    kept = {site: _AtToken(len(rows)) for site in sites}
    accumulators: dict[Site, Accumulator] = dict(kept)
    capture(model, rows, accumulators, span="last", max_tokens=max_tokens, share=False)
    return {site: keep.values for site, keep in kept.items()}


def read_keys(model: nn.Module, located: Sequence[Located], layers: Sequence[int], *, max_tokens: int = 4096) -> dict[int, Tensor]:
    """[n, f] fp32 keys on the CPU, by layer: what the down projection takes at the last token of the subject of each text.

    Under PEFT it is what the base layer takes. Raises EditError for a layer without a single down projection, and as `read_at`.

    Args:
        located: as of `read_at`. layers: of the maps.

    Example:
        >>> read_keys(model, [locate(tokenizer, fact.prompt, fact.subject)], [8])[8].shape  # [n, f]
    """
    sites = {edited.layer: edited.key_site for edited in edited_maps(Anatomy.find(model), layers)}
    read = read_at(model, located, list(sites.values()), max_tokens=max_tokens)
    return {layer: read[site] for layer, site in sites.items()}


@without_autocast
def fact_keys(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    contexts: Contexts,
    layers: Sequence[int],
    weighting: str = "plain_half",
    *,
    outputs: bool = False,
    max_tokens: int = 4096,
) -> dict[int, FactKeys]:
    """Keys of facts, by layer, read in all their contexts in one pass.

    A subject that is the first token of its plain prompt is read behind the contexts alone, whatever the weighting, because a key there
    is nearly the same for all subjects.

    Args:
        weighting: how the texts of a fact make up its key, see `steer.edits.contexts.WEIGHTINGS`.
        outputs: read what the maps give, too.
        max_tokens: padded tokens of a batch.
        layers: of the maps whose keys are read.

    Raises:
        SubjectNotFoundError, EditError, TokenizerError, NonFiniteError, ConfigError.

    Example:
        >>> keys = fact_keys(model, tokenizer, facts, contexts, [4, 5, 6, 7, 8])
        >>> keys[8].combined.shape  # [m, f]
    """
    maps = edited_maps(Anatomy.find(model), layers)
    sites = [site for edited in maps for site in (edited.key_site, edited.value_site)[: 2 if outputs else 1]]
    read = read_texts(model, tokenizer, facts, contexts, sites, weighting, max_tokens=max_tokens)
    return {
        edited.layer: FactKeys(
            layer=edited.layer,
            plain=(texts := read.values[edited.key_site])[:, 0],
            prefixed=(texts[:, 1:] if contexts.prefixes else texts).mean(1),
            combined=read.combined(edited.key_site),
            of=read.of,
            outputs=read.combined(edited.value_site) if outputs else None,
        )
        for edited in maps
    }


@dataclass(frozen=True, eq=False)
class ReadTexts:
    """Activations at the last token of the subject of n facts, in all their texts.

    Attributes:
        values: by site [n, texts, width] fp32 on the CPU.
        weights: for each fact [keys, texts], see `Contexts.weights`.
        of: [m] the fact of each row of `combined`, ascending.
    """

    values: dict[Site, Tensor]
    weights: list[Tensor]
    of: Tensor

    def combined(self, site: Site) -> Tensor:
        """[m, width] means over the texts of a fact by its weights."""
        return torch.cat([rows @ values for rows, values in zip(self.weights, self.values[site], strict=True)])


@without_autocast
def read_texts(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    contexts: Contexts,
    sites: Sequence[Site],
    weighting: str = "plain_half",
    *,
    max_tokens: int = 4096,
) -> ReadTexts:
    """Reads some sites at the subjects of facts in all their contexts, in one pass; arguments and errors as of `fact_keys`."""
    located = [contexts.locate(tokenizer, fact) for fact in facts]
    weights = [contexts.weights(weighting, plain=not texts[0].at_start) for texts in located]
    of = torch.tensor([fact for fact, rows in enumerate(weights) for _ in rows])
    read = read_at(model, [text for texts in located for text in texts], sites, max_tokens=max_tokens)
    return ReadTexts({site: values.unflatten(0, (len(facts), len(contexts))) for site, values in read.items()}, weights, of)
