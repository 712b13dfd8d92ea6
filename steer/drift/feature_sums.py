"""Sums over tokens from which the statistics of dictionary features are made: activation, density, maximum, and how well all are explained.

Whatever is kept is a sum, so that a sum over ranks is the same as one rank that has seen all tokens. Tokens times features is held for one
batch of the chosen features, or for a tile of tokens of a whole dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steer.drift.accumulators import ProjectionMoments, Reduce
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.model.devices import accumulation_dtype

TILE = 2**22  # features times tokens of a whole dictionary at a time: 16 MiB


def largest_over_ranks(values: Tensor, reduce: Reduce) -> Tensor:
    """The elementwise maximum over ranks of numbers that are not negative, by sums alone, exactly.

    Such fp32 numbers are in the order of their bits. Four bits at a time, from the highest on, the ranks that still have the largest number
    say which digit comes next.

    Args:
        values: [k].
    """
    bits = values.float().contiguous().view(torch.int32).long()  # [k]
    found, in_front = torch.zeros_like(bits), torch.ones_like(bits, dtype=torch.bool)
    digits = torch.arange(16, device=bits.device)
    for shift in range(28, -1, -4):
        digit = bits >> shift & 15
        votes = (digit[:, None] == digits) & in_front[:, None]  # [k, 16]
        seen = reduce(votes.to(accumulation_dtype(values.device))) > 0
        highest = (seen * digits).amax(1)
        in_front &= digit == highest
        found |= highest << shift
    return found.int().view(torch.float32).to(values.dtype)


class FeatureSums:
    """Stream mode: sums of k features over a window of training tokens. The rows of the batches are what varies independently.

    Attributes:
        moments: of the activations over tokens.
        on: [k] tokens with the feature on. maximum: [k] largest activation, 0 when it was never on.
        texts: [] rows with a token. squared_sizes: [] sum of their squared numbers of tokens.
        products, squares: [2, k] sums over rows of size times sum, and of squared sums, of activation and of tokens with the feature on.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        dtype = accumulation_dtype(device)
        self.moments = ProjectionMoments(k, device)
        with torch.inference_mode(False):
            self.on, self.maximum = torch.zeros(2, k, dtype=dtype, device=device).unbind()
            self.texts, self.squared_sizes = torch.zeros(2, dtype=dtype, device=device).unbind()
            self.products, self.squares = torch.zeros(2, 2, k, dtype=dtype, device=device).unbind()

    def update(self, f: Tensor, weight: Tensor) -> None:
        """Adds tokens, in place and without waiting for the device.

        Args:
            f: [batch, tokens, k] features.
            weight: [batch, tokens] bool.
        """
        dtype = self.on.dtype
        f = torch.where(weight.unsqueeze(-1), f, 0)
        self.moments.update(f.flatten(0, 1), weight.reshape(-1))
        sums = torch.stack([f.sum(1, dtype=dtype), (f != 0).sum(1).to(dtype)], 1)  # [batch, 2, k]
        sizes = weight.sum(1).to(dtype)  # [batch]
        self.on.add_(sums[:, 1].sum(0))
        self.maximum.copy_(torch.maximum(self.maximum, f.amax((0, 1)).to(dtype)))
        self.texts.add_((sizes > 0).sum())
        self.squared_sizes.add_(sizes.square().sum())
        self.products.add_(torch.einsum("b,bsk->sk", sizes, sums))
        self.squares.add_(sums.square().sum(0))

    def reset(self) -> None:
        """Forgets everything, in place."""
        self.moments.reset()
        for tensor in (*self.tensors.values(), self.maximum):
            tensor.zero_()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it but the maximum, as sums."""
        names = ("on", "texts", "squared_sizes", "products", "squares")
        return {name: getattr(self, name) for name in names}

    def reduced(self, reduce: Reduce) -> FeatureSums:
        """The sums over all ranks on the CPU, as a new object; every rank must call this at the same time."""
        total = FeatureSums(len(self.on))
        total.moments = self.moments.reduced(reduce).to("cpu")
        for name, tensor in self.tensors.items():
            getattr(total, name).copy_(reduce(tensor.clone()))
        total.maximum.copy_(largest_over_ranks(self.maximum, reduce))
        return total

    def to(self, device: torch.device) -> FeatureSums:
        """A copy on another device."""
        copy = FeatureSums(len(self.on), device)
        copy.load_state_dict(self.state_dict())
        return copy

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors."""
        own = {name: tensor.clone() for name, tensor in {**self.tensors, "maximum": self.maximum}.items()}
        return own | self.moments.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over saved tensors. Raises WidthError when the state is of another number of features."""
        self.moments.load_state_dict(state)
        for name, tensor in {**self.tensors, "maximum": self.maximum}.items():
            tensor.copy_(state[name])


class TextFeatures:
    """Probe mode: sums of k features over the span of each text. It is an accumulator of `steer.model.capture`.

    Attributes:
        counts: [texts] tokens that the dictionary was trained on.
        sums, on, maximum: [texts, k] of activation, tokens with the feature on, largest activation.
    """

    names = ("counts", "sums", "on", "maximum")

    def __init__(self, texts: int, k: int) -> None:
        self.counts = torch.zeros(texts, dtype=torch.float64)
        self.sums, self.on, self.maximum = torch.zeros(3, texts, k, dtype=torch.float64).unbind()

    def add(self, f: Tensor, weight: Tensor, rows: Tensor) -> None:
        """f: [batch, tokens, k]; weight: [batch, tokens] bool; rows: [batch] which texts these are."""
        f = torch.where(weight.unsqueeze(-1), f, 0)
        self.counts[rows] = weight.sum(1).double().cpu()
        self.sums[rows] = f.sum(1, dtype=torch.float32).double().cpu()
        self.on[rows] = (f != 0).sum(1).double().cpu()
        self.maximum[rows] = f.amax(1).double().cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors."""
        return {name: getattr(self, name).clone() for name in self.names}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> TextFeatures:
        """Rebuilds it."""
        own = cls(*state["sums"].shape)
        for name in cls.names:
            getattr(own, name).copy_(state[name])
        return own


