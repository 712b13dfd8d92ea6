"""What is saved of a method comes back as an equal one, or saving says what would be lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import InitVar, dataclass, field

import pytest
import torch
from hand import vector

import steer
from steer.directions import Direction
from steer.errors import ConfigError, NonFiniteError, SteerError
from steer.intervene import GATES, METHODS, OPERATORS, SCHEDULES, Add, CosineGate, Intervention, Linear, Plan, ProbeGate, Schedule
from steer.intervene.gate import And as AndGate
from steer.intervene.gate import SiteGate
from steer.intervene.operator import Operator
from steer.model.site import Site

SITE = "layers.1.output"
V = vector()


@pytest.fixture(autouse=True)
def own_methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers goes again."""
    for registry in METHODS:
        registry.load()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    yield


def saved(tmp_path, operator=None, **options) -> Intervention:
    """The intervention that comes back from a file."""
    plan = Plan(Intervention(operator or Add(V), SITE, **options))
    return Plan.load(plan.save(tmp_path / "plan")).interventions[0]


class Gained(Operator):
    parts = ("vector",)
    gain = 1.0

    def __init__(self, vector, gain=1.0):
        super().__init__({"vector": vector[None]}, vector.shape[-1])
        self.gain = gain

    def delta(self, h, strength, per_row):
        return (strength * self.gain * per_row["vector"].unsqueeze(1)).to(h.dtype)


class Powered(SiteGate):
    def __init__(self, vector, power=1.0, **options):
        super().__init__({"vector": vector.reshape(1, -1)}, vector.shape[-1], **options)
        self.power = power

    def margin(self, h, ctx):
        return self.power * (h @ self.tensors["vector"][0])


# ---- classes without a name of their own


def test_a_class_that_inherits_its_name_is_not_saved_under_it(tmp_path):
    class Minus(Add):
        """Not registered."""

    class NotCosine(CosineGate):
        """Not registered."""

    class Slower(Linear):
        """Not registered."""

    class Both(AndGate):
        """Not registered."""

    for plan, said in (
        (
            Plan(Intervention(Minus(V), SITE)),
            r"class of an operator[\s\S]*Minus, which would be read as \S*add\.Add, [\s\S]*OPERATORS\.register",
        ),
        (Plan(Intervention(Add(V), SITE, gate=~NotCosine(V))), r"class of a gate[\s\S]*NotCosine[\s\S]*CosineGate[\s\S]*@GATES\.register"),
        (Plan(Intervention(Add(V), SITE, schedule=Slower(3))), r"class of a schedule[\s\S]*Slower[\s\S]*Linear[\s\S]*@SCHEDULES\.register"),
        (Plan(Intervention(Add(V), SITE, gate=Both(ProbeGate(V), ProbeGate(V)))), r"combination of gates[\s\S]*Both[\s\S]*'and'"),
    ):
        with pytest.raises(ConfigError, match=said):
            plan.save(tmp_path / "plan")
        assert not list(tmp_path.iterdir())


def test_a_class_that_inherits_its_name_has_no_text_form():
    class Minus(Add):
        """Not registered."""

    direction = Direction(Site.parse(SITE), V, "m", "response")
    with pytest.raises(ConfigError, match=r"neither a file nor a text[\s\S]*Minus"):
        steer.plan_to_text(Plan(Intervention(Minus(V), SITE)), {"warm": direction})
    OPERATORS.register("minus-one")(Minus)
    with pytest.raises(ConfigError, match=r"no text form[\s\S]*whose name is no word, 'minus-one'"):
        steer.plan_to_text(Plan(Intervention(Minus(V), SITE)), {"warm": direction})


# ---- settings and options that were forgotten


def test_an_operator_that_forgets_a_setting_is_not_saved(tmp_path):
    OPERATORS.register("gained")(Gained)
    said = r"operator 'gained' would lose its attribute 'gain'[\s\S]*gain=5\.0[\s\S]*1\.0 in its place[\s\S]*name 'gain' in `settings`"
    for write in (
        lambda plan: plan.save(tmp_path / "plan"),
        lambda plan: steer.plan_to_text(plan, {"warm": Direction(Site.parse(SITE), V, "m", "response")}),
    ):
        with pytest.raises(ConfigError, match=said):
            write(Plan(Intervention(Gained(V, 5.0), SITE)))
    Gained.settings = ("gain",)
    try:
        assert saved(tmp_path, Gained(V, 5.0)).operator.gain == 5.0
    finally:
        Gained.settings = ()


