"""Comparing edits of a model on the same items, in a notebook: `steer.compare`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from steer.checks import of_type
from steer.edits.edit import Edit
from steer.errors import ConfigError
from steer.experiment.analysis import analyse
from steer.experiment.arms import DRAWS, Arm, check_name
from steer.experiment.complete import check_completions, complete
from steer.experiment.metric import Metric, metric_of, name_of
from steer.experiment.outcome import PRIMARY, Outcome, check_outcomes, measure_all, naming_arm, prepare_all, texts_of
from steer.experiment.question import question_of
from steer.experiment.result import Result
from steer.experiment.scores import Place, Scores
from steer.experiment.treatment import BAKED, INFERENCE, NEVER, TREATMENTS, Bench, Treatment
from steer.intervene import Plan
from steer.model.anatomy import Anatomy
from steer.model.load import tokenizer_of
from steer.model.shared_blocks import sharing_lower_blocks


@dataclass(frozen=True)
class Matched:
    """The matched random partners of a treatment, see `matched`."""

    of: Plan | Edit | Treatment
    draws: int = DRAWS


def matched(treatment: Plan | Edit | Treatment, draws: int = DRAWS) -> Matched:
    """The control of another arm: the same edit along random directions, with random weights or with irrelevant words, and as large.

    Args:
        treatment: what that arm holds.
        draws: number of random partners. The more of them, the smaller the share that can be as good by chance: 19 reach 5 %.

    Raises:
        ConfigError: no treatment, or less than one draw.

    Example:
        >>> arms = {"plain": None, "warm": plan, "random": steer.matched(plan)}
    """
    of_type(treatment, (Plan, Edit, Treatment), "the treatment to match", "pass the plan, the edit or the treatment of another arm")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise _no_draws(draws)
    return Matched(treatment, draws)


def compare(
    model: nn.Module,
    arms: Mapping[str, Plan | Edit | Treatment | Matched | None],
    metric: str | Mapping[str, Any] | Metric | Callable[..., Any] | Sequence[Outcome],
    items: Sequence[Mapping[str, Any]] | None = None,
    *,
    better: str | None = None,
    tokenizer: Any = None,
    question: str = "",
    primary: Sequence[str] | None = None,
    prompts: Sequence[str] = (),
    baked: bool = False,
    max_new_tokens: int = 48,
) -> Result:
    """Measures the arms on the same items and tests what differs.

    The first arm with a treatment is compared with its matched controls, where there are some, otherwise with the untreated arm; what else
    is planned follows from the arms (`steer.experiment.question`). No arm is trained: one seed, so that the answer holds for the items.

    Args:
        model: anything `Plan.attach` takes; as it was afterwards.
        arms: what is done to the model, by the name of the arm: None, a plan, an edit of facts, a treatment such as `steer.Prompt`, or
            `steer.matched` of one.
        metric: the name of a metric, a mapping of `metric` and its options, a Metric, a function (see `steer.experiment.metric`), or
            outcomes, one of which is primary, with secondary ones and guardrails.
        items: mappings with the texts that the metric reads; none where `metric` is a list of outcomes.
        better: `higher` or `lower`; that of the metric by default.
        tokenizer: of the model; the one that `steer.load` gave with it by default.
        question: for the page; made of the arms by default.
        primary: names of the two arms whose contrast decides.
        prompts: messages whose answers in each arm are shown.
        baked: bake plans, edits and weights into the model, rather than steer it at run time.
        max_new_tokens: length of these answers.

    Returns:
        A result that prints as a table, plots, and writes a page.

    Raises:
        ConfigError: arms, metrics or items that cannot be compared, a control that cannot be matched. NonFiniteError: a value that is NaN.
        ContextError: a plan that cannot know its tokens in the passes of a metric. All of them name the arm.

    Example:
        >>> arms = {"plain": None, "warm": plan, "random": steer.matched(plan)}
        >>> result = steer.compare(model, arms, "logprob_gap", items, better="higher")
        >>> print(result)
        >>> result.report("warm.html")
    """
    tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
    outcomes = _outcomes(metric, items, better)
    read = _arms(arms, baked)
    of_type(prompts, (list, tuple), "the prompts", "pass a list of messages")
    if prompts:
        check_completions(prompts, max_new_tokens)
    asked = question_of(read, outcomes, text=question, primary=primary)
    bench = Bench(model, tokenizer, texts_of(outcomes, tokenizer), fingerprint=Anatomy.find(model).fingerprint())
    treatments = {arm.name: arm.treatments(bench) for arm in read}
    sizes = {name: [each.size(bench) for each in group] for name, group in treatments.items()}
    prepare_all(outcomes, model, tokenizer)
    scores = Scores()
    completions: dict[str, list[dict[str, str]]] = {}
    runs = [(arm, draw, treatment) for arm in read for draw, treatment in enumerate(treatments[arm.name])]
    with sharing_lower_blocks(model):
        for arm, draw, treatment in tqdm(runs, desc="arms", disable=None, leave=False):
            acting = nullcontext(model) if arm.when == NEVER else treatment.baked(model) if arm.when == BAKED else treatment.acting(model)
            system = treatment.system if arm.acts_at_inference else None
            with naming_arm(arm.name), acting as treated:
                for name, values in measure_all(outcomes, treated, tokenizer, system=system).items():
                    scores.add(Place(name, arm.name, draw, 0), values)
                if prompts and draw == 0:
                    texts = complete(
                        treated, tokenizer, [{"prompt": prompt, "system": system} for prompt in prompts], max_new_tokens=max_new_tokens
                    )
                    completions[arm.name] = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    untreated = next((arm.name for arm in read if arm.when == NEVER), None)
    before = None if untreated is None else {outcome.name: scores[Place(outcome.name, untreated, 0, 0)] for outcome in outcomes}
    analysis = analyse(scores, asked, read, outcomes, before=before, sizes=sizes)
    return Result(analysis | {"completions": completions, "design": {"trained": False}}, scores)


def _outcomes(metric: Any, items: Sequence[Mapping[str, Any]] | None, better: str | None) -> list[Outcome]:
    if isinstance(metric, Sequence) and not isinstance(metric, str):
        if items is not None:
            raise _items_of_their_own()
        outcomes = list(metric)
        for outcome in outcomes:
            of_type(outcome, Outcome, "one of the outcomes", "pass steer.Outcome(name, metric, items, role=...)")
    else:
        made = metric_of(metric)
        outcomes = [Outcome(name_of(made), made, items, role=PRIMARY, better=better)]  # type: ignore[arg-type]
    check_outcomes(outcomes)
    return outcomes


def _arms(arms: Mapping[str, Any], baked: bool) -> list[Arm]:
    of_type(arms, Mapping, "the arms", "pass {name: plan, treatment, steer.matched(...) or None}")
    for name in arms:
        check_name(name)
    treatments = {name: _treatment(name, given) for name, given in arms.items() if not isinstance(given, Matched)}
    read = []
    for name, given in arms.items():
        if isinstance(given, Matched):
            of = next((other for other, treated in arms.items() if treated is given.of), None)
            if of is None:
                raise _controls_no_arm(name, arms)
            treatment = treatments[of]
            read.append(Arm(name, name, treatment, _when(treatment, baked), control_of=of, draws=given.draws))
        else:
            treatment = treatments[name]
            read.append(Arm(name, name, treatment, _when(treatment, baked)))
    return read


def _when(treatment: Treatment, baked: bool) -> str:
    """A prompt cannot be baked: it is said in any case."""
    if not treatment.when:
        return NEVER
    return BAKED if baked and BAKED in treatment.when else INFERENCE


def _treatment(name: Any, given: Any) -> Treatment:
    if given is None:
        return TREATMENTS.get("none")()
    if isinstance(given, Plan):
        return TREATMENTS.get("plan")(given)  # type: ignore[call-arg]
    if isinstance(given, Edit):
        return TREATMENTS.get("edit")(given)  # type: ignore[call-arg]
    if isinstance(given, Treatment):
        return given
    raise _no_treatment(name, given)


# ---- errors

_WRAPPED = {  # by the type of what is no treatment yet
    "Direction": "make a plan of it: steer.Plan(steer.Intervention(steer.Add(d.vector), d.site, strength=d.strength_of(0.2))), "
    "where d is the direction and 0.2 the dose",
    "Directions": "choose one, d = directions.best(), and make a plan of it: "
    "steer.Plan(steer.Intervention(steer.Add(d.vector), d.site, strength=d.strength_of(0.2)))",
    "Intervention": "make a plan of it: steer.Plan(intervention)",
    "str": "wrap it: steer.Prompt(system='...') for a message, steer.plan_from_text for the text of a plan",
}


def _no_draws(draws: Any) -> ConfigError:
    return ConfigError("a control needs draws", expected="a whole number, 1 or more", found=draws, remedy="pass draws=8")


def _items_of_their_own() -> ConfigError:
    what = "outcomes bring their own items"
    return ConfigError(what, expected="no items beside a list of outcomes", found="items", remedy="leave `items` out")


def _controls_no_arm(name: str, arms: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        f"arm '{name}' is a control of no arm",
        expected="steer.matched of the very plan or treatment that another arm holds",
        found=f"one that is in none of {', '.join(map(str, arms))}",
        remedy="make the plan once, and pass it to the arm and to steer.matched",
    )


def _no_treatment(name: Any, given: Any) -> ConfigError:
    return ConfigError(
        f"arm '{name}' has no treatment",
        expected="None, a steer.Plan, a steer.edits.Edit, a treatment such as steer.Prompt, or steer.matched of one",
        found=type(given).__name__,
        remedy=_WRAPPED.get(type(given).__name__, "wrap it: steer.Plan(...) for an intervention, steer.Prompt(system='...') for a message"),
    )
