"""`steer.compare` on a tiny model: what it measures is what one measures by hand, and the model is as it was afterwards."""

from __future__ import annotations

import dataclasses
import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from edits.edit_helpers import random_edit
from experiment.metrics.metric_helpers import PAIRS
from families import FAMILIES, WIDTH
from hand import hook_count
from tiny_tokenizer import tiny_tokenizer
from torch import nn

import steer
from steer.directions import Direction
from steer.errors import ConfigError, ContextError, NonFiniteError
from steer.experiment.compare import compare, matched
from steer.experiment.metric import measured, metric_of, with_ids, with_system
from steer.experiment.outcome import Outcome
from steer.experiment.scores import Place
from steer.experiment.treatments.data import TrainingData
from steer.experiment.treatments.prompt import Prompt
from steer.intervene import Intervention, Plan

ITEMS = with_ids(PAIRS)


@pytest.fixture
def model() -> nn.Module:
    return FAMILIES["llama"]()


@pytest.fixture
def plan() -> Plan:
    return Plan(Intervention(steer.Add(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))), "layers.1.output", name="warm"))


def run(model: nn.Module, arms: dict[str, Any], metric: Any = "logprob_gap", items: Any = PAIRS, **options: Any) -> Any:
    return compare(model, arms, metric, items, **{"better": "higher", "tokenizer": tiny_tokenizer(), **options})


def test_what_it_measures_is_what_one_measures_by_hand(model: nn.Module, plan: Plan) -> None:
    prompt = Prompt("be nice")
    result = run(
        model, {"plain": None, "warm": plan, "random": matched(plan, draws=3), "asked": prompt, "irrelevant": matched(prompt, draws=2)}
    )
    metric, tokenizer = metric_of("logprob_gap"), tiny_tokenizer()
    assert result.scores[Place("logprob_gap", "plain", 0, 0)] == measured(metric, model, tokenizer, ITEMS)
    with plan.attached(model):
        assert result.scores[Place("logprob_gap", "warm", 0, 0)] == measured(metric, model, tokenizer, ITEMS)
    assert result.scores[Place("logprob_gap", "asked", 0, 0)] == measured(metric, model, tokenizer, with_system(ITEMS, "be nice"))
    draws = [tuple(result.scores[Place("logprob_gap", "random", draw, 0)].values()) for draw in range(3)]
    own = tuple(result.scores[Place("logprob_gap", "warm", 0, 0)].values())
    assert len({*draws, own}) == 4 and result.scores.draws("irrelevant") == [0, 1]
    sizes = {arm["name"]: arm["matched_in"]["draws"] for arm in result.metrics["arms"]}
    assert all(size == pytest.approx(sizes["warm"][0], rel=0.02) for size in sizes["random"])
    assert all(size == sizes["asked"][0] for size in sizes["irrelevant"]) and sizes["asked"][0] == {"message": 2.0}
    primary = result.metrics["contrasts"][0]
    assert result.metrics["specificity"]["verdict"] in " ".join(str(result).split())
    assert (primary["a"], primary["b"], primary["seeds"]) == ("warm", "random", 1)


def test_a_result_prints_plots_and_is_saved(model: nn.Module, plan: Plan, tmp_path: Path) -> None:
    result = run(model, {"plain": None, "warm": plan}, prompts=["who are you"], max_new_tokens=3, question="Is it warm?")
    assert result.verdict in repr(result) and "warm" in str(result) and "warm" in result._repr_html_()
    said = result.metrics["completions"]
    assert set(said) == {"plain", "warm"} and said["plain"][0]["prompt"] == "who are you"
    assert result.metrics["question"]["text"] == "Is it warm?"
    result.save(tmp_path / "out")
    assert {file.name.partition(".")[0] for file in (tmp_path / "out").iterdir()} == {"metrics", "scores", "report"}
    assert "Is it warm?" in result.report(tmp_path / "page.html").read_text()
    pytest.importorskip("matplotlib")
    assert result.plot() is not None


