"""Chosen features of a dictionary that are read again and again, as in training: their encoder rows alone, kept where the model is."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.dictionary import Dictionary, Features, probe
from steer.features.encoder import Encoder, chosen
from steer.features.feature_edit import check_dictionary
from steer.features.rows import InMemory


class ChosenFeatures:
    """Pre-activations and activations of a few features of a dictionary that reads one site.

    Args:
        what: that needs them, for messages.

    Attributes:
        indices: [chosen] which.
        needs_all: the other features have a say in whether one is on (top-k), so that `activations` encodes all of them.

    Raises:
        ConfigError: no dictionary, one of several sites, or features that are none or named twice.
    """

    def __init__(self, dictionary: Dictionary, features: Features, what: str) -> None:
        check_dictionary(dictionary, what)
        if not isinstance(dictionary, SparseAutoencoder) or len(dictionary.reads) != 1:
            raise _several_sites(dictionary, what)
        indices = chosen(features, dictionary.width).cpu()
        if len(indices) == 0 or len(indices.unique()) != len(indices):
            raise _not_distinct(indices, what)
        whole = dictionary.encoder
        self.indices = indices
        self.needs_all = not whole.activation.elementwise
        tensors = {name: tensor if len(tensor) == 1 else tensor[indices] for name, tensor in whole.activation.tensors.items()}
        self._device = torch.device("cpu")
        self._whole = whole
        self._few = Encoder(
            InMemory(whole.rows.select(indices, probe()).detach().clone()),
            None if whole.bias is None else whole.bias.detach()[indices],
            whole.activation.with_tensors(tensors),
            shift=None if whole.shift is None else whole.shift.detach(),
            norm=whole.norm,
        )

    def pre_activations(self, h: Tensor) -> Tensor:
        """[..., chosen] at least in fp32, as `Dictionary.pre_activations`. h: [..., width]."""
        self._move(h.device)
        return self._few.pre_activations(h)

    def activations(self, h: Tensor) -> Tensor:
        """[..., chosen] as `Dictionary.encode_selected`."""
        if self.needs_all:
            return self._whole.encode(h, self.indices)
        self._move(h.device)
        return self._few.encode(h)

    def _move(self, device: torch.device) -> None:
        """Keeps the small tensors where the activations are; the rows see to themselves."""
        if device == self._device:
            return
        self._device = device
        few = self._few
        if few.bias is not None:
            few.bias = few.bias.to(device)
        if few.shift is not None:
            few.shift = few.shift.to(device)
        few.activation.tensors = {name: tensor.to(device) for name, tensor in few.activation.tensors.items()}


# ---- errors


def _several_sites(dictionary: Dictionary, what: str) -> ConfigError:
    return ConfigError(
        f"{what} cannot read features of this {dictionary.name}",
        expected="a dictionary that reads one site: an autoencoder or a transcoder",
        found=f"one that reads {', '.join(map(str, dictionary.reads))}",
        remedy="use a dictionary of one of these sites",
    )


def _not_distinct(indices: Tensor, what: str) -> ConfigError:
    return ConfigError(
        f"{what} reads features together",
        expected="at least one feature, each named once",
        found=indices.tolist()[:20] or "none",
        remedy="name every feature once, with one number for each",
    )
