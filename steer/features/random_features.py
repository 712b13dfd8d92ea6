"""Random features of a dictionary that are like chosen ones: the control of every result about features.

A feature that is on at every tenth token does more than one that is on at every thousandth, whatever it is about, and a long decoder row
moves the model further than a short one. So each chosen feature is replaced by a random one among those that are nearest to it in both.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from steer.checks import tensor_of, whole_number
from steer.errors import ConfigError
from steer.features.dictionary import Dictionary, Features
from steer.features.encoder import chosen

POOL = 32  # nearest features that one draw chooses from, at least
FACTOR = 3.0  # by which density and decoder norm of a random feature may differ at most
_ROWS = 4096  # of the decoder that are looked at together


class Matched(NamedTuple):
    """How like the chosen features the random ones are: the largest ratio, one way or the other, over all draws.

    Attributes:
        density: of the shares of tokens on which they are on.
        norm: of the lengths of their decoder rows.
    """

    density: float
    norm: float


def random_features(
    dictionary: Dictionary,
    features: Features,
    *,
    draws: int = 5,
    seed: int = 0,
    density: Tensor | None = None,
    without: Features | None = None,
) -> list[list[int]]:
    """Draws random features that match chosen ones in firing density, decoder norm and number, one for each in the same order.

    No draw has a chosen feature, none has a feature twice, and features of earlier draws come again only where no others are near enough.

    Args:
        dictionary: of any architecture.
        features: one index or several, each named once.
        draws: how many sets.
        seed: of the draws; the same seed gives the same ones.
        density: [width] share of tokens on which each feature is on, from `feature_statistics`; `dictionary.density`, which a
            dictionary that was trained here has, when None.
        without: further features that are not drawn, those of another question, say.

    Returns:
        `[draws][chosen]` features

    Raises:
        ConfigError: no density is known, or a feature that was never on; too few features within a factor of 3 in density and norm.

    Example:
        >>> controls = steer.features.random_features(dictionary, [3, 40], draws=5, seed=0)
        >>> site = dictionary.writes[0]
        >>> plans = [steer.Plan(steer.Intervention(steer.AblateFeatures(dictionary, drawn), site)) for drawn in controls]
    """
    whole_number(draws, "`draws` of random features", least=1)
    whole_number(seed, "`seed` of random features")
    indices = chosen(features, dictionary.width).cpu()
    if len(indices) == 0 or len(indices.unique()) != len(indices):
        raise _not_distinct(indices)
    shares = _density(dictionary, density)
    if not bool((shares[indices] > 0).all()):
        raise _never_on(indices[shares[indices] <= 0])
    norms = decoder_norms(dictionary)
    taken = indices if without is None else torch.cat([indices, chosen(without, dictionary.width).cpu()])
    near = [_near(place, shares, norms, taken) for place in indices.tolist()]
    used: set[int] = set()
    drawn: list[list[int]] = []
    for draw in range(draws):
        drawn.append(_draw(indices, near, used, _generator(seed, draw), draws))
        used.update(drawn[-1])
    if len({frozenset(each) for each in drawn}) < draws:
        raise _same_again(draws, near)
    return drawn


def matched(dictionary: Dictionary, features: Features, drawn: list[list[int]], density: Tensor | None = None) -> Matched:
    """How like the chosen features those of `random_features` are, for a report."""
    indices = chosen(features, dictionary.width).cpu()
    quantities = (_density(dictionary, density), decoder_norms(dictionary))
    ratios = [(values[torch.tensor(drawn)].log() - values[indices].log()).abs().max().exp().item() for values in quantities]
    return Matched(*ratios)


def decoder_norms(dictionary: Dictionary) -> Tensor:
    """[width] fp64 length of each feature's decoder row; of a feature that writes several sites, of all its rows together."""
    of_rows = torch.arange(dictionary.width).split(_ROWS)
    return torch.cat([dictionary.decoder_rows(part).flatten(1).double().norm(dim=1).cpu() for part in of_rows])


