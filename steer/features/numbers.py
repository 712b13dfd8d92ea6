"""Numbers of features: one for all of them, one for each, or one for each in each row slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.checks import tensor_of
from steer.errors import ConfigError
from steer.features.dictionary import Dictionary, Features
from steer.features.encoder import chosen
from steer.intervene.operator import check_finite

Numbers = float | Sequence[float] | Tensor


def per_feature(value: Numbers, features: Features, what: str) -> Tensor:
    """[slots, 1, chosen] fp32, to go with features [batch, tokens, chosen]. Raises ConfigError, NonFiniteError."""
    tensor = tensor_of(value, f"`{what}` of features", "pass a number, or one for each feature").detach().to(torch.float32, copy=True)
    check_finite(tensor, f"`{what}` of features")
    count = torch.as_tensor(features).numel()
    if tensor.dim() == 0:
        tensor = tensor.repeat(count)
    if tensor.dim() == 1:
        tensor = tensor[None]
    if tensor.dim() != 2 or tensor.shape[1] != count or not tensor.numel():
        raise _wrong_count(what, tensor, count)
    return tensor.unsqueeze(1).contiguous()


def times_maxima(value: Tensor, dictionary: Dictionary, features: Features, maxima: Numbers | None) -> Tensor:
    """[slots, 1, chosen] multiples of the largest values that features were seen with. Raises ConfigError where nobody recorded them."""
    if maxima is not None:
        largest = per_feature(maxima, features, "maxima")
    elif getattr(dictionary, "maxima", None) is not None:
        assert dictionary.maxima is not None
        largest = per_feature(dictionary.maxima[chosen(features, dictionary.width)], features, "maxima")
    else:
        raise _no_maxima()
    if not bool((largest > 0).all()):
        raise _never_on(largest)
    return value * largest


# ---- errors


def _wrong_count(what: str, tensor: Tensor, count: int) -> ConfigError:
    return ConfigError(
        f"`{what}` does not fit the features",
        expected=f"one number, {count} of them, or [slots, {count}]",
        found=list(tensor.shape),
        remedy="give one for each feature, in their order",
    )


def _no_maxima() -> ConfigError:
    return ConfigError(
        "nobody recorded how large the features of this dictionary become",
        expected="`maxima` of the dictionary, or maxima=",
        found="neither",
        remedy="pass maxima=, the largest value of each feature on your text, or numbers without of_maximum",
    )


def _never_on(largest: Tensor) -> ConfigError:
    return ConfigError(
        "a feature was never on, so that nothing is a multiple of its largest value",
        expected="maxima above 0",
        found=largest.flatten().tolist()[:20],
        remedy="choose features that are on in the text, or give numbers without of_maximum",
    )