def test_twice_is_the_same_whatever_happened_before(model: nn.Module, plan: Plan) -> None:
    arms = {"plain": None, "warm": plan, "random": matched(plan, draws=2)}
    torch.manual_seed(1)
    first = list(run(model, arms).scores.rows())
    torch.manual_seed(2)
    assert list(run(model, arms).scores.rows()) == first


def test_baked_is_the_same_as_attached(model: nn.Module, plan: Plan) -> None:
    arms = {"plain": None, "warm": plan, "random": matched(plan, draws=2), "asked": Prompt("be nice")}
    attached, baked = run(model, arms), run(model, arms, baked=True)
    for place in attached.scores:
        assert baked.scores[place] == pytest.approx(attached.scores[place], abs=1e-4), place
    assert {arm["name"]: arm["when"] for arm in baked.metrics["arms"]} == {
        "plain": "never",
        "warm": "baked",
        "random": "baked",
        "asked": "inference",  # a prompt is said in any case
    }


@pytest.mark.parametrize("stop", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("baked", [False, True])
def test_the_model_is_as_it_was_afterwards(model: nn.Module, plan: Plan, stop: type[BaseException] | None, baked: bool) -> None:
    model.train()
    model.lm_head.eval()  # type: ignore[operator, union-attr]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    calls: list[int] = []

    def words(model: Any, tokenizer: Any, items: Any) -> dict[str, float]:
        calls.append(1)
        if stop is not None and len(calls) == 2:  # within the arm that is steered
            raise stop("no")
        return {item["id"]: float(len(item["prompt"]) + len(calls) * i) for i, item in enumerate(items)}

    if stop is None:
        run(model, {"plain": None, "warm": plan}, words, baked=baked)
    else:
        with pytest.raises((stop, ConfigError)):
            run(model, {"plain": None, "warm": plan}, words, baked=baked)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert [module.training for module in model.modules()] == modes and hook_count(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_several_outcomes_with_their_roles(model: nn.Module, plan: Plan) -> None:
    outcomes = [
        Outcome("gap", "logprob_gap", PAIRS, role="primary", better="higher"),
        Outcome("text", "perplexity", PAIRS, role="guardrail", margin=0.02),
    ]
    result = compare(model, {"plain": None, "warm": plan}, outcomes, tokenizer=tiny_tokenizer())
    assert result.scores.outcomes == ["gap", "text"] and [each["metric"] for each in result.metrics["guardrails"]] == ["text"]
    assert " ".join(result.metrics["guardrails"][0]["verdict"].split()) in " ".join(str(result).split())
    with pytest.raises(ConfigError, match="outcomes bring their own items"):
        compare(model, {"plain": None, "warm": plan}, outcomes, PAIRS, tokenizer=tiny_tokenizer())


def test_a_model_and_its_tokenizer_come_from_load(tmp_path: Path, plan: Plan) -> None:
    from tiny_experiment import write_model

    loaded, _ = steer.load(write_model(tmp_path / "model"))
    assert compare(loaded, {"plain": None, "warm": plan}, "logprob_gap", PAIRS, better="higher").verdict


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        (lambda plan: {"plain": None, "warm": "2 warm"}, r"arm 'warm' has no treatment[\s\S]*steer.plan_from_text"),
        (lambda plan: {"plain": None, "warm": 3}, "arm 'warm' has no treatment"),
        (lambda plan: {"plain": None, "random": matched(plan)}, "arm 'random' is a control of no arm"),
        (lambda plan: {"plain": None}, "nothing is done in any arm"),
        (lambda plan: {"warm": plan}, "'warm' is compared with nothing"),
        (lambda plan: {}, "nothing is done in any arm"),
        (lambda plan: [plan], "the arms"),
        (lambda plan: {"plain": None, 1: plan}, "name of an arm"),
        (lambda plan: {"": None, "warm": plan}, "name of an arm"),
        (lambda plan: {"plain": None, "data": TrainingData(without={"a": 1})}, "cannot act with when=inference"),
    ],
)
def test_arms_that_cannot_be_compared(model: nn.Module, plan: Plan, arms: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(model, arms(plan))


def test_a_control_of_nothing_or_of_no_draws(plan: Plan) -> None:
    for wrong in (None, "plan", matched(plan)):
        with pytest.raises(ConfigError, match="the treatment to match"):
            matched(wrong)  # type: ignore[arg-type]
    for draws in (0, -1, True, 2.5):
        with pytest.raises(ConfigError, match="needs draws"):
            matched(plan, draws=draws)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        (lambda items, call: dict.fromkeys([item["id"] for item in items], 1.0), ConfigError, "the same for every item"),
        (lambda items, call: {item["id"]: float(i) for i, item in enumerate(items[call - 1 :])}, ConfigError, "values of other items"),
        (lambda items, call: {item["id"]: math.nan for item in items}, NonFiniteError, "not finite"),
        (lambda items, call: {item["id"]: "much" for item in items}, ConfigError, "gives no number"),
        (lambda items, call: None, ConfigError, "gives no numbers"),
    ],
)
def test_metrics_that_cannot_be_compared(model: nn.Module, plan: Plan, values: Any, error: type[Exception], says: str) -> None:
    calls: list[int] = []

    def metric(model: Any, tokenizer: Any, items: Any) -> Any:
        calls.append(1)
        return values(items, len(calls))

    with pytest.raises(error, match=says):
        run(model, {"plain": None, "warm": plan}, metric)


