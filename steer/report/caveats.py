"""What a run cannot show, said before anybody has to ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer.report.numbers import measured, number

SEED = (
    "One seed ({seed}): the intervals cover the choice of held-out items, not that of the seed, the batches "
    "or the training texts. Repeat with other seeds before believing a small difference."
)
SMALL_SAMPLES = "Small samples: the smallest number of items behind a mean is {smallest}."
ONE_RANDOM_DIRECTION = (
    "One random direction: that the trait direction does more than this one says little about others. Random directions differ "
    "in what they do, and the random arm may itself act on the trait or on the task: look at its own change beside "
    "that of plain training. Other seeds draw other random directions."
)
NO_RANDOM_DIRECTION = (
    "No arm was steered along a random direction: this run cannot tell an effect of the trait direction from an effect of any push."
)
STEERED_SITE = (
    "Where a direction is added during training, its reading and the behaviour come apart: look at sites that are not steered, and "
    "at the behaviour gap, before trusting a low reading at the steered site."
)
ONSET = (
    "Any fine-tune, a harmless one too, shifts every direction at first. One random direction in ten lies outside the grey band at "
    "any step, so leaving it is no finding. A shift that is marked is larger than chance makes random directions shift; if the "
    "behaviour changed with it, only the scores and the completions can say."
)
STREAM_MODE = (
    "Stream mode begins at its first window of training tokens, when the model has been trained already; later windows "
    "hold other texts: it cannot show the drift of the first steps, nor tell a change of the model from one of the data."
)


def caveats(metrics: Mapping[str, Any], drift: Mapping[str, Any]) -> list[str]:
    """The caveats that apply to a run.

    Args:
        metrics: the content of metrics.json.
        drift: records by name of the arm.
    """
    arms = metrics.get("arms") or []
    sizes = [values["n"] for arm in arms for values in (arm.get("metrics") or {}).values() if values and measured(values.get("n"))]
    steers = [arm.get("steer") or {} for arm in arms]
    paragraphs = [SEED.format(seed=metrics.get("seed", "unknown"))]
    if sizes:
        paragraphs.append(SMALL_SAMPLES.format(smallest=number(min(sizes), digits=0)))
    if any(steer.get("direction") == "random" for steer in steers):
        paragraphs.append(ONE_RANDOM_DIRECTION)
    elif any(steer.get("when", "never") != "never" for steer in steers):
        paragraphs.append(NO_RANDOM_DIRECTION)
    if drift:
        paragraphs += [STEERED_SITE, ONSET]
        if any(record.mode == "stream" for records in drift.values() for record in records):
            paragraphs.append(STREAM_MODE)
    return paragraphs
