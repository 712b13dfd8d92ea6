"""Baselines: what stands in the place of an ablated node, nothing (`zero`) or its mean over some prompts (`mean`)."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.circuits.attribution import Baseline
from steer.circuits.passes import Passes
from steer.circuits.places import Place
from steer.circuits.texts import NO_ROLE, Batch

BASELINES = ("zero", "mean")


def zero_baselines(passes: Passes) -> dict[str, Baseline]:
    """Features off, errors and embeddings of length 0."""
    widths = {place.name: place.width for place in passes.places}
    return {place.name: Baseline(torch.zeros(widths[place.name]), torch.zeros(_site_width(place, passes))) for place in passes.places}


def mean_baselines(passes: Passes) -> dict[str, Baseline]:
    """Means over all tokens of the prompts that have a role and that the dictionary was trained on."""
    sums = {name: [base.features.double(), base.rest.double()] for name, base in zero_baselines(passes).items()}
    counts = {name: 0 for name in sums}

    def act(place: Place, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        is_in = place.roles(batch, x) != NO_ROLE
        f = place.encode(x, batch)
        rest = y.to(f.dtype) - place.decode(f, x)
        for total, values in zip(sums[place.name], (f, rest), strict=True):
            total += values[is_in].double().sum(0).cpu()
        counts[place.name] += int(is_in.sum())
        return y

    everything = range(len(passes.texts))
    for chosen in passes.batches(everything):
        passes.run([everything[i] for i in chosen], act, gradients=False)
    return {
        name: Baseline(features.float() / max(counts[name], 1), rest.float() / max(counts[name], 1))
        for name, (features, rest) in sums.items()
    }


def _site_width(place: Place, passes: Passes) -> int:
    return passes.anatomy.width if place.dictionary is None else place.dictionary.d_out
