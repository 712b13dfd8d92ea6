"""Schedules against their closed forms."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_tables import check_table

from steer.errors import ConfigError, NonFiniteError
from steer.intervene import Add, Constant, Cosine, Intervention, Linear, Plan, WarmupDecay
from steer.intervene.schedule import SCHEDULES, Schedule, factor_at, from_dict, to_dict

STEPS = st.integers(0, 500)
COUNTS = st.integers(1, 200)
NUMBERS = st.floats(-5, 5)


@given(STEPS, NUMBERS)
def test_constant(step, value):
    assert Constant(value)(step) == value


@given(STEPS, COUNTS, NUMBERS, NUMBERS)
def test_linear(step, steps, start, end):
    expected = end if step >= steps else start * (1 - step / steps) + end * step / steps
    assert Linear(steps, start, end)(step) == pytest.approx(expected, abs=1e-9)


@given(STEPS, COUNTS, NUMBERS, NUMBERS)
def test_cosine(step, steps, start, end):
    share = math.cos(math.pi / 2 * min(step, steps) / steps) ** 2  # half-angle form
    assert Cosine(steps, start, end)(step) == pytest.approx(end + (start - end) * share, abs=1e-9)


@given(STEPS, COUNTS, COUNTS, st.integers(0, 200))
def test_warmup_and_decay(step, warmup, decay, level):
    total = warmup + level + decay
    if step <= warmup:
        expected = step / warmup
    elif step <= warmup + level:
        expected = 1.0
    else:
        expected = max(0.0, (total - step) / decay)
    assert WarmupDecay(warmup, decay, total)(step) == pytest.approx(expected)


EXAMPLES = {
    "constant": Constant(0.5),
    "linear": Linear(7, 1.0, 0.0),
    "cosine": Cosine(3),
    "warmup_decay": WarmupDecay(2, 3, 10),
}


def test_every_schedule_has_an_example():
    check_table(SCHEDULES, EXAMPLES, "EXAMPLES of tests/intervene/test_schedule.py", "an example, and a test of its closed form above")


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_schedule_survives_its_json_form(name):
    schedule = EXAMPLES[name]
    assert schedule.name == name
    assert from_dict(to_dict(schedule)) == schedule


def test_short_forms():
    assert from_dict(None) == Constant() and from_dict("constant") == Constant()


@pytest.mark.parametrize(
    "call",
    [
        lambda: Constant([1, 2]),
        lambda: Constant("1"),
        lambda: Constant(float("inf")),
        lambda: Linear(steps=3, start="a"),
        lambda: Linear(3, end=None),
        lambda: Cosine(3, end=[0.0]),
        lambda: WarmupDecay(1, 1, "10"),
        lambda: from_dict({"name": "constant", "value": "1"}),
    ],
)
def test_numbers_are_checked_where_a_schedule_is_made(call):
    with pytest.raises(ConfigError, match="schedule argument"):
        call()


def test_typos_are_named():
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        from_dict("cosin")
    with pytest.raises(ConfigError, match=r"does not take these arguments[\s\S]*stepz"):
        from_dict({"name": "linear", "stepz": 3})
    with pytest.raises(ConfigError, match="'steps' is too small"):
        Linear(0)
    with pytest.raises(ConfigError, match="overlap"):
        WarmupDecay(5, 6, 10)
    with pytest.raises(ConfigError, match=r"not registered[\s\S]*SCHEDULES.register"):
        to_dict(lambda step: 1.0)


# ---- schedules of one's own


class Stairs(Schedule):
    def __call__(self, step):
        return step // 10


@pytest.mark.parametrize("factor", ["1", None, 1j, True, [1.0], torch.ones(2), np.array([1.0]), np.bool_(True)])
def test_a_schedule_that_gives_no_number(factor):
    with pytest.raises(ConfigError, match="gives no factor of a strength"):
        Intervention(Add(torch.ones(4)), "layers.0.output", schedule=lambda step: factor)


@pytest.mark.parametrize("factor", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0)])
def test_a_schedule_may_give_any_kind_of_number(factor):
    assert factor_at(lambda step: factor, 0) == 2.0
    Intervention(Add(torch.ones(4)), "layers.0.output", schedule=lambda step: factor)


def test_a_schedule_that_fails_or_is_not_finite_is_named():
    with pytest.raises(ConfigError, match=r"schedule <function[\s\S]*at step 0 failed[\s\S]*ZeroDivisionError") as caught:
        from_dict(lambda step: 1 / step)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(NonFiniteError, match=r"schedule NaN[\s\S]*nan at step 0"):
        from_dict(nan := type("NaN", (Constant,), {"__call__": lambda self, step: math.nan})())
    with pytest.raises(NonFiniteError, match="nan at step 3"):
        factor_at(nan, 3)


def test_a_class_is_no_schedule():
    with pytest.raises(ConfigError, match=r"a schedule is of the wrong type[\s\S]*the class Linear: call it, e.g. Linear"):
        from_dict(Linear)


def test_only_fields_of_a_dataclass_can_be_saved(monkeypatch):
    SCHEDULES.load()
    monkeypatch.setattr(SCHEDULES, "_entries", dict(SCHEDULES._entries))
    with pytest.raises(ConfigError, match=r"schedule 'stairs' has no file form[\s\S]*dataclass"):
        to_dict(SCHEDULES.register("stairs")(Stairs)())


def test_a_strength_beyond_fp32_is_refused_before_anything_changes(tiny):
    def intervention(**options):
        return Intervention(Add(torch.ones(32)), "layers.1.output", name="x", **options)

    for options in ({"schedule": Constant(1e39)}, {"strength": 1e30, "schedule": Constant(1e9)}):
        with pytest.raises(NonFiniteError, match="strength x schedule of 'x' is beyond fp32"):
            intervention(**options)
    plan = Plan(intervention(strength=1e10, schedule=Linear(steps=2, start=1.0, end=1e30)))
    with pytest.raises(NonFiniteError, match="beyond fp32"):
        plan.interventions[0].strength_at(2)
    with plan.attached(tiny("llama")) as attachment:
        for change in (lambda: attachment.step(2), lambda: attachment.set_strength(1e38) or attachment.step(1)):
            before = attachment.state_dict()
            with pytest.raises(NonFiniteError, match="beyond fp32"):
                change()
            assert attachment.current_step == before["step"] and attachment["x"].strength.isfinite().all()
        attachment.set_strength(1.0)
        attachment.step(1)
        state = attachment.state_dict()
        with pytest.raises(NonFiniteError, match="beyond fp32"):
            attachment.set_strength([1e10])
        with pytest.raises(NonFiniteError, match="beyond fp32"):
            attachment.load_state_dict({**state, "interventions": {"x": {**state["interventions"]["x"], "base": torch.tensor([1e12])}}})
        assert attachment["x"].base == (1.0,) and attachment.state_dict()["interventions"]["x"]["base"].tolist() == [1.0]


def test_a_field_called_name_has_no_file_form(monkeypatch):
    SCHEDULES.load()
    monkeypatch.setattr(SCHEDULES, "_entries", dict(SCHEDULES._entries))

    @SCHEDULES.register("called")
    @dataclass(frozen=True)
    class Called(Schedule):
        name: str = "called"

        def __call__(self, step):
            return 1.0

    with pytest.raises(ConfigError, match="a field of the schedule .*Called is called 'name'"):
        to_dict(Called())