@pytest.mark.parametrize(
    ("metric", "items", "says"),
    [
        ("logprob_gp", PAIRS, "did you mean 'logprob_gap'"),
        ("logprob_gap", [], "nothing to measure"),
        ("logprob_gap", [{"prompt": "a"}], "lacks"),
        ("logprob_gap", PAIRS[:1], "items"),
        ([], None, "one primary outcome"),
        (["logprob_gap"], None, "one of the outcomes"),
    ],
)
def test_metrics_and_items_that_do_not_go_together(model: nn.Module, plan: Plan, metric: Any, items: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(model, {"plain": None, "warm": plan}, metric, items)


def test_a_control_needs_texts_that_its_size_is_measured_on(model: nn.Module, plan: Plan) -> None:
    def metric(model: Any, tokenizer: Any, items: Any) -> Any:
        return {item["id"]: float(i) for i, item in enumerate(items)}

    with pytest.raises(ConfigError, match="no texts on which the size"):
        run(model, {"plain": None, "warm": plan, "random": matched(plan)}, metric, [{"question": "a"}, {"question": "b"}])


def first_logits(model: nn.Module, tokenizer: Any, items: Any) -> list[float]:
    """A metric that does not think of gradients, and leaves the model in training mode."""
    values = [float(model(tokenizer(item["neutral"], return_tensors="pt").input_ids).logits[0, -1, 3]) for item in items]
    model.train()
    return values


def test_a_metric_that_leaves_gradients_on_and_the_mode_alone_is_steered_and_without_dropout(model: nn.Module, plan: Plan) -> None:
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5  # type: ignore[assignment]
    by_hand = []
    with torch.no_grad():
        model.eval()
        for arm in (nullcontext(), plan.attached(model)):
            with arm:
                by_hand.append(first_logits(model.eval(), tiny_tokenizer(), ITEMS))
    model.train()
    model.lm_head.eval()
    result = run(model, {"plain": None, "warm": plan}, first_logits)
    name = next(iter(result.scores)).outcome
    for arm, values in zip(("plain", "warm"), by_hand, strict=True):
        assert list(result.scores[Place(name, arm, 0, 0)].values()) == values
    assert by_hand[0] != by_hand[1] and model.training and not model.lm_head.training


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"phases": ("train",)}, "does not act with when=inference"),
        ({"phases": ("generate",)}, "arm 'warm': nothing was measured under this plan: it acted on no token"),
        ({"scope": "generated"}, "arm 'warm': nothing was measured under this plan: it acted on no token"),
    ],
)
def test_an_arm_whose_plan_never_acted_is_not_called_without_effect(model: nn.Module, options: Any, says: str) -> None:
    idle = Plan(Intervention(steer.Add(torch.ones(WIDTH)), "layers.1.output", **options))
    with pytest.raises(ConfigError, match=says):
        run(model, {"plain": None, "warm": idle})
    assert hook_count(model) == 0


