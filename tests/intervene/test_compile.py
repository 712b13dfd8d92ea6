"""torch.compile: one whole graph, not traced again for a change of strength, vector or switch; and no order of events steers nothing."""

import pytest
import torch
import torch._dynamo
from families import FAMILIES
from hand import edited, ids, padded, vector
from torch._dynamo.utils import counters
from transformers.generation.configuration_utils import CompileConfig

from steer.errors import HookDidNotRunError
from steer.intervene import Ablate, Add, Intervention, Linear, Plan
from steer.model.annotations import chat_roles
from steer.model.hooks import prepare_compile, undo_prepare_compile


@pytest.fixture
def tiny():
    """`tiny("llama")` has two blocks here: a trace takes half a second for each."""
    return lambda family: FAMILIES[family](**{"n_layer" if family == "gpt2" else "num_hidden_layers": 2})


def steered(scope: str = "all", **options) -> Plan:
    return Plan(
        [
            Intervention(Add(vector()), "layers.0.output", scope, **options),
            Intervention(Ablate(vector(seed=2)), "layers.1.attn.output", scope, **options),
            Intervention(Ablate(torch.stack([vector(seed=3), vector(seed=4)])), "layers.1.output", scope, **options),
        ]
    )


def agree(compiled, model, batch) -> torch.Tensor:
    with torch.no_grad():
        actual, expected = compiled(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits
    assert torch.allclose(actual, expected, atol=1e-5)
    return actual


# ---- what must not trace again


@pytest.mark.parametrize(("family", "scope"), [("llama", "all"), ("llama", "response"), ("gpt2", "positions[0,-2]"), ("gemma2", "last")])
def test_changes_trace_nothing_again(family, scope, tiny, backend):
    model, batch = tiny(family), padded("left")
    if family == "gpt2":  # its loss logs, which dynamo cannot trace
        del batch["labels"]
    plan = steered(scope, schedule=Linear(10, 1.0, 0.0))
    seen = []
    with plan.attached(model) as attachment:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for change in (
            lambda: None,
            lambda: attachment.set_strength(0.5),
            lambda: attachment.set_strength(-2.0, "add@layers.0.output"),
            lambda: attachment.step(3),
            lambda: attachment.enable(False, "ablate@layers.1.output"),
            lambda: attachment.enable(False),
            lambda: attachment.enable(True),
            lambda: plan.interventions[0].operator.tensors["vector"].copy_(vector(seed=7)[None]),
        ):
            change()
            seen.append(agree(compiled, model, batch))
        assert backend.graphs == 1
        changed = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(seen, seen[1:], strict=False)]
        assert all(changed)
        fired = attachment.fired()["add@layers.0.output"]
    with steered(scope).attached(model) as eager:  # 8 compiled and 8 eager passes, one of each switched off
        model(**batch)
        assert fired == 14 * eager.fired()["add@layers.0.output"]


def test_rows_and_their_strengths_trace_nothing_again(tiny, backend):
    model = tiny("llama")
    plan = Plan(Intervention(Add(torch.stack([vector(), vector(seed=2)])), "layers.1.output", strength=[1.0, 2.0]))
    with plan.attached(model) as attachment:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        seen = []
        for rows, strength in (([0, 1], [1.0, 2.0]), ([1, 1], [1.0, 2.0]), ([1, 0], [0.0, 3.0])):
            attachment.set_rows(rows)
            attachment.set_strength(strength)
            seen.append(agree(compiled, model, {"input_ids": ids()}))
        assert backend.graphs == 1 and not torch.allclose(seen[0], seen[1])


