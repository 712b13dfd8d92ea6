"""The parts of an encoder by name, as files hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steer.features.activation import ACTIVATIONS
from steer.features.encoder import Encoder
from steer.features.rows import Rows


def encoder_parts(encoder: Encoder) -> dict[str, Rows | Tensor | None]:
    """Its numbers."""
    of_activation = {f"activation.{name}": tensor for name, tensor in encoder.activation.tensors.items()}
    return {"encoder": encoder.rows, "encoder_bias": encoder.bias, "shift": encoder.shift, **of_activation}


def encoder_settings(encoder: Encoder) -> dict[str, Any]:
    """What else it is."""
    return {"activation": encoder.activation.name, "settings": encoder.activation.settings, "norm": encoder.norm}


def encoder_from(parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Encoder:
    """Rebuilds it. Raises ConfigError for an unknown activation."""
    activation = ACTIVATIONS.get(settings["activation"]).restore(named(parts, "activation."), settings["settings"])
    return Encoder(parts["encoder"], parts.get("encoder_bias"), activation, shift=parts.get("shift"), norm=settings["norm"])


def named(parts: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The parts whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)}
