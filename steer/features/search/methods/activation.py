"""Search by activation: features that are on where the concept is. The choice of the two scores is ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.features.encoding import Take, encode_texts
from steer.features.search.firing import COLUMNS, FiringCounts
from steer.features.search.method import SEARCHES, FeatureSearch, Scores, SearchTask
from steer.lens.labelled import LabelledTexts
from steer.model.tokens import Row


@SEARCHES.register("activation")
class Activation(FeatureSearch):
    """How well a feature's activation tells the tokens of a concept from all others (average precision, AUROC), all features in one pass.

    Of a concept that is given by labelled texts, whole texts are told apart, by the largest activation within each response.

    Args:
        max_tokens: of a pass.
    """

    columns = COLUMNS
    needs = ("texts",)

    def __init__(self, max_tokens: int = 4096) -> None:
        self.max_tokens = max_tokens

    def scores(self, task: SearchTask) -> dict[str, Scores]:
        chosen = task.scored()
        found: dict[str, Scores] = {}
        if task.words:
            assert task.texts is not None
            counts = self.count_words(task, chosen)
            found |= {concept: counts.scores(place) for place, concept in enumerate(task.words)}
        for concept, texts in task.labelled.items():
            found[concept] = self._count_texts(task, texts, chosen).scores(0)
        if chosen is None or task.features is None:
            return found
        places = {concept: torch.searchsorted(chosen, features) for concept, features in task.features.items()}
        return {concept: {name: values[places[concept]] for name, values in found[concept].items()} for concept in task.concepts}

    def count_words(self, task: SearchTask, chosen: Tensor | None) -> FiringCounts:
        """Values of features on the tokens of running text. chosen: [chosen] which features, None for all."""
        texts = task.texts
        assert texts is not None
        counts = FiringCounts(task.dictionary.width if chosen is None else len(chosen), texts.marks.shape[1])

        def take(f: Tensor, text: Tensor, position: Tensor) -> None:
            counts.add(f, texts.of(text, position))

        self._encode(task, texts.rows, chosen, take)
        return counts

    def _count_texts(self, task: SearchTask, texts: LabelledTexts, chosen: Tensor | None) -> FiringCounts:
        """The largest value of each feature within each labelled text."""
        largest: dict[int, Tensor] = {}

        def take(f: Tensor, text: Tensor, position: Tensor) -> None:
            prompts = torch.tensor([texts.rows[i].prompt for i in text.tolist()])
            inside = position >= prompts
            for i in text[inside].unique().tolist():
                of_text = f[inside & (text == i)].amax(0)  # [features]
                largest[i] = torch.maximum(largest[i], of_text) if i in largest else of_text

        self._encode(task, texts.rows, chosen, take)
        counts = FiringCounts(task.dictionary.width if chosen is None else len(chosen), 1)
        for i, values in largest.items():
            counts.add(values[None], torch.tensor([[texts.labels[i] == 1]]))
        return counts

    def _encode(self, task: SearchTask, rows: Sequence[Row], chosen: Tensor | None, take: Take) -> None:
        encode_texts(task.model, task.dictionary, rows, take, features=chosen, max_tokens=self.max_tokens, progress=task.progress)
