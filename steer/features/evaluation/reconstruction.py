"""Reconstruction: how much of the activations, and of the model's loss, a dictionary keeps on some text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steer.checks import of_type, whole_number
from steer.features.dictionary import Dictionary
from steer.features.training.held_out import HeldOutPass, Measured, Sums, figures
from steer.features.training.passes import Activations, Passes
from steer.features.training.texts import TokenRows
from steer.model.site import Site


def reconstruction(model: nn.Module, dictionary: Dictionary, rows: TokenRows, *, tokens_per_pass: int = 2048) -> dict[str, float]:
    """FVU, L0, and the loss of the model that runs on the reconstruction, beside the plain model (`ce`) and ablation to the mean.

    Tokens that the dictionary was not trained on are left as they are. `on_once` is the share of the features that were on at least once,
    which grows with the text.

    Args:
        rows: of tokens, see `token_rows`: text that the dictionary was not trained on.
        tokens_per_pass: of the model.

    Raises:
        ConfigError, SiteError, WidthError: what does not fit.

    Example:
        >>> held_out_rows = steer.features.training.token_rows(tokenizer, other_texts, context=16)
        >>> steer.features.evaluation.reconstruction(model, dictionary, held_out_rows)["fvu"]
    """
    of_type(dictionary, Dictionary, "the dictionary", "load one with steer.load_dictionary")
    of_type(rows, TokenRows, "the rows", "make them with token_rows(tokenizer, texts)")
    whole_number(tokens_per_pass, "`tokens_per_pass`", least=1)
    sites = list(dict.fromkeys((*dictionary.reads, *dictionary.writes)))
    per_pass = max(1, tokens_per_pass // rows.context)
    passes = Passes(model, rows, sites, first=dictionary.untrained.first, per_pass=per_pass, dtype=torch.float32, cache=None)
    longest = dictionary.source.notes.get("max_norm_written")
    measured = Measured(dictionary, _means(passes, dictionary), longest)
    sums: Sums = {}
    for number in passes.to_measure:
        for name, value in HeldOutPass(passes, number).measure({"": measured})[""].items():
            sums[name] = sums[name] + value if name in sums else value
    return {**figures(sums), "on_once": float((sums["on"] > 0).double().mean())}


def _means(passes: Passes, dictionary: Dictionary) -> dict[Site, Tensor]:
    """Mean activation at each site that is written, of tokens that the dictionary was trained on."""
    sums: dict[Site, Tensor] = {}
    tokens = 0
    for number in passes.to_measure:
        activations = passes.run(number)
        kept = _trained_on(dictionary, activations)
        tokens += int(kept.sum())
        for site in dictionary.writes:
            total = activations[site][kept].double().sum(0)
            sums[site] = sums[site] + total if site in sums else total
    return {site: (total / max(tokens, 1)).float() for site, total in sums.items()}


def _trained_on(dictionary: Dictionary, activations: Activations) -> Tensor:
    """[tokens] those whose lengths are not those of outliers, at every site that is read; the first ones are left out already."""
    inside = [dictionary.untrained.trained_on(activations[site]) for site in dictionary.reads]
    every = torch.ones(len(activations[dictionary.reads[0]]), dtype=torch.bool)
    for of_site in inside:
        every = every if of_site is None else every & of_site.cpu()
    return every