def _density(dictionary: Dictionary, given: Tensor | None) -> Tensor:
    """[width] fp64. Raises ConfigError."""
    found = dictionary.density if given is None else given
    if found is None:
        raise _no_density(dictionary)
    density = tensor_of(found, "`density` of features", "pass the shares of tokens, from steer.features.feature_statistics")
    density = density.detach().double().cpu()
    if density.shape != (dictionary.width,) or not bool(((density >= 0) & (density <= 1)).all()):
        raise _unfit_density(dictionary, density)
    return density


def _near(place: int, density: Tensor, norms: Tensor, taken: Tensor) -> Tensor:
    """The features that are like one, nearest first: within the factor in both, without the chosen ones."""
    distances = [(values.log() - values[place].log()).abs() for values in (density, norms)]  # infinite for what is 0
    allowed = (distances[0] <= math.log(FACTOR)) & (distances[1] <= math.log(FACTOR))
    allowed[taken] = False
    distance = torch.hypot(*distances).where(allowed, torch.inf)
    return distance.argsort(stable=True)[: int(allowed.sum())]


def _draw(indices: Tensor, near: list[Tensor], used: set[int], generator: torch.Generator, draws: int) -> list[int]:
    """[chosen] one draw. The features with the fewest that are like them choose first."""
    drawn: dict[int, int] = {}
    for place in sorted(range(len(indices)), key=lambda place: len(near[place])):
        free = [feature for feature in near[place].tolist() if feature not in drawn.values()]
        fresh = [feature for feature in free if feature not in used]
        pool = (fresh or free)[: max(POOL, 4 * draws)]
        if not pool:
            raise _none_near(int(indices[place]), len(near[place]))
        drawn[place] = pool[int(torch.randint(len(pool), (1,), generator=generator))]
    return [drawn[place] for place in range(len(indices))]


def _generator(seed: int, draw: int) -> torch.Generator:
    """Not that of `torch.manual_seed(seed)`, by which the features may have been chosen."""
    digest = hashlib.sha256(f"random features {seed} {draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# ---- errors


def _not_distinct(indices: Tensor) -> ConfigError:
    return ConfigError(
        "random features are matched with others one by one",
        expected="at least one feature, each named once",
        found=indices.tolist()[:20] or "none",
        remedy="name every feature once",
    )


def _no_density(dictionary: Dictionary) -> ConfigError:
    return ConfigError(
        "nobody recorded how often the features of this dictionary are on",
        expected=f"density=, [{dictionary.width}] shares of tokens, or `dictionary.density`",
        found="neither",
        remedy="measure it on texts: density=steer.features.feature_statistics(model, dictionary, rows).density",
    )


def _unfit_density(dictionary: Dictionary, density: Tensor) -> ConfigError:
    range_of = f", from {float(density.min()):.3g} to {float(density.max()):.3g}" if density.numel() else ""
    return ConfigError(
        "`density` is not that of this dictionary",
        expected=f"[{dictionary.width}] shares from 0 to 1",
        found=f"{list(density.shape)}{range_of}",
        remedy="measure it with steer.features.feature_statistics(model, dictionary, rows)",
    )


def _never_on(features: Tensor) -> ConfigError:
    return ConfigError(
        "no feature is like one that is never on",
        expected="features that are on at some tokens",
        found=f"never on: {features.tolist()[:20]}",
        remedy="leave them out, or measure the density on texts in which they are on",
    )


def _none_near(feature: int, near: int) -> ConfigError:
    return ConfigError(
        f"no random feature is left for feature {feature}",
        expected=f"a feature that is on {FACTOR:g} times as often at most, and {1 / FACTOR:.2g} times at least, with a decoder row as long",
        found=f"{near}, all of them taken",
        remedy="choose fewer features, or take a wider dictionary",
    )


def _same_again(draws: int, near: list[Tensor]) -> ConfigError:
    return ConfigError(
        "two draws of random features are the same",
        expected=f"{draws} different ones",
        found=f"{min(map(len, near))} features like one of the chosen, within a factor of {FACTOR:g} in density and decoder norm",
        remedy="ask for fewer draws, or take a wider dictionary",
    )
