"""Gaussian noise on the subject, the corruption of causal tracing (Meng et al. 2022, arXiv 2202.05262, section 2.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from steer.checks import finite_number
from steer.edits.tracing.corruption import CORRUPTIONS, CorruptedSubject, Corruption
from steer.edits.tracing.prompts import Subjects


@CORRUPTIONS.register("noise")
class Noise(Corruption):
    """Gaussian noise is added, with a multiple of the standard deviation that the embeddings of the subjects have.

    Args:
        deviations: that multiple.
    """

    def __init__(self, deviations: float = 3.0) -> None:
        finite_number(deviations, "the deviations of the noise", above=0)
        self.deviations = float(deviations)

    def of(self, number: int, subjects: Subjects, samples: int, generator: Generator) -> CorruptedSubject:
        clean = subjects.values[number]
        noise = torch.randn(samples, *clean.shape, generator=generator)
        return CorruptedSubject(clean + (self.deviations * subjects.deviation * noise).to(clean))

    def settings(self) -> dict[str, Any]:
        return {"deviations": self.deviations}

    def measured(self, subjects: Subjects) -> dict[str, Any]:
        return {"deviation_of_subjects": subjects.deviation}
