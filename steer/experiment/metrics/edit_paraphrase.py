"""Paraphrase score of edits: the new object where the fact is asked for in other words."""

from __future__ import annotations

from steer.experiment.metric import METRICS
from steer.experiment.metrics._edit_measure import EditMetric


@METRICS.register("edit_paraphrase")
class EditParaphrase(EditMetric):
    """Share of `paraphrases` behind which the new object `target` is likelier than `true`.

    Args:
        reads: `score`; `magnitude`, the difference of their probabilities; `accuracy`, whether every token of the object that should be
            said is the likeliest; `probability`, of that object per token.
        chat: prompts are messages of a user, rather than running text.

    Example:
        >>> # in a configuration: {metric: edit_paraphrase, data: facts}, with lines such as
        >>> # {..., "paraphrases": ["France is ruled from"]}
    """

    measure = "paraphrase"
    prompts = "paraphrases"