@pytest.mark.parametrize("train", [False, True])
def test_a_window_that_moves_traces_nothing_again(train, tiny, backend):
    model = tiny("llama").train(train)
    model.config.use_cache = False
    windows = ["response[:2]!tokens[7]~2", "prompt[1:]|positions[-1]&role[user]", "positions[3:]"]
    sites = ["layers.0.output", "layers.1.mlp.output", "layers.1.output"]
    plan = Plan([Intervention(Add(vector(seed=i)), site, window) for i, (site, window) in enumerate(zip(sites, windows, strict=True))])
    batch = padded("left")
    with plan.attached(model) as attachment, torch.set_grad_enabled(train), chat_roles(model, batch["input_ids"] % 4):
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        seen = []
        for window in ((0, 2), (1, 3), (None, 5), (-3, None), (-2, -1), (2, None)):
            attachment.set_window(*window)
            seen.append(compiled(**batch).logits.detach())
            assert torch.allclose(seen[-1], model(**batch).logits, atol=1e-5)
        assert backend.graphs == 1
        assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(seen, seen[1:], strict=False))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_training_step_has_the_gradients_of_the_eager_one(checkpointing, tiny, backend):
    runs = []
    for compile_ in (False, True):
        model = tiny("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
        plan = steered("response")
        with plan.attached(model) as attachment:
            call = torch.compile(model, backend="aot_eager", fullgraph=True) if compile_ else model
            for strength in (1.0, 0.5):
                attachment.set_strength(strength)
                call(**padded("right")).loss.backward()
        runs.append([p.grad for p in model.parameters()] + [torch.tensor(list(attachment.fired().values()))])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*runs, strict=True))
    assert counters["stats"]["unique_graphs"] == 1


def test_blocks_compiled_one_by_one(tiny, backend):
    """Sites on and inside separately compiled blocks; the context is made outside their graphs."""
    model = tiny("llama")
    sites = [f"layers.{layer}.{part}" for layer in range(2) for part in ("output", "mlp.output")]
    plan = Plan([Intervention(Add(vector()), site, "response") for site in sites])
    plans = []
    with plan.attached(model) as attachment, torch.no_grad():
        eager = model(**padded("left")).logits
        for block in model.model.layers:
            block.compile(backend=backend, fullgraph=True)
        for strength in (1.0, 1.0, 1.0, 0.5):
            attachment.set_strength(strength)
            plans.append((model(**padded("left")).logits, backend.graphs))
    assert torch.allclose(plans[0][0], eager, atol=1e-5) and not torch.allclose(plans[3][0], eager, atol=1e-3)
    assert plans[1][1] == plans[3][1]  # nothing is traced again from the second pass on


def test_through_the_compiled_wrapper(tiny, backend):
    """Attached to what torch.compile returned."""
    model = tiny("llama")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    batch = padded("left")
    plan = steered("response")
    with plan.attached(compiled) as attachment:
        for strength in (1.0, 2.0, 3.0):
            attachment.set_strength(strength)
            with torch.no_grad():
                logits = compiled(**batch).logits
                assert torch.allclose(logits, model(**batch).logits, atol=1e-5)
        assert backend.graphs == 1


# ---- orders of events


@pytest.mark.parametrize("prepared", [False, True])
def test_strengths_and_a_second_layer_after_a_plain_run(prepared, tiny, backend):
    """A hook that dynamo does not look at steers nothing, without a word: in every order each run is what the eager model does."""
    if prepared:
        prepare_compile()
    model, batch = tiny("llama"), {"input_ids": ids()}
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    plain = agree(compiled, model, batch)
    assert torch.equal(agree(compiled, model, batch), plain)
    attachment = steered().attach(model)
    first = agree(compiled, model, batch)
    assert not torch.allclose(first, plain, atol=1e-3)
    attachment.set_strength(0.5)
    weaker = agree(compiled, model, batch)
    assert not torch.allclose(weaker, first, atol=1e-3)
    with Plan(Intervention(Add(vector(seed=5)), "layers.0.mlp.output")).attached(model, stack=True):
        assert not torch.allclose(agree(compiled, model, batch), weaker, atol=1e-3)
    assert torch.equal(agree(compiled, model, batch), weaker)
    attachment.detach()
    assert torch.equal(agree(compiled, model, batch), plain)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_second_instance_is_steered_after_a_plain_run_of_the_first(prepared, tiny, backend):
    if prepared:
        prepare_compile()
    model, batch = tiny("llama"), {"input_ids": ids()}
    plain = agree(torch.compile(model, backend=backend, fullgraph=True), model, batch)
    model = tiny("llama")
    with steered().attached(model):
        assert not torch.allclose(agree(torch.compile(model, backend=backend, fullgraph=True), model, batch), plain, atol=1e-3)


