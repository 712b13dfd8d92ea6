"""Probe mode: the same prompts at every check, compared one by one with what they gave at the first."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.drift.metrics import sign_flip_p, standardise, z_controls, z_covariance, z_isotropic
from steer.drift.records import DriftRecord
from steer.drift.watch import Watch
from steer.model.capture import pool


class PooledStates:
    """Accumulator: the mean activation over each text's span.

    Attributes:
        values: [texts, width] fp32, on the CPU.
    """

    def __init__(self, texts: int, width: int) -> None:
        self.values = torch.full((texts, width), torch.nan)

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        self.values[rows] = pool(h, weight).cpu()


def probe_records(watch: Watch, states: Tensor, baseline: Tensor, *, step: int, seed: int) -> list[DriftRecord]:
    """Records of one site, without `q`.

    Args:
        states, baseline: [prompts, width] of this check and of the first one.
        seed: of the sign-flip test.
    """
    states, baseline, k = states.double(), baseline.double(), watch.named
    now, differences = states @ watch.units.mT, (states - baseline) @ watch.units.mT
    change, shift = differences.mean(0), (states - baseline).mean(0)
    effect = standardise(change, (baseline @ watch.units.mT).std(0))
    tests = {
        "p": sign_flip_p(differences[:, :k], seed=seed),
        "z_controls": z_controls(effect[:k], effect[k:]),
        "z_isotropic": z_isotropic(shift, watch.units[:k]),
        "z_covariance": z_covariance(shift, watch.units[:k], baseline),
    }
    return records(watch, "probe", step, len(states), now.mean(0), now.std(0), change, effect, tests)


def records(
    watch: Watch, mode: str, step: int, n: int, mean: Tensor, sd: Tensor, change: Tensor, effect: Tensor, tests: dict[str, Tensor]
) -> list[DriftRecord]:
    """One record per direction of a site from columns over them; `tests` has entries for the named ones only."""
    made = []
    for i, name in enumerate(watch.names):
        gap = watch.gap(i)
        made.append(
            DriftRecord(
                step=step,
                mode=mode,
                direction=name,
                site=str(watch.site),
                kind=watch.kind(i),
                n=n,
                mean=float(mean[i]),
                sd=float(sd[i]),
                change=float(change[i]),
                effect_sd=float(effect[i]),
                effect_gap=None if gap is None else float(change[i]) / gap,
                **({test: float(values[i]) for test, values in tests.items()} if gap is not None else {}),
            )
        )
    return made
