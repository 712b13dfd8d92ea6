"""Neighbourhood score of edits: what is true of other subjects stays."""

from __future__ import annotations

from steer.experiment.metric import METRICS
from steer.experiment.metrics._edit_measure import EditMetric


@METRICS.register("edit_neighbourhood")
class EditNeighbourhood(EditMetric):
    """Share of `neighbours`, prompts about other subjects, behind which `true` stays likelier than the new object `target`.

    Args:
        reads: `score`; `magnitude`, the difference of their probabilities; `accuracy`, whether every token of the object that should be
            said is the likeliest; `probability`, of that object per token.
        chat: prompts are messages of a user, rather than running text.

    Example:
        >>> # in a configuration: {metric: edit_neighbourhood, data: facts}, with lines such as
        >>> # {..., "neighbours": ["The Louvre is in the city of"]}
    """

    measure = "neighbourhood"
    prompts = "neighbours"
