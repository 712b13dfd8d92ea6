"""Reading of features: statistics, examples in context, logit weights, neighbours and names, from one pass over texts."""

from steer.features.reading.card import Example, FeatureCard
from steer.features.reading.explainer import EXPLAINERS, Explainer
from steer.features.reading.neuronpedia import to_neuronpedia
from steer.features.reading.pass_over import read_features
from steer.features.reading.reading import FeatureReading

__all__ = ["EXPLAINERS", "Example", "Explainer", "FeatureCard", "FeatureReading", "read_features", "to_neuronpedia"]
