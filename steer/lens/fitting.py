"""What fitting a lens shares: texts as batches of a few tokens, and what a lens says beside what the model says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.errors import ConfigError, ContrastError
from steer.lens.readout import Readout
from steer.model.site import Site
from steer.model.tokens import Row, check_rows


def divergence(model_logits: Tensor, lens_logits: Tensor) -> Tensor:
    """KL(model || lens) of the next token in nat, fp32. [..., vocabulary] each -> [...]."""
    model = model_logits.float().log_softmax(-1)
    return (model.exp() * (model - lens_logits.float().log_softmax(-1))).sum(-1)


def fitted_depths(readout: Readout, sites: Sequence[str | Site]) -> list[int]:
    """Depths of the sites of a fit, in order, without that behind the last block. Raises SiteError, ConfigError for none."""
    depths = {readout.depth_of(site) for site in readout.anatomy.sites(*map(str, sites))} - {readout.n_layers}
    if not depths:
        raise _no_sites(sites)
    return sorted(depths)


def halves(rows: Sequence[Row], held_out: int) -> tuple[list[Row], list[Row]]:
    """Texts to fit on, and the last `held_out` of them to judge by. Raises ContrastError where either has none, or a text is in both."""
    check_rows(rows, "the texts of a lens")
    if not 0 < held_out < len(rows):
        raise _too_few(len(rows), held_out)
    fitted, judged = list(rows[:-held_out]), list(rows[-held_out:])
    if twice := {row.ids for row in fitted} & {row.ids for row in judged}:
        raise _text_twice(len(twice))
    return fitted, judged


def drawn_tokens(rows: Sequence[Row], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places of at most `count` tokens of a batch that are part of a response: which row, and which token, [n] each."""
    places = [(i, token) for i, row in enumerate(rows) for token in range(max(row.prompt - 1, 0), len(row.ids))]
    chosen = torch.tensor(places)[torch.randperm(len(places), generator=generator)[:count]]
    return chosen[:, 0], chosen[:, 1]


# ---- errors


def _no_sites(sites: Sequence[str | Site]) -> ConfigError:
    return ConfigError(
        "a lens has nothing to fit",
        expected="at least one site before the output of the last block, where every lens is the model itself",
        found=", ".join(map(str, sites)) or "none",
        remedy="e.g. sites=['embed', 'layers.*.output']",
    )


def _too_few(count: int, held_out: int) -> ContrastError:
    return ContrastError(
        "too few texts to fit a lens",
        expected="at least one to fit on and one that is held out",
        found=f"{count} texts, {held_out} of them held out",
        remedy="give more texts, or hold fewer out",
    )


def _text_twice(count: int) -> ContrastError:
    return ContrastError(
        "texts that a lens is fitted on are held out too",
        expected="every text once",
        found=f"{count} of them twice",
        remedy="remove the copies",
    )
