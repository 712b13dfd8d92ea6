"""Examples of features, collected while texts stream by: the texts with the largest values, and a fair sample of the others."""

from __future__ import annotations

import torch
from torch import Tensor


class Examples:
    """For every feature the texts with its largest values, and texts drawn evenly from all in which it is on, with a window of values.

    Args:
        width: number of features.
        top, sample: texts of each kind for each feature.
        before, after: tokens of the window beside the largest one of the text.
    """

    def __init__(self, width: int, *, top: int, sample: int, before: int, after: int, seed: int = 0) -> None:
        self.before, self.window = before, before + 1 + after
        self.top = _Kept(width, top, self.window)
        self.sample = _Kept(width, sample, self.window)
        self._random = torch.Generator().manual_seed(seed)

    def add(self, f: Tensor, texts: Tensor, positions: Tensor) -> None:
        """Takes the tokens of whole texts, those of a text together. f: [tokens, features]. texts, positions: [tokens]."""
        numbers, place, counts = texts.unique_consecutive(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).tolist()
        peaks = [f[end - count : end].max(0) for end, count in zip(ends, counts.tolist(), strict=True)]
        values = torch.stack([peak.values for peak in peaks], 1)  # [features, texts]
        starts = torch.tensor(ends) - counts
        tokens = torch.stack([peak.indices for peak in peaks], 1) + starts  # [features, texts] place of the peak in f
        places = _Places(f, numbers, place, positions, tokens, self.before, self.window)
        is_on = values > 0
        self.top.add(values.masked_fill(~is_on, -torch.inf), values, places)
        order = torch.rand(values.shape, generator=self._random)
        self.sample.add(order.masked_fill(~is_on, -torch.inf), values, places)


class _Places:
    """Where the peaks of a piece are, and the values around them."""

    def __init__(self, f: Tensor, numbers: Tensor, text: Tensor, positions: Tensor, tokens: Tensor, before: int, window: int) -> None:
        self.f, self.numbers, self.tokens, self.positions = f, numbers, tokens, positions
        self.before, self.window = before, window
        self.of = torch.full(
            (len(numbers), int(positions.max()) + 1), -1
        )  # [texts, positions] place in f, -1 for tokens that were left out
        self.of[text, positions] = torch.arange(len(f))

    def windows(self, features: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """[n] position of the peak in its text, and [n, window] values around it, 0 beyond the ends."""
        peak = self.positions[self.tokens[features, texts]]
        around = peak[:, None] - self.before + torch.arange(self.window)  # [n, window]
        inside = (around >= 0) & (around < self.of.shape[1])
        place = torch.where(inside, self.of[texts[:, None], around.clamp(0, self.of.shape[1] - 1)], -1)
        values = self.f[place.clamp_min(0), features[:, None]]
        return peak, values * (place >= 0)


class _Kept:
    """The texts with the largest keys for each feature. text, peak: [features, count]; -1 where there is none yet."""

    def __init__(self, width: int, count: int, window: int) -> None:
        self.key = torch.full((width, count), -torch.inf)
        self.value = torch.zeros(width, count)
        self.text = torch.full((width, count), -1)
        self.peak = torch.full((width, count), -1)
        self.windows = torch.zeros(width, count, window, dtype=torch.bfloat16)

    def add(self, keys: Tensor, values: Tensor, places: _Places) -> None:
        """keys, values: [features, texts]; minus infinity leaves a text out."""
        count = self.key.shape[1]
        if not count:
            return
        touched = (keys.amax(1) > self.key[:, -1]).nonzero()[:, 0]  # kept keys are in order, so that the last one is the smallest
        if not len(touched):
            return
        both = torch.cat([self.key[touched], keys[touched]], 1)
        key, chosen = both.topk(count, 1)  # [touched, count]
        for name, new in (("value", values), ("text", places.numbers.expand(keys.shape))):
            old = getattr(self, name)
            old[touched] = torch.cat([old[touched], new[touched].to(old.dtype)], 1).gather(1, chosen)
        self.key[touched] = key
        old_place = chosen.clamp_max(count - 1)
        self.peak[touched] = self.peak[touched].gather(1, old_place)
        self.windows[touched] = self.windows[touched].gather(1, old_place[..., None].expand(-1, -1, self.windows.shape[-1]))
        row, slot = ((chosen >= count) & (key > -torch.inf)).nonzero(as_tuple=True)
        if len(row):
            features = touched[row]
            peak, window = places.windows(features, chosen[row, slot] - count)
            self.peak[features, slot] = peak
            self.windows[features, slot] = window.to(self.windows.dtype)
        self.text[touched] = self.text[touched].masked_fill(key == -torch.inf, -1)
