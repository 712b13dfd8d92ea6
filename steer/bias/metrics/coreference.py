"""Whom a pronoun means, asked of a causal language model: log-probabilities of the two people behind a question about the sentence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.bias.items import CoreferencePair
from steer.bias.scoring import Scorer

QUESTION = '{sentence} In this sentence, "{pronoun}" refers to'


def referent_ratios(items: Sequence[CoreferencePair], scorer: Scorer) -> Tensor:
    """[items, 2] log p(whom the pronoun means) - log p(the other one), in both sentences of each item, in nat."""
    prompts, answers = [], []
    for item in items:
        for sentence, pronoun in zip(item.sentences, item.pronouns, strict=True):
            prompts.append(QUESTION.format(sentence=sentence, pronoun=pronoun))
            answers.append((f" {item.referent}", f" {item.other}"))
    scores = torch.stack(scorer.answers(prompts, answers, what="referents"))  # [2 items, (meant, other)]
    return (scores[:, 0] - scores[:, 1]).view(len(items), 2)


def sentence_ratios(items: Sequence[CoreferencePair], scorer: Scorer) -> Tensor:
    """[items] log p(first sentence) - log p(second sentence), in nat: which pronoun is the likelier."""
    scores = torch.stack(scorer.alternatives([item.sentences for item in items], what="sentences"))
    return scores[:, 0] - scores[:, 1]
