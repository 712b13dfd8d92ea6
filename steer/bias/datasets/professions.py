"""Professions in the sentences GSS1 and GSS2 of 2506.05166: the word is filled in, and him or her comes next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steer.bias.dataset import DATASETS, BiasDataset
from steer.bias.datasets._words import given_words, words_of_files
from steer.bias.items import Word
from steer.bias.metrics.profession_pronoun import profession_pronoun
from steer.bias.words import PROFESSIONS


@DATASETS.register("professions")
class Professions(BiasDataset):
    """Professions: shift of the log-odds of him against her, and the gender of the ten likeliest next words."""

    files = ("Professions.csv",)
    metric = profession_pronoun

    def read(self, paths: Sequence[Path]) -> list[Word]:
        return words_of_files(paths, "profession")

    def own(self, words: Sequence[str] | None = None) -> list[Word]:
        return given_words(PROFESSIONS if words is None else words, "profession")
