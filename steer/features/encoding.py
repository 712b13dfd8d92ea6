"""Features of texts, streamed: the activations of a model at the sites of a dictionary, encoded a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from steer.features.dictionary import Dictionary
from steer.features.encoder import TILE, chosen
from steer.model.accumulator import Accumulator
from steer.model.capture import capture
from steer.model.site import Site
from steer.model.tokens import Row

Take = Callable[[Tensor, Tensor, Tensor], None]  # of [n, chosen] features, [n] indices of the texts, [n] positions in them


def encode_texts(
    model: nn.Module,
    dictionary: Dictionary,
    rows: Sequence[Row],
    take: Take,
    *,
    features: Tensor | list[int] | None = None,
    max_tokens: int = 4096,
    progress: str | None = None,
) -> None:
    """Runs texts and hands the features of their tokens to a function, piece by piece; nothing else is kept.

    Tokens that the dictionary was not trained on are left out.

    Args:
        model: anything `Plan.attach` takes.
        rows: the texts, whole: positions are counted from their first token.
        take: called as take(f, texts, positions) with [n, chosen] features fp32 on the CPU, of [n] texts and positions; the tokens of a
            text come together, in their order.
        features: chosen ones; all when None.
        max_tokens: of a pass.
        progress: label of the progress bar, None for none.

    Raises:
        SiteError, WidthError: a model that the dictionary does not fit. NonFiniteError. ConfigError: no texts.
    """
    wanted = None if features is None else chosen(features, dictionary.width)
    batch = _Batch(dictionary, wanted, take)
    accumulators: dict[Site, Accumulator] = {site: _AtSite(batch, site) for site in dictionary.reads}
    capture(model, rows, accumulators, span="all", max_tokens=max_tokens, share=False, progress=progress)


class _Batch:
    """One batch of texts, encoded as soon as every site was read."""

    def __init__(self, dictionary: Dictionary, features: Tensor | None, take: Take) -> None:
        self.dictionary, self.features, self.take = dictionary, features, take
        self.tokens = max(1, TILE // dictionary.width)  # that are encoded at a time
        self.read: dict[Site, Tensor] = {}

    @torch.no_grad()
    def add(self, site: Site, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        sites = self.dictionary.reads
        self.read[site] = h.detach().clone() if len(sites) > 1 else h
        if len(self.read) < len(sites):
            return
        h = h if len(sites) == 1 else torch.stack([self.read[site] for site in sites], -2)  # [batch, tokens, (sites,) width]
        self.read = {}
        positions = torch.arange(h.shape[1], device=h.device).expand(weight.shape)
        kept = weight > 0
        inside = self.dictionary.untrained.trained_on(h, positions if len(sites) == 1 else positions.unsqueeze(-1))
        if inside is not None:
            kept = kept & (inside if len(sites) == 1 else inside.all(-1))
        text = rows.to(h.device)[:, None].expand(weight.shape)[kept].cpu()
        place, h = positions[kept].cpu(), h[kept]  # [kept], [kept, (sites,) width]
        for part in self._pieces(kept.sum(1).tolist()):
            # trained-on tokens were chosen above, so that no position has to be known here
            f = self.dictionary.encode(h[part]) if self.features is None else self.dictionary.encode_selected(h[part], self.features)
            self.take(f.float().cpu(), text[part], place[part])

    def _pieces(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Slices of the kept tokens: as many whole texts as are encoded at a time, or one."""
        start = end = 0
        for length in lengths:
            if end > start and end + length - start > self.tokens:
                yield slice(start, end)
                start = end
            end += length
        if end > start:
            yield slice(start, end)


class _AtSite:
    """Accumulator that hands one site of a batch on."""

    def __init__(self, batch: _Batch, site: Site) -> None:
        self.batch, self.site = batch, site

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        self.batch.add(self.site, h, weight, rows)
