"""read_features: what the features of a dictionary are, from one pass over texts and from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import of_type, whole_number
from steer.errors import WidthError
from steer.features.dictionary import Dictionary
from steer.features.encoder import chosen
from steer.features.encoding import encode_texts
from steer.features.logit_weights import logit_weights
from steer.features.reading.examples import Examples
from steer.features.reading.reading import FeatureReading
from steer.features.search.firing import FiringCounts
from steer.features.search.texts import MarkedTexts
from steer.model.anatomy import Anatomy
from steer.model.tokens import Row

TILE = 2**24  # cosines at a time


def read_features(
    model: nn.Module,
    dictionary: Dictionary,
    texts: Iterable[str],
    *,
    tokenizer: Any,
    features: Tensor | list[int] | None = None,
    top: int = 10,
    spread: int = 5,
    before: int = 20,
    after: int = 8,
    tokens: int = 10,
    nearest: int = 5,
    bins: int = 40,
    context: int = 128,
    max_tokens: int = 200_000,
    seed: int = 0,
    progress: str | None = None,
) -> FeatureReading:
    """Reads features: density, maximum, histogram, examples in context, logit weights, nearest features.

    Texts stream by once; memory grows with the number of features and not with the text. An example is a row of tokens, shown around the
    token where the feature is largest.

    Args:
        features: [chosen] indices of some; all when None.
        top: examples with the largest values. spread: further ones, at even quantiles of a fair sample of the rows in which it is on.
        before, after: tokens shown around the largest.
        tokens: of the vocabulary that are promoted and suppressed most. nearest: features with the most similar decoder rows.
        bins: of the histograms.
        context: tokens of a row. max_tokens: texts are read until there are so many.
        seed: of the sample.
        progress: label of the progress bar, None for none.

    Raises:
        ConfigError, WidthError, SiteError: what does not fit. TokenizerError: no text, or a slow tokenizer.

    Example:
        >>> reading = steer.read_features(model, dictionary, texts, tokenizer=tokenizer, features=[3, 40], context=16)
        >>> reading[3].density, [example.text() for example in reading[3].examples]
    """
    of_type(dictionary, Dictionary, "the dictionary", "load one with steer.load_dictionary")
    sizes = (("top", top, 0), ("spread", spread, 0), ("before", before, 0), ("after", after, 0), ("tokens", tokens, 1))
    for name, value, least in (*sizes, ("nearest", nearest, 0), ("bins", bins, 1)):
        whole_number(value, f"`{name}` of a reading of features", least=least)
    wanted = torch.arange(dictionary.width) if features is None else chosen(features, dictionary.width)
    rows = MarkedTexts.read(tokenizer, texts, {}, context=context, max_tokens=max_tokens).rows
    counts = FiringCounts(len(wanted), 0)
    examples = Examples(len(wanted), top=top, sample=4 * spread, before=before, after=after, seed=seed)

    def take(f: Tensor, text: Tensor, position: Tensor) -> None:
        counts.add(f, torch.empty(len(f), 0, dtype=torch.bool))
        examples.add(f, text, position)

    encode_texts(model, dictionary, rows, take, features=None if features is None else wanted, progress=progress)
    tensors = {"features": wanted, **counts.summary(), "histogram": counts.histogram(bins)}
    tensors |= _examples(examples, rows, spread)
    tensors |= _logits(model, dictionary, wanted, tokens, bins)
    tensors |= _nearest(dictionary, wanted, min(nearest, dictionary.width - 1))
    facts = {
        "width": dictionary.width,
        "reads": [str(site) for site in dictionary.reads],
        "writes": [str(site) for site in dictionary.writes],
        "dictionary": dictionary.source.place,
        "source": dictionary.source.format,
        "trained_on": dictionary.source.model,
        "model": Anatomy.find(model).fingerprint(),
        "tokens": int(counts.total[0]),
        "rows": len(rows),
        "context": context,
        "before": before,
    }
    return FeatureReading(tensors, _pieces(tokenizer, tensors), facts)


def _examples(examples: Examples, rows: Sequence[Row], spread: int) -> dict[str, Tensor]:
    """The largest examples, and of the sample those at even quantiles of its values: tokens, values and peak of each, by kind."""
    kinds = {"top": (examples.top, torch.arange(examples.top.text.shape[1]).expand_as(examples.top.text))}
    kinds["spread"] = (examples.sample, _even(examples.sample.value, examples.sample.text, examples.top.text, spread))
    found = {}
    for kind, (kept, order) in kinds.items():
        there = order >= 0
        place = order.clamp_min(0)
        text = kept.text.gather(1, place).masked_fill(~there, -1)  # [features, count]
        peak = kept.peak.gather(1, place)
        values = kept.windows.gather(1, place[..., None].expand(-1, -1, kept.windows.shape[-1]))
        found[f"{kind}_text"], found[f"{kind}_value"] = text, kept.value.gather(1, place).masked_fill(text < 0, 0)
        found[f"{kind}_values"] = values * (text >= 0)[..., None]
        found[f"{kind}_tokens"] = _windows(rows, text, peak, examples.before, kept.windows.shape[-1])
    return found


def _even(values: Tensor, texts: Tensor, shown: Tensor, count: int) -> Tensor:
    """[features, count] places in a sample, from large values to small ones at even quantiles; -1 where there are too few. Texts that are
    shown already are passed over."""
    if not count:
        return torch.empty(len(values), 0, dtype=torch.long)
    new = (texts >= 0) & ~(texts[:, :, None] == shown[:, None, :]).any(-1)  # [features, sample]
    order = values.masked_fill(~new, -torch.inf).argsort(1, descending=True)
    there = new.sum(1, keepdim=True)  # [features, 1]
    step = torch.arange(count).expand(len(values), -1)
    place = torch.where(there > count, (step + 0.5) / count * there, step.double()).long()
    return torch.where(place < there, order.gather(1, place.clamp_max(order.shape[1] - 1)), -1)


def _windows(rows: Sequence[Row], text: Tensor, peak: Tensor, before: int, window: int) -> Tensor:
    """[features, count, window] int32 tokens around peaks, -1 beyond the ends."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    starts = lengths.cumsum(0) - lengths
    ids = torch.tensor([token for row in rows for token in row.ids], dtype=torch.int32)
    around = peak[..., None] - before + torch.arange(window)
    of = text.clamp_min(0)[..., None]
    inside = (text >= 0)[..., None] & (around >= 0) & (around < lengths[of])
    return torch.where(inside, ids[(starts[of] + around).clamp(0, len(ids) - 1)], -1)