@pytest.mark.parametrize(("how", "prepared"), [("wrapper", False), ("wrapper", True), ("in place", False), ("call", False)])
def test_attach_after_a_compiled_run_without_hooks(how, prepared, tiny, backend, monkeypatch):
    resets = []
    reset = torch._dynamo.reset
    monkeypatch.setattr(torch._dynamo, "reset", lambda: (resets.append(1), reset()))
    model = tiny("llama")
    if prepared:
        prepare_compile()
    batch = {"input_ids": ids()}
    if how == "in place":
        plain = tiny("llama")
        model.compile(backend=backend, fullgraph=True)
        call = model

        def eager(**kwargs):
            with torch.compiler.set_stance("force_eager"):
                return model(**kwargs)

        assert torch.allclose(plain(**batch).logits, model(**batch).logits, atol=1e-5)
    else:
        call = torch.compile(model if how == "wrapper" else model.__call__, backend=backend, fullgraph=True)
        eager = model

    plain = agree(call, eager, batch)
    plan = steered()
    attachment = plan.attach(model)
    first = agree(call, eager, batch)
    attachment.detach()
    assert torch.equal(agree(call, eager, batch), plain)
    attachment = plan.attach(model)
    assert torch.equal(agree(call, eager, batch), first) and not torch.allclose(first, plain, atol=1e-3)
    graphs = backend.graphs
    for _ in range(2):  # everything has been traced by now
        attachment.detach()
        assert torch.equal(agree(call, eager, batch), plain)
        attachment = plan.attach(model)
        assert torch.equal(agree(call, eager, batch), first)
    attachment.detach()
    assert backend.graphs == graphs and len(resets) == (0 if prepared else 1)


def test_a_second_layer_and_other_plans_later_on(tiny, backend):
    model = tiny("llama")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    batch = {"input_ids": ids()}
    seen = [agree(compiled, model, batch)]
    with steered().attached(model):
        seen.append(agree(compiled, model, batch))
        with Plan(Intervention(Add(vector(seed=5)), "layers.0.mlp.output")).attached(model, stack=True):
            seen.append(agree(compiled, model, batch))
        assert torch.equal(agree(compiled, model, batch), seen[1])
    graphs = backend.graphs
    for seed in (6, 7):  # another plan of the same shape finds the code of the first one
        later = steered()
        later.interventions[0].operator.tensors["vector"].copy_(vector(seed=seed)[None])
        with later.attached(model):
            seen.append(agree(compiled, model, batch))
    assert backend.graphs == graphs
    assert torch.equal(agree(compiled, model, batch), seen[0])
    assert not any(torch.allclose(a, b, atol=1e-3) for i, a in enumerate(seen) for b in seen[:i])


def test_other_instances_of_the_class(tiny, backend):
    """Code is cached per class: a plain twin, compiled before or after the attach, must not lend its code to the steered model."""
    batch = {"input_ids": ids()}
    before, model, after = tiny("llama"), tiny("llama"), tiny("llama")
    compiled = {m: torch.compile(m, backend=backend, fullgraph=True) for m in (before, model, after)}
    plain = agree(compiled[before], before, batch)
    with steered().attached(model):
        first = agree(compiled[model], model, batch)
        assert torch.equal(agree(compiled[after], after, batch), plain)
        assert torch.equal(agree(compiled[model], model, batch), first)
        assert torch.equal(agree(compiled[before], before, batch), plain)
    assert torch.equal(agree(compiled[model], model, batch), plain)
    assert not torch.allclose(first, plain, atol=1e-3)


