"""Paired sign-flip tests of all features of a dictionary at once, a chunk of features at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.drift.statistics import BLOCK, EXACT, benjamini_hochberg, sign_patterns

CHUNK = 1024  # features of which the differences are held together


@dataclass(frozen=True, eq=False)
class StageTests:
    """Tests of features, [width] each.

    Attributes:
        tested: on in any text at either stage.
        changed: number of texts in which they differ.
        sd: standard deviation of the difference over texts, with n - 1.
        p: two-sided sign-flip test of each, nan where it is not tested.
        q: p after Benjamini-Hochberg. p_adjusted: p after max-T, at least p; 1 where nothing changed.
        critical_t: [] what |t| of a feature must reach to have moved, all features together.
        by_chance: mean number of features with p <= alpha under flipped signs.
    """

    tested: Tensor
    changed: Tensor
    sd: Tensor
    p: Tensor
    q: Tensor
    p_adjusted: Tensor
    critical_t: float
    by_chance: float


def sign_flips_of_features(
    differences: Callable[[slice], tuple[Tensor, Tensor]], width: int, texts: int, *, alpha: float, draws: int, seed: int
) -> StageTests:
    """Sign-flip tests of the mean difference of each feature, corrected by the largest statistic under each pattern of signs.

    The statistic is |sum of differences| / root of the sum of their squares: flips of signs leave the denominator alone, and it grows with
    |t| alone, so that what max-T rejects is what the interval of critical_t leaves out. A feature that differs in few texts cannot get a
    large one, as it should be.

    Args:
        differences: a run of features -> [texts, run] fp64 differences, and [run] whether each feature is tested.
    """
    signs = sign_patterns(texts, draws=draws, seed=seed)  # [patterns, texts]
    exact = texts <= EXACT
    largest = torch.zeros(len(signs), dtype=torch.float64)
    columns: dict[str, list[Tensor]] = {name: [] for name in ("tested", "changed", "sd", "p", "observed")}
    by_chance = 0.0
    for start in range(0, width, CHUNK):
        run, tested = differences(slice(start, min(start + CHUNK, width)))
        of_run = {"tested": tested, "changed": (run != 0).sum(0).double(), "sd": run.std(0)}
        norms = run.norm(dim=0)
        unit = run / torch.where(norms > 0, norms, 1.0)  # [texts, run]
        of_run["observed"] = unit.sum(0).abs()
        statistics = torch.empty(len(signs), run.shape[1])  # fp32: [patterns, run]
        for block, out in zip(signs.split(BLOCK), statistics.split(BLOCK), strict=True):
            torch.mm(block.float(), unit.float(), out=out).abs_()
        # equal sums come out different in the last digits of fp32, and must still count as equal
        tie = 1e-5 * unit.abs().sum(0).float()
        as_large = (statistics >= of_run["observed"].float() - tie).sum(0)
        p = _share(as_large, len(signs), exact).double()
        of_run["p"] = torch.where(tested, p, torch.nan)
        by_chance += _by_chance(statistics[:, tested], tie[tested], alpha, exact)
        if bool(tested.any()):
            torch.maximum(largest, statistics[:, tested].amax(1).double(), out=largest)
        for name, column in of_run.items():
            columns[name].append(column)
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    tie_of_all = 1e-5 * texts**0.5
    sorted_largest = largest.sort().values
    beyond = len(signs) - torch.searchsorted(sorted_largest, joined["observed"] - tie_of_all)
    p_adjusted = torch.maximum(_share(beyond, len(signs), exact).double(), joined["p"].nan_to_num(1.0))
    return StageTests(
        joined["tested"],
        joined["changed"],
        joined["sd"],
        joined["p"],
        benjamini_hochberg(joined["p"]),
        torch.where(joined["tested"], p_adjusted, torch.nan),
        _critical_t(sorted_largest, texts, alpha, exact, tie_of_all),
        by_chance,
    )


def _share(as_large: Tensor, patterns: int, exact: bool) -> Tensor:
    """p from the number of patterns that are as large; among random ones the observed pattern is counted too."""
    return as_large / patterns if exact else (as_large + 1) / (patterns + 1)


def _by_chance(statistics: Tensor, tie: Tensor, alpha: float, exact: bool) -> float:
    """Expected number of features with p <= alpha if signs were random, each pattern taken for the observed one.

    Args:
        statistics: [patterns, tested].
    """
    patterns = len(statistics)
    allowed = _allowed(patterns, alpha, exact)
    if allowed < 1 or not statistics.shape[1]:
        return 0.0
    # what a statistic must exceed so that no more patterns than allowed are as large
    bound = statistics.kthvalue(patterns - allowed, dim=0).values
    return float((statistics > bound + tie).double().mean(0).sum())


def _allowed(patterns: int, alpha: float, exact: bool) -> int:
    """Number of patterns that may be as large where p <= alpha; all patterns have the observed one among them, random ones do not."""
    return int(alpha * patterns + 1e-9) if exact else int(alpha * (patterns + 1) + 1e-9) - 1


def _critical_t(largest: Tensor, texts: int, alpha: float, exact: bool, tie: float) -> float:
    """The |t| that belongs to the smallest statistic with p_adjusted <= alpha; infinite where there is none. largest: ascending."""
    allowed = _allowed(len(largest), alpha, exact)
    if allowed < (1 if exact else 0):
        return float("inf")
    s2 = (float(largest[len(largest) - allowed - 1]) + tie) ** 2
    return float("inf") if s2 >= texts else (s2 * (texts - 1) / (texts - s2)) ** 0.5
