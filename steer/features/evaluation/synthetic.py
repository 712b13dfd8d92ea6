"""Synthetic activations whose true dictionary is known: sums of features with given frequencies, correlations and noise.

A dictionary that was trained on them can be compared with the truth, which no text of a real model allows.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from steer.checks import finite_number, number_within, tensor_of, whole_number
from steer.errors import ConfigError, WidthError
from steer.features.dictionary import Dictionary

SAMPLE = 4096  # tokens at a time


class SyntheticFeatures:
    """Activations h = f W + noise, with f of known features that are seldom on.

    A feature is on where a normal number of its own exceeds the threshold that gives its frequency; the numbers of different features are
    correlated, so that features come together. Its value is then low + (high - low) u with u even from 0 to 1.

    Args:
        rows: [features, width] W. They are scaled to length 1.
        frequency: share of tokens on which a feature is on, one for all or [features].
        correlation: [features, features] of the normal numbers, positive definite with a diagonal of 1; none when None.
        low, high: range of the values.
        noise: standard deviation of the noise in each coordinate.

    Raises:
        ConfigError: numbers that cannot be these. WidthError: shapes that do not fit.

    Example:
        >>> truth = steer.features.evaluation.SyntheticFeatures.random(64, 36, frequency=0.1)
        >>> h, f = truth.sample(1000, torch.Generator().manual_seed(0))  # [tokens, width], [tokens, features]
        >>> truth.compare(dictionary, tokens=1000)
    """

    def __init__(
        self,
        rows: Tensor,
        frequency: float | Tensor = 0.05,
        *,
        correlation: Tensor | None = None,
        low: float = 1.0,
        high: float = 2.0,
        noise: float = 0.0,
    ) -> None:
        rows = tensor_of(rows, "the rows", "pass [features, width] numbers").float()
        if rows.dim() != 2 or not torch.isfinite(rows).all() or (rows.norm(dim=1) == 0).any():
            raise _wrong_rows(rows)
        self.rows = torch.nn.functional.normalize(rows, dim=1)
        self.frequency = tensor_of(frequency, "`frequency`", "pass a number, or one for each feature").float().expand(len(rows)).clone()
        if not ((self.frequency > 0) & (self.frequency < 1)).all():
            raise _wrong_frequency(self.frequency)
        number_within(low, "`low`", 0.0)
        finite_number(high, "`high`", above=low)
        number_within(noise, "`noise`", 0.0)
        self.low, self.high, self.noise = low, high, noise
        self._threshold = torch.special.ndtri((1 - self.frequency).double()).float()
        self._factor = None if correlation is None else _factor_of(correlation, len(rows))

    @classmethod
    def random(
        cls,
        features: int,
        width: int,
        frequency: float | Tensor = 0.05,
        *,
        group: int = 1,
        together: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> SyntheticFeatures:
        """Random rows, and features that come together in groups.

        Args:
            group: features of a group. together: correlation within it.
            options: of the class.
        """
        whole_number(features, "`features`", least=2)
        whole_number(width, "`width`", least=1)
        whole_number(group, "`group`", least=1)
        number_within(together, "`together`", 0.0, 0.999)
        rows = torch.randn(features, width, generator=torch.Generator().manual_seed(seed))
        correlation = None
        if group > 1 and together:
            of = torch.arange(features) // group
            correlation = torch.where(of[:, None] == of, together, 0.0).fill_diagonal_(1.0)
        return cls(rows, frequency, correlation=correlation, **options)

    def sample(self, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(h [tokens, width], f [tokens, features])"""
        normal = torch.randn(tokens, len(self.rows), generator=generator)
        if self._factor is not None:
            normal = normal @ self._factor.T
        value = self.low + (self.high - self.low) * torch.rand(tokens, len(self.rows), generator=generator)
        f = value * (normal > self._threshold)
        h = f @ self.rows
        return h + self.noise * torch.randn(h.shape, generator=generator), f

    def compare(self, dictionary: Dictionary, *, tokens: int = 20_000, seed: int = 0) -> dict[str, float]:
        """How near a dictionary comes to the truth.

        Each true feature is matched with one of the dictionary, so that the cosines of their decoder rows are the largest together.

        Returns:
            `mcc`, the mean matched cosine; `found`, the share above 0.9; `precision` and `recall` of the matched features where the true
            ones are on, and `f1` of both, averaged over features; `fvu`; `l0` and `true_l0`.

        Raises:
            WidthError: a dictionary of another width, or of several sites.
        """
        learned = dictionary.decoder_rows(torch.arange(dictionary.width))
        if learned.dim() != 2 or learned.shape[1] != self.rows.shape[1]:
            raise _other_width(self.rows.shape[1], learned)
        cosines = self.rows @ torch.nn.functional.normalize(learned, dim=1).T  # [true, learned]
        true, matched = (torch.from_numpy(index) for index in linear_sum_assignment(cosines.double().numpy(), maximize=True))
        generator = torch.Generator().manual_seed(seed)
        counts = torch.zeros(3, len(true))  # both on, true on, matched on
        sums = torch.zeros(4, dtype=torch.float64)  # squared error, squares, features on, true ones on
        mean = torch.zeros(self.rows.shape[1], dtype=torch.float64)
        for start in range(0, tokens, SAMPLE):
            h, f = self.sample(min(SAMPLE, tokens - start), generator)
            encoded = dictionary.encode(h)
            on, is_true = encoded[:, matched] != 0, f[:, true] != 0
            counts += torch.stack([(on & is_true).sum(0), is_true.sum(0), on.sum(0)])
            error = (dictionary.decode(encoded, h) - h).double().square().sum()
            sums += torch.stack([error, h.double().square().sum(), (encoded != 0).sum().double(), (f != 0).sum().double()])
            mean += h.double().sum(0)
        precision, recall = counts[0] / counts[2].clamp_min(1), counts[0] / counts[1].clamp_min(1)
        f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
        best = cosines[true, matched]
        variance = float(sums[1] - mean.square().sum() / tokens)
        # a true feature that nothing is left for counts as not found
        missed = len(self.rows) / len(true)
        shares = {
            "mcc": best.mean(),
            "found": (best > 0.9).float().mean(),
            "precision": precision.mean(),
            "recall": recall.mean(),
            "f1": f1.mean(),
        }
        rest = {"fvu": float(sums[0]) / max(variance, 1e-12), "l0": float(sums[2]) / tokens, "true_l0": float(sums[3]) / tokens}
        return {**{name: float(value) / missed for name, value in shares.items()}, **rest}


