"""Bias: the debiasing baselines as plans, logits processors and training rows, and what they cost."""

from steer.bias.counterfactual import augmented, counterfactuals
from steer.bias.debiasing import MITIGATIONS, Mitigation, fit_mitigation, mitigations

__all__ = ["MITIGATIONS", "Mitigation", "augmented", "counterfactuals", "fit_mitigation", "mitigations"]