class DictionarySums:
    """How well a dictionary explains the activations of its site.

    Attributes:
        tokens: [] number of them. squares, squared_error: [] of the activations, and of what the reconstruction lacks.
        total: [width] sum of the activations. on: [features] tokens with each feature on.
    """

    names = ("tokens", "squares", "squared_error", "total", "on")

    def __init__(self, dictionary: SparseAutoencoder, device: torch.device | str = "cpu") -> None:
        self.dictionary = dictionary
        dtype = accumulation_dtype(device)
        with torch.inference_mode(False):
            self.tokens, self.squares, self.squared_error = torch.zeros(3, dtype=dtype, device=device).unbind()
            self.total = torch.zeros(dictionary.d_in, dtype=dtype, device=device)
            self.on = torch.zeros(dictionary.width, dtype=dtype, device=device)

    def update(self, h: Tensor) -> None:
        """Adds tokens, h [tokens, width], a tile of them at a time."""
        for part in h.detach().split(max(1, TILE // self.dictionary.width)):
            self.encoded(part)

    def encoded(self, part: Tensor) -> Tensor:
        """Adds a tile of tokens, [tile, width], and gives its features, [tile, features]."""
        dtype = self.total.dtype
        with torch.no_grad():
            f = self.dictionary.encoder.encode(part)
            if self.explains_itself:
                self.squared_error.add_((part - self.dictionary.decode(f, part)).to(dtype).square().sum())
            self.on.add_((f != 0).sum(0))
        wide = part.to(dtype)
        self.tokens.add_(len(part))
        self.squares.add_(wide.square().sum())
        self.total.add_(wide.sum(0))
        return f

    def reset(self) -> None:
        """Forgets everything, in place."""
        for name in self.names:
            getattr(self, name).zero_()

    @property
    def explains_itself(self) -> bool:
        """It reconstructs what it reads; a transcoder reconstructs something else."""
        return self.dictionary.reads == self.dictionary.writes

    @property
    def fvu(self) -> Tensor:
        """[] share of the variance that is not explained; nan for a transcoder, and for fewer than two tokens."""
        variance = self.squares - self.total.square().sum() / self.tokens
        defined = self.explains_itself and bool(self.tokens > 1)
        return self.squared_error / variance if defined else torch.full_like(variance, torch.nan)

    @property
    def l0(self) -> Tensor:
        """[] features that are on at a token, on average."""
        return self.on.sum() / self.tokens

    @property
    def silent(self) -> Tensor:
        """[] share of the features that were on at none of the tokens."""
        return (self.on == 0).to(self.on.dtype).mean()

    def to(self, device: torch.device) -> DictionarySums:
        """A copy on another device."""
        copy = DictionarySums(self.dictionary, device)
        copy.load_state_dict(self.state_dict())
        return copy

    def reduced(self, reduce: Reduce) -> DictionarySums:
        """The sums over all ranks on the CPU, as a new object; every rank must call this at the same time."""
        total = DictionarySums(self.dictionary)
        for name in self.names:
            getattr(total, name).copy_(reduce(getattr(self, name).clone()))
        return total

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors."""
        return {name: getattr(self, name).clone() for name in self.names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over saved tensors."""
        for name in self.names:
            getattr(self, name).copy_(state[name])