@pytest.mark.parametrize("kind", ["block", "attention"])
def test_sites_nobody_armed(kind, tiny, backend):
    """Every module is covered, `module:` sites and fused columns included."""
    model = tiny("phi3")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    batch = {"input_ids": ids()}
    plain = agree(compiled, model, batch)
    site = {"block": "module:model.layers.1.mlp.down_proj:output", "attention": "layers.1.attn.v"}[kind]
    width = {"block": 32, "attention": 16}[kind]
    with Plan(Intervention(Add(vector(width)), site)).attached(model):
        assert not torch.allclose(agree(compiled, model, batch), plain, atol=1e-3)


def test_a_module_replaced_after_the_attach_is_noticed_when_compiled(tiny, backend):
    model = tiny("llama")
    with Plan(Intervention(Add(vector()), "layers.1.attn.z")).attached(model), torch.no_grad():
        model(ids())
        model.model.layers[1].self_attn.o_proj = torch.nn.Linear(32, 32, bias=False)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="HookDidNotRunError"):  # the trace ends where it is raised
            torch.compile(model, backend=backend, fullgraph=True)(ids())
        with pytest.raises(HookDidNotRunError, match="layers.1.attn.z"):
            torch.compile(model, backend=backend)(ids())
    counters.clear()


# ---- generation


def generate(model, backend, **options):
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = backend is not None
    batch = padded("left")
    return model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        compile_config=config if backend is not None else None,
        disable_compile=backend is None,
        cache_implementation="static",
        **options,
    )


@pytest.mark.parametrize(("scope", "prepared"), [("all", False), ("generated", True), ("positions[8,9]", False)])
def test_compiled_decoding_with_a_static_cache(scope, prepared, tiny, backend):
    """transformers keeps its compiled call on the model: a plain run first must not leave every decoded token unsteered."""
    if prepared:
        prepare_compile()
    model = tiny("llama")
    plain = generate(model, backend)
    assert torch.equal(plain, generate(model, None))
    plan = steered(scope)
    with plan.attached(model) as attachment:
        first = generate(model, backend)
        graphs = backend.graphs
        assert torch.equal(first, generate(model, None))
        attachment.set_strength(-3.0)
        second = generate(model, backend)
        assert torch.equal(second, generate(model, None)) and backend.graphs == graphs
    assert torch.equal(generate(model, backend), plain)
    assert not torch.equal(first, plain) or not torch.equal(second, plain)


def test_a_window_that_moves_traces_no_compiled_decode_again(tiny, backend):
    model = tiny("llama")
    plan = Plan(
        [Intervention(Add(4 * vector(seed=i)), "layers.1.output", scope) for i, scope in enumerate(("generated[:2]~3", "response[2:]"))]
    )
    said, traced = [], []
    with plan.attached(model) as attachment:
        for window in ((0, 2), (None, 3), (1, 2), (4, None)):
            attachment.set_window(*window)
            said.append(generate(model, backend))
            traced.append(backend.graphs)
            assert torch.equal(said[-1], generate(model, None))
        assert set(traced) == {traced[0]} != {0} and len({str(text) for text in said}) > 1
        attachment.set_window(0, 3, "add@layers.1.output")  # these two go their own ways from the start: they never shared a window
        generate(model, backend)
        assert backend.graphs == traced[0]


# ---- the switch itself


def test_looking_at_hooks_is_a_switch_of_the_process(backend):
    import torch._dynamo.config as config

    assert config.skip_nnmodule_hook_guards
    prepare_compile()
    prepare_compile()
    assert not config.skip_nnmodule_hook_guards
    undo_prepare_compile()
    assert config.skip_nnmodule_hook_guards


def test_without_the_switch_a_hook_would_be_ignored(tiny, backend):
    """Why all this: should a later torch look at hooks by default, this fails and `prepare_compile` can go."""
    model = tiny("llama")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        plain = compiled(ids()).logits
        with edited(model.model.layers[1], lambda h: h + vector()):
            assert torch.equal(compiled(ids()).logits, plain)
