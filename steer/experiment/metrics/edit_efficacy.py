"""Efficacy of edits: the new object behind the prompt of the edit."""

from __future__ import annotations

from steer.experiment.metric import METRICS
from steer.experiment.metrics._edit_measure import EditMetric


@METRICS.register("edit_efficacy")
class EditEfficacy(EditMetric):
    """Whether the new object `target` is likelier than `true` behind `prompt`, with what an edit, a plan or a prompt does to it.

    Args:
        reads: `score`; `magnitude`, the difference of their probabilities; `accuracy`, whether every token of the object that should be
            said is the likeliest; `probability`, of that object per token.
        chat: prompts are messages of a user, rather than running text.

    Example:
        >>> # in a configuration: {metric: edit_efficacy, data: facts}, with lines such as
        >>> # {"prompt": "The capital of France is", "subject": "France", "target": "Rome", "true": "Paris"}
    """

    measure = "efficacy"