def _factor_of(correlation: Tensor, features: int) -> Tensor:
    """A factor L with L L^T the correlation. Raises WidthError, ConfigError."""
    correlation = tensor_of(correlation, "`correlation`", "pass [features, features] numbers").double()
    if tuple(correlation.shape) != (features, features):
        raise _wrong_correlation(f"shape {list(correlation.shape)}", features)
    if not torch.allclose(correlation.diagonal(), torch.ones(features, dtype=torch.float64)) or not torch.allclose(
        correlation, correlation.T
    ):
        raise _wrong_correlation("a diagonal other than 1, or no symmetry", features)
    factor, failed = torch.linalg.cholesky_ex(correlation)
    if int(failed):
        raise _wrong_correlation("numbers that are not positive definite", features)
    return factor.float()


# ---- errors


def _wrong_rows(rows: Tensor) -> ConfigError:
    found = f"shape {list(rows.shape)}" if rows.dim() != 2 else "a row of length 0, or numbers that are not finite"
    return ConfigError("these are no rows of features", expected="[features, width] finite numbers", found=found, remedy="correct them")


def _wrong_frequency(frequency: Tensor) -> ConfigError:
    found = f"{float(frequency.min()):.3g} to {float(frequency.max()):.3g}"
    return ConfigError("a feature has no frequency of this size", expected="above 0 and below 1", found=found, remedy="correct it")


def _wrong_correlation(found: str, features: int) -> ConfigError:
    expected = f"[{features}, {features}], symmetric, positive definite, with a diagonal of 1"
    return ConfigError("this is no correlation of the features", expected=expected, found=found, remedy="correct it, or lower the numbers")


def _other_width(width: int, rows: Tensor) -> WidthError:
    remedy = "train the dictionary on the activations of these features"
    return WidthError(
        "the dictionary is not of these activations", expected=f"rows of {width} numbers", found=list(rows.shape), remedy=remedy
    )