def test_a_gate_that_forgets_an_option_is_not_saved(tmp_path):
    GATES.register("powered")(Powered)
    with pytest.raises(
        ConfigError, match=r"gate 'powered' would lose its attribute 'power'[\s\S]*power=-1\.0[\s\S]*return 'power' from options\(\)"
    ):
        saved(tmp_path, gate=Powered(V, -1.0))

    @GATES.register("told")
    class Told(Powered):
        def options(self):
            return {**super().options(), "power": self.power}

    @GATES.register("alone")
    class Alone(Powered):
        def options(self):
            return {"power": self.power}

    assert saved(tmp_path, gate=Told(V, -1.0, per="row")).gate.power == -1.0
    with pytest.raises(ConfigError, match=r"gate 'alone' would lose its attribute 'per'"):
        saved(tmp_path, gate=Alone(V, -1.0, per="row"))


def test_what_is_derived_from_the_rest_may_come_back_by_itself(tmp_path):
    @OPERATORS.register("with_tuple")
    class WithTuple(Gained):
        settings = ("gain", "shape")

        def __init__(self, vector, shape=(1, 2)):
            super().__init__(vector)
            self.shape = shape

    @GATES.register("derived")
    class Derived(SiteGate):
        def __init__(self, vector, **options):
            super().__init__({"vector": vector.reshape(1, -1)}, vector.shape[-1], **options)
            self.half = self.width // 2
            self.activation = torch.nn.ReLU()
            self.function = torch.tanh
            self.unit = self.tensors["vector"] / self.tensors["vector"].norm()
            self.by_name = {"a": (1, lambda x: x)}

    assert saved(tmp_path, WithTuple(V, (3, 4)), gate=Derived(V)).operator.shape == (3, 4)


def test_a_method_that_cannot_be_made_again_says_why(tmp_path):
    @OPERATORS.register("offset")
    class Offset(Operator):
        parts = ("vector",)

        def __init__(self, vector, offset=0):
            super().__init__({"vector": vector[None]}, vector.shape[-1])
            self.offset = offset

    @GATES.register("other_names")
    class OtherNames(SiteGate):
        def __init__(self, condition, **options):
            super().__init__({"vector": condition.reshape(1, -1)}, condition.shape[-1], **options)

    @GATES.register("doubling")
    class Doubling(SiteGate):
        def __init__(self, vector, **options):
            super().__init__({"vector": 2 * vector.reshape(1, -1)}, vector.shape[-1], **options)

    @OPERATORS.register("with_tensor")
    class WithTensor(Gained):
        settings = ("gain",)

    for options, said in (
        ({"operator": Offset(V, 3)}, r"'offset' would lose its attribute 'offset'"),
        ({"operator": WithTensor(V, V)}, r"operator 'with_tensor'\.gain is no JSON value"),
        ({"gate": OtherNames(V)}, r"'other_names' cannot be made again[\s\S]*'condition'[\s\S]*names of the tensors"),
        ({"gate": Doubling(V)}, r"'doubling' changes its tensors[\s\S]*vector"),
    ):
        with pytest.raises(ConfigError, match=said):
            saved(tmp_path, **options)


def test_a_diverged_tensor_is_refused_when_it_is_saved(tmp_path):
    operator = Add(V).train()
    plan = Plan(Intervention(operator, SITE))
    with torch.no_grad():
        plan.parameters()[0].fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="vector of 'add' is not finite"):
        plan.save(tmp_path / "plan")


# ---- schedules


def test_a_schedule_comes_back_equal_or_is_not_saved(tmp_path):
    @SCHEDULES.register("plain")
    class Plain(Schedule):
        def __call__(self, step):
            return 1.0

    @SCHEDULES.register("hidden")
    @dataclass
    class Hidden(Schedule):
        every: int = 2

        def __post_init__(self):
            self.factor = 1.0

        def __call__(self, step):
            return self.factor

    @SCHEDULES.register("once")
    @dataclass
    class Once(Schedule):
        factor: InitVar[float] = 1.0
        kept: float = field(default=1.0, init=False)

        def __post_init__(self, factor):
            self.kept = factor

        def __call__(self, step):
            return self.kept

    changed = Hidden(3)
    changed.factor = 0.5
    for schedule, said in (
        (Plain(), r"'plain' has no file form[\s\S]*@dataclass"),
        (changed, r"'hidden' would lose its attribute 'factor'[\s\S]*factor=0\.5[\s\S]*make 'factor' a field"),
        (Once(0.5), r"'once' does not take these arguments"),
    ):
        with pytest.raises(SteerError, match=said):
            saved(tmp_path, schedule=schedule)
    assert saved(tmp_path, schedule=Hidden(5)).schedule == Hidden(5)
