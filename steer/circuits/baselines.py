"""Baselines: what stands in the place of an ablated node, nothing (`zero`) or its mean over some prompts (`mean`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steer.circuits.passes import Passes
from steer.circuits.split_site import SplitSite
from steer.circuits.texts import NO_ROLE, Batch

BASELINES = ("zero", "mean")


@dataclass(frozen=True, eq=False)
class Baseline:
    """What stands in the place of an ablated node. features: [features] fp32. rest: [width of the site] fp32."""

    features: Tensor
    rest: Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """What prompts showed at a split site. mean: over tokens. was_on: [roles, features] bool, whether a feature was on at any of a role."""

    mean: Baseline
    was_on: Tensor


def zero_baselines(passes: Passes) -> dict[str, Baseline]:
    """Features off, errors and embeddings of length 0, by name of the dictionary."""
    return {split.name: Baseline(torch.zeros(split.width), torch.zeros(_site_width(split, passes))) for split in passes.splits}


def seen(passes: Passes) -> dict[str, Seen]:
    """By name of the dictionary, over all tokens of the prompts that have a role and that the dictionary was trained on."""
    sums = {name: (base.features.double(), base.rest.double()) for name, base in zero_baselines(passes).items()}
    roles_in_all = len(passes.texts.role_names)
    was_on = {split.name: torch.zeros(roles_in_all, split.width, dtype=torch.bool) for split in passes.splits}
    counts = dict.fromkeys(sums, 0)

    def act(split: SplitSite, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        roles = split.roles(batch, x)
        is_in = roles != NO_ROLE
        f = split.encode(x, batch)
        rest = y.to(f.dtype) - split.decode(f, x)
        for total, values in zip(sums[split.name], (f, rest), strict=True):
            total += values[is_in].double().sum(0).cpu()
        was_on[split.name] |= torch.stack([(f[roles == role] != 0).any(0) for role in range(roles_in_all)]).cpu()
        counts[split.name] += int(is_in.sum())
        return y

    for chosen in passes.batches(range(len(passes.texts))):
        passes.run(chosen, act, gradients=False)
    return {
        name: Seen(Baseline(*((total / max(counts[name], 1)).float() for total in totals)), was_on[name]) for name, totals in sums.items()
    }


def _site_width(split: SplitSite, passes: Passes) -> int:
    return passes.anatomy.width if split.dictionary is None else split.dictionary.d_out
