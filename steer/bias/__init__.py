"""Bias: the debiasing baselines as plans, logits processors and training rows, and what they cost.

mitigations() -> names; fit_mitigation(name, model, texts=None, *, tokenizer=None, **options) -> Mitigation
side_effects(model, sources, *, tokenizer=None, items=None) -> SideEffects
augmented(rows, *, sided="two", pairs=None), counterfactuals(rows, pairs=None) -> rows
"""

from steer.bias.counterfactual import augmented, counterfactuals
from steer.bias.debiasing import MITIGATIONS, Mitigation, fit_mitigation, mitigations
from steer.bias.side_effects import SideEffects, SideEffectsChange, side_effects

__all__ = [
    "MITIGATIONS",
    "Mitigation",
    "SideEffects",
    "SideEffectsChange",
    "augmented",
    "counterfactuals",
    "fit_mitigation",
    "mitigations",
    "side_effects",
]
