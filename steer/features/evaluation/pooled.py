"""Pooled texts: mean activation and mean features of each of some texts, which probes are fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steer.features.dictionary import Dictionary
from steer.features.encoding import encode_texts
from steer.model.accumulator import TextAccumulator, pool
from steer.model.capture import capture
from steer.model.site import Site
from steer.model.tokens import Row


@dataclass(frozen=True, eq=False)
class PooledTexts:
    """Means over the response tokens of texts. h: [texts, width], sites side by side. f: [texts, features]. Both fp32.

    Example:
        >>> pooled = steer.features.evaluation.pooled_texts(model, dictionary, neutral)
        >>> pooled.f.argmax(1)  # of each text the feature that is largest on average
    """

    h: Tensor
    f: Tensor


def pooled_texts(
    model: nn.Module, dictionary: Dictionary, rows: Sequence[Row], *, max_tokens: int = 4096, progress: str | None = None
) -> PooledTexts:
    """Reads texts twice: their activations, and their features, which count as 0 at tokens that the dictionary was not trained on.

    Args:
        rows: the texts, read at their responses.

    Raises:
        SiteError, WidthError: a model that the dictionary does not fit. NonFiniteError. ConfigError: no texts.

    Example:
        >>> pooled = steer.features.evaluation.pooled_texts(model, dictionary, neutral)
        >>> pooled.h.shape, pooled.f.shape  # [texts, width], [texts, features]
    """
    means = {site: _Means(len(rows)) for site in dictionary.reads}
    accumulators: dict[Site, TextAccumulator] = dict(means)
    capture(model, rows, accumulators, span="response", max_tokens=max_tokens, progress=progress)  # type: ignore[arg-type]
    f = torch.zeros(len(rows), dictionary.width)
    prompts = torch.tensor([row.prompt for row in rows])

    def take(part: Tensor, text: Tensor, position: Tensor) -> None:
        f.index_add_(0, text, part * (position >= prompts[text])[:, None])

    encode_texts(model, dictionary, rows, take, max_tokens=max_tokens, progress=progress)
    sizes = torch.tensor([row.response for row in rows])
    return PooledTexts(torch.cat([means[site].values for site in dictionary.reads], 1), f / sizes[:, None])


class _Means(TextAccumulator):
    """Mean activation of each text. values: [texts, width]."""

    def __init__(self, texts: int) -> None:
        self.texts = texts
        self.values = torch.empty(0)

    def reduce(self, h: Tensor, weight: Tensor) -> Tensor:
        return pool(h, weight)

    def add(self, values: Tensor, rows: Tensor) -> None:
        if not len(self.values):
            self.values = torch.zeros(self.texts, values.shape[1])
        self.values[rows] = values.float()
