"""Decoder rows of a dictionary as a steering vector, as AxBench (Wu et al. 2025, arXiv 2501.17148) steers with dictionaries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.dictionary import Dictionary, Features
from steer.features.feature_edit import check_dictionary, check_written, distinct, feature_words, listed, number_words, origin_of
from steer.features.numbers import Numbers, per_feature, times_maxima
from steer.intervene.operator import OPERATORS
from steer.intervene.operators.add import Add
from steer.model.site import Site


@OPERATORS.register("add_decoder")
class AddDecoder(Add):
    """h + strength * sum_j a_j W_j: adds what features of a dictionary write, whether they are on or not; weights can carry it as a bias.

    No encoder is involved, so that it also acts on tokens that the dictionary was not trained on. Dictionaries of every architecture have
    decoder rows.

    Args:
        dictionary: one that writes the site that is edited.
        features: one index or several.
        amount: a, one number for all features, one for each, or [slots, chosen].
        of_maximum: it counts in multiples of the largest value that the feature was seen with.
        maxima: [chosen] these values, where the dictionary does not record them.
        site: which of the sites that the dictionary writes, where there are several.

    Raises:
        ConfigError: features that are none or named twice; no recorded maximum; no or an unknown site; a norm that is put back at run time.

    Example:
        >>> plan = steer.Plan(steer.Intervention(steer.AddDecoder(dictionary, 3, amount=2.0), dictionary.writes[0]))
    """

    learnable = ()
    settings = ("features", "amounts", "origin")

    def __init__(
        self,
        dictionary: Dictionary,
        features: Features,
        amount: Numbers = 1.0,
        *,
        of_maximum: bool = False,
        maxima: Numbers | None = None,
        site: Site | str | None = None,
    ) -> None:
        check_dictionary(dictionary, self.name)
        indices = distinct(features, dictionary.width)
        amounts = per_feature(amount, features, "amount")  # [slots, 1, chosen]
        if of_maximum:
            amounts = times_maxima(amounts, dictionary, features, maxima)
        self.features, self.amounts = tuple(indices.tolist()), amounts.squeeze(1).tolist()
        self.origin = origin_of(dictionary)
        rows = _rows_at(dictionary, indices, site, self.origin)
        super().__init__((amounts.double() @ rows.double()).squeeze(1))

    def check_site(self, site: Site) -> None:
        check_written(self.name, self.origin, site)

    def words(self) -> dict[str, Any] | None:
        if self.slots > 1:
            return None
        site = {"site": self.origin["writes"][0]} if self.origin["chosen_site"] else {}
        return {**feature_words(self.features), "amount": number_words(torch.tensor(self.amounts)), **site}

    def describe(self) -> str:
        return f"{super().describe()}, decoder of {listed(self.features, self.origin)}"


def _rows_at(dictionary: Dictionary, indices: Tensor, site: Site | str | None, origin: dict[str, Any]) -> Tensor:
    """[chosen, width] decoder rows at one of the sites that are written, which is noted in the origin."""
    if (
        isinstance(dictionary, SparseAutoencoder)
        and dictionary.restores_norm
        and dictionary.encoder.norm in ("layer_norm", "constant_norm")
    ):
        raise _norm_at_run_time(dictionary)
    rows = dictionary.decoder_rows(indices)
    known = [str(written) for written in dictionary.writes]
    wanted = known[0] if site is None and len(known) == 1 else None if site is None else str(Site.parse(site))
    if wanted is None or known.count(wanted) != 1:
        raise _which_site(known, wanted)
    origin["writes"], origin["chosen_site"] = [wanted], len(known) > 1
    return rows[:, known.index(wanted)] if rows.dim() == 3 else rows


# ---- errors


def _norm_at_run_time(dictionary: SparseAutoencoder) -> ConfigError:
    return ConfigError(
        "the decoder rows of this dictionary are no constant vectors",
        expected="rows in the units of the activations",
        found=f"the norm '{dictionary.encoder.norm}', by which every token has a unit of its own",
        remedy="use ClampFeatures(dictionary, features, add=...)",
    )


def _which_site(known: list[str], wanted: str | None) -> ConfigError:
    return ConfigError(
        "it is not clear which decoder rows are meant",
        expected=f"site=, one of {', '.join(dict.fromkeys(known))}",
        found=wanted or f"no site, and a dictionary that writes {len(known)}",
        remedy="name one that the dictionary writes once",
    )