def _logits(model: nn.Module, dictionary: Dictionary, features: Tensor, tokens: int, bins: int) -> dict[str, Tensor]:
    """Tokens that are promoted and suppressed most, and how the logits of all tokens are spread; nothing off the residual stream."""
    parts: dict[str, list[Tensor]] = {}
    try:
        for _, logits in logit_weights(model, dictionary, features):
            count = min(tokens, logits.shape[1])
            for kind, largest in (("promoted", True), ("suppressed", False)):
                best = logits.topk(count, 1, largest=largest)
                parts.setdefault(f"{kind}_ids", []).append(best.indices.int())
                parts.setdefault(f"{kind}_logits", []).append(best.values)
            low, high = logits.aminmax(dim=1, keepdim=True)
            place = ((logits - low) / (high - low).clamp_min(1e-12) * bins).long().clamp_max(bins - 1)
            spread = torch.zeros(len(logits), bins, dtype=torch.long).scatter_add_(1, place, torch.ones_like(place))
            parts.setdefault("logit_histogram", []).append(spread)
            parts.setdefault("logit_range", []).append(torch.cat([low, high], 1))
    except WidthError:
        return {}
    return {name: torch.cat(pieces) for name, pieces in parts.items()}


def _nearest(dictionary: Dictionary, features: Tensor, count: int) -> dict[str, Tensor]:
    """[features, count] features of the dictionary whose decoder rows are most alike, and the cosines."""
    best = torch.full((len(features), count), -torch.inf)
    index = torch.zeros(len(features), count, dtype=torch.long)
    if not count:
        return {"nearest": index, "cosines": best}
    own = nn.functional.normalize(dictionary.decoder_rows(features).flatten(1), dim=1)
    for part in torch.arange(dictionary.width).split(max(1, TILE // max(len(features), 1))):
        cosines = own @ nn.functional.normalize(dictionary.decoder_rows(part).flatten(1), dim=1).T  # [features, part]
        cosines[features[:, None] == part] = -torch.inf
        both = torch.cat([best, cosines], 1).topk(count, 1)
        index = torch.cat([index, part.expand(len(features), -1)], 1).gather(1, both.indices)
        best = both.values
    return {"nearest": index, "cosines": best}


def _pieces(tokenizer: Any, tensors: dict[str, Tensor]) -> dict[int, str]:
    """Every token that is shown, as text."""
    names = [name for name in tensors if name.endswith(("_tokens", "_ids"))]
    ids = torch.cat([tensors[name].flatten() for name in names]).unique()
    return {token: tokenizer.decode([token]) for token in ids.tolist() if token >= 0}
