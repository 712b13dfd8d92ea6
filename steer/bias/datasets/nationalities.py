"""Nationalities in the sentences DSS1 and DSS2 of 2506.05166: the word is filled in, and a judgement comes next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steer.bias.dataset import DATASETS, BiasDataset
from steer.bias.datasets._words import given_words, words_of_files
from steer.bias.items import Word
from steer.bias.metrics.nationality_sentiment import nationality_sentiment
from steer.bias.words import NATIONALITIES


@DATASETS.register("nationalities")
class Nationalities(BiasDataset):
    """Nationalities: probability of kind less that of unkind words among the ten likeliest next ones, and its spread."""

    files = ("Nationalities.csv",)
    metric = nationality_sentiment

    def read(self, paths: Sequence[Path]) -> list[Word]:
        return words_of_files(paths, "nationality")

    def own(self, words: Sequence[str] | None = None) -> list[Word]:
        return given_words(NATIONALITIES if words is None else words, "nationality")