def test_a_plan_that_cannot_know_its_tokens_says_of_which_arm_and_metric(model: nn.Module) -> None:
    late = Plan(Intervention(steer.Add(torch.ones(WIDTH)), "layers.1.output", scope="generated"))

    def continued(model: nn.Module, tokenizer: Any, items: Any) -> list[float]:
        values = []
        for number, _ in enumerate(items):
            cache = model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
            for tokens in ([6, 7], [8, 9]):  # several at a time, which might be given or decoded
                logits = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits
            values.append(float(logits[0, -1, number]))
        return values

    with pytest.raises(ContextError, match=r"arm 'late': metric 'continued' runs passes[\s\S]*give the plan a scope[\s\S]*'all'") as raised:
        run(model, {"plain": None, "late": late}, continued)
    assert isinstance(raised.value.__cause__, ContextError) and hook_count(model) == 0


def test_a_metric_that_runs_no_pass_warns_at_the_line_of_the_caller(model: nn.Module, plan: Plan) -> None:
    with pytest.warns(UserWarning, match="no forward pass") as warned, pytest.raises(ConfigError, match="same for every item"):
        run(model, {"plain": None, "warm": plan}, lambda model, tokenizer, items: [1.0 for _ in items])
    assert warned[0].filename == __file__


def test_two_plans_are_compared_where_the_question_names_both(model: nn.Module, plan: Plan) -> None:
    arms = {"warm": plan, "warmer": Plan([dataclasses.replace(plan.interventions[0], strength=2.0)])}
    with pytest.raises(ConfigError, match=r"other treatments alone: warmer[\s\S]*primary=\('warm', 'warmer'\)"):
        run(model, arms)
    contrast = run(model, arms, primary=("warm", "warmer")).metrics["contrasts"][0]
    assert (contrast["a"], contrast["b"]) == ("warm", "warmer")


def test_a_direction_is_made_into_a_plan_as_the_error_says(model: nn.Module) -> None:
    direction = Direction(steer.Site.parse("layers.1.output"), torch.ones(WIDTH), "x", "all", {"activation_norm": 1.0})
    with pytest.raises(ConfigError) as raised:
        run(model, {"plain": None, "warm": direction})
    written = re.search(r"steer\.Plan\(.*\)(?=,)", raised.value.remedy)[0]
    assert run(model, {"plain": None, "warm": eval(written, {"steer": steer, "d": direction})}).scores


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"enabled": False}])
def test_an_edit_that_was_switched_off_is_an_arm(model: nn.Module, options: Any) -> None:
    off = Plan(Intervention(steer.Add(torch.ones(WIDTH)), "layers.1.output", **options))
    assert run(model, {"plain": None, "off": off}).metrics["contrasts"][0]["difference"] == 0


@pytest.mark.parametrize(
    ("options", "says"), [({"prompts": "hello"}, "the prompts"), ({"prompts": ["a"], "max_new_tokens": 0}, "needs room")]
)
def test_prompts_without_an_answer_are_refused_before_anything_is_measured(model: nn.Module, plan: Plan, options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(model, {"plain": None, "warm": plan}, lambda *_: pytest.fail("measured"), **options)


def test_an_edit_is_an_arm_beside_a_plan(model: nn.Module, plan: Plan) -> None:
    edit = random_edit(model, size=0.5)
    arms = {"plain": None, "edited": edit, "steered": plan, "random": matched(edit, draws=2)}
    result = run(model, arms)
    metric, tokenizer = metric_of("logprob_gap"), tiny_tokenizer()
    with edit.applied(model):
        assert result.scores[Place("logprob_gap", "edited", 0, 0)] == measured(metric, model, tokenizer, ITEMS)
    assert result.scores[Place("logprob_gap", "plain", 0, 0)] == measured(metric, model, tokenizer, ITEMS)  # and it is out again
    own, *draws = (
        [*result.scores[Place("logprob_gap", *place)].values()] for place in (("edited", 0, 0), ("random", 0, 0), ("random", 1, 0))
    )
    assert own not in draws and draws[0] != draws[1]
    assert run(model, arms, baked=True).scores[Place("logprob_gap", "edited", 0, 0)] == result.scores[Place("logprob_gap", "edited", 0, 0)]
