"""Search: features of a dictionary that go with a concept, chosen on development text and reported on other text."""

from steer.features.search.find import find_features
from steer.features.search.found import FoundFeature, FoundFeatures
from steer.features.search.method import SEARCHES, FeatureSearch, SearchTask
from steer.features.search.texts import MarkedTexts

__all__ = ["SEARCHES", "FeatureSearch", "FoundFeature", "FoundFeatures", "MarkedTexts", "SearchTask", "find_features"]
