"""Operators and gates of somebody else's that break the rules: each is refused before a hook is installed, with its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hand import ids, vector

from steer.errors import ConfigError, NonFiniteError
from steer.intervene import GATES, OPERATORS, Add, Intervention, Operator, Plan
from steer.intervene.gate import SiteGate
from steer.intervene.low_rank import LowRank, unit

SITE = "layers.1.output"
WIDTH = 32


@pytest.fixture
def registries() -> Iterator[None]:
    """As they were before the test."""
    OPERATORS.load()
    GATES.load()
    kept = dict(OPERATORS._entries), dict(GATES._entries)
    yield
    OPERATORS._entries, GATES._entries = kept


pytestmark = pytest.mark.usefixtures("registries")


def operator(delta: Callable, **attributes) -> Operator:
    class Own(Operator):
        parts = ("vector",)

        def __init__(self, vector: torch.Tensor) -> None:
            super().__init__({"vector": vector[None]}, len(vector))

    Own.delta = delta
    for name, value in attributes.items():
        setattr(Own, name, value)
    return OPERATORS.register("own")(Own)(vector())


def gate(margin: Callable, **options) -> SiteGate:
    class Own(SiteGate):
        def __init__(self) -> None:
            super().__init__({"vector": vector()[None]}, WIDTH, **options)

    Own.margin = margin
    return GATES.register("own")(Own)()


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def refused(plan: Plan, model: torch.nn.Module, error: type[Exception], match: str) -> None:
    before = hooks_of(model)
    for use in (plan.attach, plan.validate):
        with pytest.raises(error, match=match):
            use(model)
    assert hooks_of(model) == before


NO_CHANGE = "operator 'own' does not give a change"
OPERATOR_MISTAKES = {
    "too wide": (lambda _, h, s, t: torch.ones(WIDTH + 1), ConfigError, NO_CHANGE),
    "another batch": (lambda _, h, s, t: torch.ones(3, 3, WIDTH), ConfigError, NO_CHANGE),
    "a dimension more": (lambda _, h, s, t: h[None] * s, ConfigError, NO_CHANGE),
    "tokens only": (lambda _, h, s, t: h.sum(-1), ConfigError, NO_CHANGE),
    "nothing": (lambda _, h, s, t: None, ConfigError, NO_CHANGE),
    "a number": (lambda _, h, s, t: 1.0, ConfigError, NO_CHANGE),
    "an array": (lambda _, h, s, t: h.numpy(), ConfigError, NO_CHANGE),
    "fp64": (lambda _, h, s, t: (s * h).double(), ConfigError, NO_CHANGE),
    "fp16": (lambda _, h, s, t: (s * h).half(), ConfigError, NO_CHANGE),
    "one number of tokens": (lambda _, h, s, t: torch.ones(3, 1) * s, ConfigError, "operator 'own' does not give the activation"),
    "NaN": (lambda _, h, s, t: s * h / 0, NonFiniteError, "what operator 'own' gives is not finite"),
    "in place": (lambda _, h, s, t: h.mul_(1 + s), ConfigError, "operator 'own' writes into `h`"),
    "in place of its vector": (lambda _, h, s, t: s * t["vector"].add_(1), ConfigError, "operator 'own' writes into `vector`"),
    "strength forgotten": (lambda _, h, s, t: t["vector"].unsqueeze(1).expand_as(h), ConfigError, "operator 'own' acts at strength 0"),
    "a part misspelt": (lambda _, h, s, t: t["vectr"], ConfigError, "operator 'own' failed(.|\n)*KeyError: 'vectr'"),
}


@pytest.mark.parametrize("mistake", OPERATOR_MISTAKES)
@pytest.mark.parametrize("scope", ["all", "last"])
def test_what_an_operator_gives(mistake, scope, tiny):
    delta, error, match = OPERATOR_MISTAKES[mistake]
    refused(Plan(Intervention(operator(delta), SITE, scope)), tiny("llama"), error, match)


def test_the_original_error_stays_in_sight(tiny):
    plan = Plan(Intervention(operator(lambda _, h, s, t: 1 / 0), SITE))
    with pytest.raises(ConfigError) as caught:
        plan.attach(tiny("llama"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_operator_that_overrides_apply_leaves_masked_tokens_alone(tiny):
    own = operator(Operator.delta, apply=lambda _, h, s, mask, t: h + s.to(h.dtype))
    refused(Plan(Intervention(own, SITE)), tiny("llama"), ConfigError, "operator 'own' acts where its mask is 0")


def test_claims_that_are_not_so(tiny):
    """Decoded tokens would be steered otherwise than the prompt."""
    model = tiny("llama")

    class Minus(Add):
        def delta(self, h, strength, per_row):
            return -super().delta(h, strength, per_row)

    refused(Plan(Intervention(Minus(vector()), SITE)), model, ConfigError, "says that it is `additive` and is not")
    squared = operator(lambda _, h, s, t: (s * s * t["vector"].unsqueeze(1)).to(h.dtype), linear_in_strength=True)
    refused(Plan(Intervention(squared, SITE)), model, ConfigError, "says that it is `linear_in_strength` and is not")


def test_an_operator_by_the_rules_is_tried_once_and_steers(tiny):
    calls = []

    def delta(_, h, strength, per_row):
        calls.append(h.shape)
        return (strength * per_row["vector"].unsqueeze(1)).to(h.dtype)

    model, own = tiny("llama"), operator(delta, linear_in_strength=True, additive=True)
    state = torch.get_rng_state()
    plan = Plan(Intervention(own, SITE))
    plan.validate(model)
    tried = len(calls)
    with torch.no_grad(), plan.attached(model):
        assert len(calls) == tried
        steered = model(ids()).logits
    with torch.no_grad(), Plan(Intervention(Add(vector()), SITE)).attached(model):
        assert torch.equal(model(ids()).logits, steered)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_one_of_low_rank_passes_in_every_type(dtype, tiny):
    class Shrink(LowRank):
        parts = ("direction",)
        reads = writes = "direction"
        linear_in_strength = True

        def __init__(self, vector: torch.Tensor) -> None:
            direction, _ = unit(vector, "direction")
            super().__init__({"direction": direction}, direction.shape[-1])

        def change(self, x, strength, per_row):
            return -strength * x.clamp_min(0)

    own = OPERATORS.register("own")(Shrink)(torch.stack([vector(), -vector()]))
    model = tiny("llama").to(dtype)
    with torch.no_grad(), Plan(Intervention(own, SITE, preserve_norm=True)).attached(model) as attachment:
        attachment.set_rows([0, 1])
        assert model(ids()[:1].repeat(2, 1)).logits.isfinite().all()


# ---- constructors


def test_a_constructor_that_leaves_its_base_class_out():
    class Own(Operator):
        parts = ("vector",)

        def __init__(self, vector: torch.Tensor) -> None:
            self.vector = vector

    with pytest.raises(ConfigError, match="operator 'own' was not initialised"):
        Intervention(OPERATORS.register("own")(Own)(vector()), SITE)

    class OwnGate(SiteGate):
        def __init__(self) -> None:
            self.site = None

    with pytest.raises(ConfigError, match="gate 'own' was not initialised"):
        Intervention(Add(vector()), SITE, gate=GATES.register("own")(OwnGate)())


def test_tensors_and_parts():
    class Own(Operator):
        parts = ("vector",)

        def __init__(self, tensor, width: int = WIDTH) -> None:
            super().__init__({"vector": tensor}, width)

    with pytest.raises(ConfigError, match="'Own' has no name"):
        Own(vector()[None])
    OPERATORS.register("own")(Own)
    with pytest.raises(ConfigError, match=r"'vector' of operator 'own' has the wrong shape(.|\n)*found: \[32\]"):
        Own(vector())
    with pytest.raises(ConfigError, match="'vector' of operator 'own' has the wrong shape"):
        Own(vector()[None], 7)
    for tensor in ([1.0] * WIDTH, torch.tensor(1.0), vector()[None].to_sparse(), vector()[None].to("meta"), vector()[None] * 1j):
        with pytest.raises(ConfigError, match="'vector' of 'own' is no tensor to work with"):
            Own(tensor)
    for parts in ((), "vector", ("vectr",)):
        Own.parts = parts
        with pytest.raises(ConfigError, match="operator 'own' does not say by `parts`"):
            Own(vector()[None])
    del Own.parts
    with pytest.raises(ConfigError, match="found: no `parts`"):
        Own(vector()[None])


def test_settings_come_back_from_a_file_as_they_were(tmp_path):
    class Own(Add):
        settings = ("shape", "pairs")

        def __init__(self, vector: torch.Tensor, shape: tuple[int, int], pairs: list[tuple[str, float]]) -> None:
            super().__init__(vector)
            self.shape = shape
            self.pairs = pairs

    own = OPERATORS.register("own")(Own)(vector(), (1, 2), [("a", 1.0), ("b", 2.0)])
    Plan(Intervention(own, SITE)).save(tmp_path / "plan")
    [loaded] = Plan.load(tmp_path / "plan").interventions
    assert (loaded.operator.shape, loaded.operator.pairs) == ((1, 2), [("a", 1.0), ("b", 2.0)])
    del own.shape
    with pytest.raises(ConfigError, match="operator 'own' lacks its setting 'shape'"):
        own.options()


# ---- gates

NO_MARGIN = "gate 'own' does not give a margin of each token"
GATE_MISTAKES = {
    "last dimension kept": (lambda _, h, ctx: h.sum(-1, keepdim=True), ConfigError, NO_MARGIN),
    "the activation": (lambda _, h, ctx: h, ConfigError, NO_MARGIN),
    "one of each row": (lambda _, h, ctx: h[:, 0, 0], ConfigError, NO_MARGIN),
    "transposed": (lambda _, h, ctx: h[..., 0].T, ConfigError, NO_MARGIN),
    "truth values": (lambda _, h, ctx: h[..., 0] > 0, ConfigError, NO_MARGIN),
    "nothing": (lambda _, h, ctx: None, ConfigError, NO_MARGIN),
    "a number": (lambda _, h, ctx: 1.0, ConfigError, NO_MARGIN),
    "NaN": (lambda _, h, ctx: h[..., 0] * torch.nan, NonFiniteError, "what gate 'own' gives is not finite"),
    "in place": (lambda _, h, ctx: h.mul_(2)[..., 0], ConfigError, "gate 'own' writes into `h`"),
    "raises": (lambda _, h, ctx: 1 / 0, ConfigError, "gate 'own' failed(.|\n)*ZeroDivisionError"),
}


@pytest.mark.parametrize("mistake", GATE_MISTAKES)
@pytest.mark.parametrize("options", [{}, {"per": "row"}, {"sharpness": 1.0}])
def test_what_a_gate_gives(mistake, options, tiny):
    margin, error, match = GATE_MISTAKES[mistake]
    plan = Plan(Intervention(Add(vector()), SITE, gate=~gate(margin, **options)))
    refused(plan, tiny("llama"), error, match)


def test_a_gate_may_look_at_its_pass(tiny):
    own = gate(lambda gate, h, ctx: (h @ gate.tensors["vector"][0]) * ctx.real * ctx.labelled * (ctx.ids >= 0) * (ctx.positions >= 0))
    Plan(Intervention(Add(vector()), SITE, gate=own)).validate(tiny("llama"))
