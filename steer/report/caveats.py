"""What an experiment cannot show, worked out from its design and said before anybody has to ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from steer.report.numbers import measured, number
from steer.report.view import lock_of, seeds_of

ALPHA = 0.05
FEW_SEEDS = 5  # below: coverage of the interval was measured to fall short (docs/metrics.md)
WRONG_WAY = 0.2

ONE_SEED = (
    "One seed ({seed}): the interval covers the choice of items, not that of the seed, the batches or the training texts. "
    "Repeat with other seeds before believing a small difference."
)
ROUNDED = (
    "Measured with matrix products in bfloat16, the base and all arms alike: numbers differ from those of float32, and gates that are "
    "learned in one are not those of the other. Compare numbers of one precision alone."
)
NOT_TRAINED = "No arm was trained: the answer is about these weights and other items like these."
FEW = "{count} seeds: an interval over so few seeds is wide; with three it covers the truth in 91 to 96 of 100 experiments, not always 95."
INTERIM = (
    "{done} of {planned} planned seeds are done. Whoever looks after every seed and stops when it suits finds effects that are not there: "
    "the plan decides when to stop."
)
NO_LOCK = "The question was not locked before the first cell: a contrast may have been chosen because of what it shows."
DEVIATED = "The locked question was deviated from: {what}."
FEW_DRAWS = (
    "{draws} control draw{s}: even when no draw reaches the edit, the rank cannot give less than p = {p}; 19 draws are needed for 0.05. "
    "The primary contrast is against the mean of these draws."
)
AMONG_DRAWS = (
    "'{arm}' lies within the range of its control draws: against their mean it differs, but single draws do as much or more, so that other "
    "draws might have given another answer."
)
NO_CONTROL = "No arm is a matched random control: an effect of this edit cannot be told from that of any edit as large."
NO_PROMPT = "No arm is a prompt: a system message often does as much as an edit, and was not compared."
NO_GUARDRAIL = "No guardrail was set: what the effect costs elsewhere was not tested."
NOT_KEPT = "{metric} of '{arm}' is not shown to stay within its margin: that no harm is shown is not that there is none."
EXCEEDED = "{metric} of '{arm}' is worse than its margin allows."
SMALL = (
    "The difference ({difference}) is below the smallest effect ({smallest}) that this design shows in four of five experiments: "
    "one as large would often be missed, and one that is found is likely overstated."
)
CONSTANT = "{outcome} is the same in every arm: it tells nothing here."
MISSING = "{outcome} was not measured in {arms}."
WRONG = "{share} of the items moved the wrong way: the mean does not speak for each of them."
EXPLORATORY = "{count} contrast{s} {verb} looked at besides the planned ones: exploratory, corrected by false discovery rate."
OLD = "Written by version 0.1: the intervals are not corrected for the number of comparisons; the p beside them is."
STEERED_SITE = (
    "Where a direction is added during training, its reading and the behaviour come apart: look at sites that are not steered, and "
    "at the outcomes, before trusting a low reading at the steered site."
)
ONSET = (
    "Any fine-tune, a harmless one too, shifts every direction at first. One random direction in ten lies outside the grey band at "
    "any step, so leaving it is no finding. A shift beyond chance is larger than chance makes random directions shift; if the "
    "behaviour changed with it, only the scores and the completions can say."
)
STREAM_MODE = (
    "Stream mode begins at its first window of training tokens, when the model has been trained already; later windows "
    "hold other texts: it cannot show the drift of the first steps, nor tell a change of the model from one of the data."
)


def caveats(metrics: Mapping[str, Any], drift: Mapping[str, Any]) -> list[str]:
    """The caveats that apply to an experiment, the weightiest first.

    Args:
        metrics: the tree of metrics.json, schema 2.
        drift: records by cell or arm.
    """
    return [*_of_seeds(metrics), *_of_the_question(metrics), *_of_controls(metrics), *_of_outcomes(metrics), *_of_drift(drift)]


def _of_seeds(metrics: Mapping[str, Any]) -> Iterator[str]:
    seeds, design = seeds_of(metrics), metrics.get("design") or {}
    planned = (metrics.get("config") or {}).get("seeds")
    if design.get("trained") is False:
        yield NOT_TRAINED
    elif len(seeds) <= 1:
        yield ONE_SEED.format(seed=seeds[0] if seeds else "not recorded")
    elif len(seeds) < FEW_SEEDS:
        yield FEW.format(count=len(seeds))
    if design.get("precision") == "bf16-mixed":
        yield ROUNDED
    if isinstance(planned, list) and len(planned) > len(seeds) > 0:
        yield INTERIM.format(done=len(seeds), planned=len(planned))


def _of_the_question(metrics: Mapping[str, Any]) -> Iterator[str]:
    lock, contrasts = lock_of(metrics), metrics.get("contrasts") or []
    if not lock.get("locked"):
        yield NO_LOCK
    elif not lock.get("confirmatory"):
        yield DEVIATED.format(what="; ".join(lock.get("deviations") or ["how is not recorded"]))
    if metrics.get("written_as") == 1:
        yield OLD
    looked_at = sum(each.get("role") == "exploratory" for each in contrasts)
    if looked_at:
        yield EXPLORATORY.format(count=looked_at, s="" if looked_at == 1 else "s", verb="was" if looked_at == 1 else "were")
    smallest = (metrics.get("power") or {}).get("smallest_effect")
    difference = contrasts[0].get("difference") if contrasts else None
    if measured(smallest) and measured(difference) and abs(difference) < smallest:
        yield SMALL.format(difference=number(difference, signed=True), smallest=number(smallest))


def _of_controls(metrics: Mapping[str, Any]) -> Iterator[str]:
    arms = metrics.get("arms") or []
    if not any(arm.get("when", "never") != "never" for arm in arms):
        return
    controls = [arm for arm in arms if arm.get("control_of") is not None]
    draws = min((int(arm.get("draws") or 1) for arm in controls), default=0)
    if not controls:
        yield NO_CONTROL
    elif 1 / (draws + 1) > ALPHA:
        yield FEW_DRAWS.format(draws=draws, s="" if draws == 1 else "s", p=number(1 / (draws + 1), digits=2))
    specificity = metrics.get("specificity") or {}
    drawn = specificity.get("controls") or ()
    shown = next((each.get("shown") for each in metrics.get("contrasts") or []), False)
    if shown and drawn and min(drawn) <= specificity["effect"] <= max(drawn):
        yield AMONG_DRAWS.format(arm=specificity["arm"])
    if not any((arm.get("treatment") or {}).get("kind") == "prompt" for arm in arms):
        yield NO_PROMPT


def _of_outcomes(metrics: Mapping[str, Any]) -> Iterator[str]:
    arms, guardrails = metrics.get("arms") or [], metrics.get("guardrails") or []
    for outcome in metrics.get("outcomes") or {}:
        values = {arm["name"]: (arm.get("outcomes") or {}).get(outcome) for arm in arms}
        lacking = [name for name, found in values.items() if not found or not measured(found.get("mean"))]
        means = {found["mean"] for found in values.values() if found and measured(found.get("mean"))}
        if lacking:
            yield MISSING.format(outcome=outcome, arms=", ".join(lacking))
        elif len(means) == 1 and len(arms) > 1:
            yield CONSTANT.format(outcome=outcome)
    if arms and not guardrails:
        yield NO_GUARDRAIL
    for each in guardrails:
        if each.get("outcome") != "kept":
            yield (EXCEEDED if each.get("outcome") == "exceeded" else NOT_KEPT).format(metric=each["metric"], arm=each["arm"])
    share = (metrics.get("wrong_way") or {}).get("share")
    if measured(share) and share >= WRONG_WAY:
        yield WRONG.format(share=f"{100 * share:.0f} %")


def _of_drift(drift: Mapping[str, Any]) -> Iterator[str]:
    if drift:
        yield STEERED_SITE
        yield ONSET
    if any(record.mode == "stream" for records in drift.values() for record in records):
        yield STREAM_MODE
