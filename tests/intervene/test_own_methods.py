"""Operators and gates of somebody else's that break the rules: each is refused before a hook is installed, with its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hand import ids, vector
from intervene.operator_cases import CASES

from steer import kernels
from steer.errors import ConfigError, NonFiniteError
from steer.intervene import GATES, OPERATORS, Ablate, Add, CallGate, Clamp, Intervention, Operator, Plan, Scale
from steer.intervene.gate import SiteGate
from steer.intervene.low_rank import LowRank, unit
from steer.intervene.operator import slotted
from steer.intervene.operator_trial import OperatorTrial

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
    "in place of its strength": (lambda _, h, s, t: s.mul_(2) * t["vector"].unsqueeze(1), ConfigError, "'own' writes into `strength`"),
    "in place of its own": (lambda own, h, s, t: s * own.tensors["vector"].mul_(2), ConfigError, "operator 'own' writes into `vector`"),
    "a part misspelt": (lambda _, h, s, t: t["vectr"], ConfigError, "operator 'own' failed(.|\n)*KeyError: 'vectr'"),
}


@pytest.mark.parametrize("mistake", OPERATOR_MISTAKES)
@pytest.mark.parametrize("scope", ["all", "last"])
def test_what_an_operator_gives(mistake, scope, tiny):
    delta, error, match = OPERATOR_MISTAKES[mistake]
    refused(Plan(Intervention(operator(delta), SITE, scope)), tiny("llama"), error, match)


def test_a_new_file_in_our_own_folder_is_tried_too(tiny):
    own = operator(lambda _, h, s, t: h.mul_(1.5))
    type(own).__module__ = "steer.intervene.operators.of_a_checkout"
    refused(Plan(Intervention(own, SITE)), tiny("llama"), ConfigError, "operator 'own' writes into `h`")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_every_operator_of_the_package_passes(name, dtype):
    h = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(31)).to(dtype)
    for seeds in ((0,), (0, 1), (0, 1, 2)):
        for strength in (1.0, -0.7, 8.0, 1e-3):
            for by_row in (False, True):
                with torch.no_grad():
                    OperatorTrial(CASES[name].make(seeds), h, strength, by_row).check()


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


def test_a_mask_is_a_share(tiny):
    def apply(_, h, strength, mask, per_row):
        return h + strength * (1 if mask is None else (mask > 0).to(h.dtype))

    own = operator(Operator.delta, apply=apply)
    refused(Plan(Intervention(own, SITE, "generated~2")), tiny("llama"), ConfigError, "operator 'own' takes its mask for a yes or no")


def slotted_operator(delta: Callable) -> Operator:
    class Own(Operator):
        parts = ("vector",)

        def __init__(self, vector: torch.Tensor) -> None:
            vector = slotted(vector, 2, "vector")
            super().__init__({"vector": vector}, vector.shape[-1])

    Own.delta = delta
    return OPERATORS.register("own")(Own)(torch.stack([vector(), vector(seed=2)]))


@pytest.mark.parametrize(
    "delta",
    [
        lambda own, h, s, t: (s * own.tensors["vector"].unsqueeze(1)).to(h.dtype),
        lambda own, h, s, t: (s * own.tensors["vector"][:1].unsqueeze(1)).to(h.dtype),
        lambda own, h, s, t: (s * t["vector"].flip(0).unsqueeze(1)).to(h.dtype),
        lambda own, h, s, t: (s[:1] * t["vector"].unsqueeze(1)).to(h.dtype),
    ],
)
def test_each_row_has_its_own_slot_and_strength(delta, tiny):
    own = slotted_operator(delta)
    refused(Plan(Intervention(own, SITE, strength=[1.0, 3.0])), tiny("llama"), ConfigError, "does not go by the row slot and the strength")


def test_rows_of_one_vector_may_differ_in_strength_alone(tiny):
    own = operator(lambda _, h, s, t: (s[:1] * t["vector"].unsqueeze(1)).to(h.dtype))
    Plan(Intervention(own, SITE, strength=2.0)).validate(tiny("llama"))
    refused(Plan(Intervention(own, SITE, strength=[1.0, 3.0])), tiny("llama"), ConfigError, "does not go by the row slot and the strength")


# ---- subclasses of built-in operators


class Reflect(Ablate):
    def change(self, x, strength, per_row):
        return -2 * strength * x


class Triple(Ablate):
    def factor(self, per_row):
        return -3.0


class Opposite(Ablate):
    def apply(self, h, strength, mask, per_row):
        return super().apply(h, -strength, mask, per_row)


class TwiceClamped(Clamp):
    def change(self, x, strength, per_row):
        return 2 * super().change(x, strength, per_row)


class TwiceAdded(Add):
    additive = False

    def delta(self, h, strength, per_row):
        return 2 * super().delta(h, strength, per_row)


class Rewritten(Scale):
    reads = "factor_rows"

    def __init__(self, direction: torch.Tensor, factor: float) -> None:
        super().__init__(direction, factor)
        self.tensors["factor_rows"] = self.tensors["direction"].roll(1, -1)


SUBCLASSES = {
    Reflect: lambda kind: kind(vector()),
    Triple: lambda kind: kind(vector()),
    Opposite: lambda kind: kind(vector()),
    TwiceClamped: lambda kind: kind(vector(), low=0.5),
    TwiceAdded: lambda kind: kind(vector()),
    Rewritten: lambda kind: kind(vector(), 3.0),
}


@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("kind", SUBCLASSES, ids=lambda kind: kind.__name__)
def test_a_subclass_that_says_another_edit_makes_it_on_every_path(kind, preserve_norm, tiny):
    model, prompt = tiny("llama"), ids()[:1]
    own = SUBCLASSES[kind](OPERATORS.register("own")(kind))
    with torch.no_grad(), Plan(Intervention(own, SITE, preserve_norm=preserve_norm)).attached(model):
        generated = model.generate(
            prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        whole = model(generated.sequences[:, :-1]).logits[:, prompt.shape[1] - 1 :]
        with kernels.force("op"):
            by_kernel = model(generated.sequences[:, :-1]).logits[:, prompt.shape[1] - 1 :]
    unsteered = model(generated.sequences[:, :-1]).logits[:, prompt.shape[1] - 1 :]
    assert not torch.allclose(whole, unsteered, atol=1e-3)
    assert torch.allclose(torch.stack(generated.logits, 1), whole, atol=1e-4)
    assert torch.allclose(by_kernel, whole, atol=1e-4)


def test_short_paths_of_its_own_have_to_say_the_same(tiny):
    class Own(Reflect):
        def factor(self, per_row):
            return 5.0

    class OwnKernel(Reflect):
        def kernel_arguments(self, strength, bank):
            return {"scale": 0.5}

    class Both(Ablate):
        def factor(self, per_row):
            return -1.0

        def change(self, x, strength, per_row):
            return -2 * strength * x

    model = tiny("llama")
    assert Own.kernel_arguments is LowRank.kernel_arguments
    for kind, path in ((OwnKernel, "kernel_arguments"), (Both, "factor")):
        own = OPERATORS.register("own")(kind)(vector())
        refused(Plan(Intervention(own, SITE)), model, ConfigError, f"operator 'own' makes another edit by its `{path}` than by its `apply`")
        del OPERATORS._entries["own"]


def test_a_delta_that_nothing_calls(tiny):
    class Own(Ablate):
        def delta(self, h, strength, per_row):
            return -2 * strength * h

    own = OPERATORS.register("own")(Own)(vector())
    refused(Plan(Intervention(own, SITE)), tiny("llama"), ConfigError, "overrides `delta`, which its `apply` does not call")

    class Template(Operator):
        parts = ("vector",)

        def __init__(self, vector: torch.Tensor) -> None:
            super().__init__({"vector": vector[None]}, len(vector))

        def apply(self, h, strength, mask, per_row):
            change = self.delta(h, strength, per_row)
            return h + (change if mask is None else mask * change)

    class Filled(Template):
        def delta(self, h, strength, per_row):
            return (strength * per_row["vector"].unsqueeze(1)).to(h.dtype)

    Plan(Intervention(OPERATORS.register("filled")(Filled)(vector()), SITE)).validate(tiny("llama"))


def test_is_affine_has_to_be_so(tiny):
    class Own(Add):
        additive = False

        def delta(self, h, strength, per_row):
            return strength * torch.tanh(h)

    own = OPERATORS.register("own")(Own)(vector())
    refused(Plan(Intervention(own, SITE)), tiny("llama"), ConfigError, "operator 'own' says that it is `is_affine` and is not")


# ---- operators by the rules


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


# ---- other methods that a class may have


def fails(*_):
    return 1 / 0


def test_other_methods_that_fail_are_named(tiny, tmp_path):
    def delta(_, h, strength, per_row):
        return (strength * per_row["vector"].unsqueeze(1)).to(h.dtype)

    uses = {
        "check_site": lambda plan: plan(),
        "check_model": lambda plan: plan().attach(tiny("llama")),
        "options": lambda plan: plan().save(tmp_path / "plan"),
        "describe": lambda plan: plan().explain(),
    }
    for method, use in uses.items():
        own = operator(delta, **{method: fails})
        with pytest.raises(ConfigError, match=f"`{method}` of operator 'own' failed(.|\n)*ZeroDivisionError"):
            use(lambda own=own: Plan(Intervention(own, SITE)))
    for method in ("options", "describe"):
        own = operator(delta, **{method: lambda _: None})
        with pytest.raises(ConfigError, match=f"wrong type for .*`{method}` of operator 'own'"):
            uses[method](lambda own=own: Plan(Intervention(own, SITE)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("learnable", ["vector", ["vector"], (3,), None])
def test_learnable_is_a_tuple_of_names(learnable):
    with pytest.raises(ConfigError, match="'own' does not say by `learnable`"):
        operator(Operator.delta, learnable=learnable)


def test_what_cannot_be_learned_is_named():
    own = operator(Operator.delta, learnable=("vector", "vectr"))
    with pytest.raises(ConfigError, match=r"'vectr' of 'own' cannot be learned(.|\n)*did you mean 'vector'"):
        own.train()
    assert not own.parameters
    whole = operator(Operator.delta, learnable=("vector",))
    whole.tensors["vector"] = whole.tensors["vector"].long()
    with pytest.raises(ConfigError, match=r"'vector' of 'own' cannot be learned(.|\n)*torch.int64"):
        whole.train()
    soft = gate(lambda own, h, ctx: h[..., 0], sharpness=1.0)
    type(soft).learnable = ("threshold",)
    with pytest.raises(ConfigError, match="'threshold' of 'own' cannot be learned"):
        soft.train()


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
    "in place of its own": (lambda own, h, ctx: own.tensors["vector"].add_(1).sum() + h[..., 0], ConfigError, "'own' writes into `vector`"),
    "in place of the pass": (lambda _, h, ctx: h[..., 0] + ctx.ids.add_(1), ConfigError, "gate 'own' writes into `ids`"),
    "squeezed": (lambda _, h, ctx: h.sum(-1).squeeze(), ConfigError, NO_MARGIN),
    "squeezed rows": (lambda _, h, ctx: h.sum(-1).squeeze(0), ConfigError, NO_MARGIN),
    "of one number": (lambda _, h, ctx: h.sum(-1) if h.numel() > WIDTH else h.sum(), ConfigError, NO_MARGIN),
    "bf16": (lambda _, h, ctx: h.sum(-1).bfloat16(), ConfigError, NO_MARGIN),
    "whole numbers": (lambda _, h, ctx: h.sum(-1).long(), ConfigError, NO_MARGIN),
    "raises": (lambda _, h, ctx: 1 / 0, ConfigError, "gate 'own' failed(.|\n)*ZeroDivisionError"),
}


@pytest.mark.parametrize("mistake", GATE_MISTAKES)
@pytest.mark.parametrize("options", [{}, {"per": "row"}, {"sharpness": 1.0}])
def test_what_a_gate_gives(mistake, options, tiny):
    margin, error, match = GATE_MISTAKES[mistake]
    plan = Plan(Intervention(Add(vector()), SITE, gate=~gate(margin, **options)))
    refused(plan, tiny("llama"), error, match)


def test_a_gate_says_when_it_is_open(tiny):
    plan = Plan(Intervention(Add(vector()), SITE, gate=gate(SiteGate.margin)))
    refused(plan, tiny("llama"), ConfigError, "gate 'own' does not say when it is open")


def test_the_function_of_a_call_gate_sees_real_passes_only(tiny):
    seen = []

    def opens(h, ctx):
        seen.append(ctx.ids)
        return h[..., 0]

    model, prompt = tiny("llama"), ids()
    with Plan(Intervention(Add(vector()), SITE, gate=CallGate(opens, WIDTH))).attached(model):
        assert not seen
        model(prompt)
    assert torch.equal(seen[0], prompt)


def test_a_gate_may_look_at_its_pass(tiny):
    own = gate(lambda gate, h, ctx: (h @ gate.tensors["vector"][0]) * ctx.real * ctx.labelled * (ctx.ids >= 0) * (ctx.positions >= 0))
    Plan(Intervention(Add(vector()), SITE, gate=own)).validate(tiny("llama"))
