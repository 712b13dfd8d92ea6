"""Clamps in plans: compiled, under gradient checkpointing, as text, of transcoders that read another site than they write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._dynamo
from families import FAMILIES
from features.feature_plans import CHOSEN, FEATURES, SITE, autoencoder, numbers
from hand import edited, ids, padded
from torch import Tensor, nn

import steer
from steer.errors import ConfigError, SiteError
from steer.features import Encoder, InMemory, Origin, Untrained
from steer.features.activations.jumprelu import JumpReLU
from steer.features.activations.topk import TopK
from steer.features.architectures.transcoder import Transcoder
from steer.intervene import Plan
from steer.model.anatomy import Anatomy
from steer.model.hooks import undo_prepare_compile

READ, WRITTEN = "layers.1.mlp.input", "layers.1.mlp.output"


def plan_of(operator: object, site: str = SITE, **options: object) -> Plan:
    return Plan(steer.Intervention(operator, site, **options))


def transcoder(activation: object = None, **options: object) -> Transcoder:
    activation = activation or JumpReLU(numbers(FEATURES, seed=1).abs())
    encoder = Encoder(InMemory(numbers(FEATURES, 32, seed=5)), numbers(FEATURES, seed=6), activation, **options)
    origin = Origin((READ,), (WRITTEN,))
    return Transcoder(encoder, InMemory(numbers(FEATURES, 32, seed=8)), numbers(32, seed=9), origin, skip=numbers(32, 32, seed=10))


@pytest.fixture
def new_process():
    torch._dynamo.reset()
    undo_prepare_compile()
    yield
    torch._dynamo.reset()
    undo_prepare_compile()


def with_gradient(model: nn.Module, called: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    output = called(**batch, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), Anatomy.find(model).embedding.weight.grad.clone()


@pytest.mark.parametrize("kind", ["gated", "topk", "keep only", "transcoder"])
def test_compiled_in_one_graph_and_driven_without_a_second(kind: str, tiny, new_process) -> None:
    model = tiny("llama")
    operator, site = {
        "gated": lambda: (steer.ClampFeatures(autoencoder("gated", untrained=Untrained(first=1)), CHOSEN, to=4.0), SITE),
        "topk": lambda: (steer.ClampFeatures(autoencoder("topk"), CHOSEN, scale=3.0), SITE),
        "keep only": lambda: (steer.KeepOnlyFeatures(autoencoder("jumprelu"), CHOSEN), SITE),
        "transcoder": lambda: (steer.ClampFeatures(transcoder(), CHOSEN, to=4.0), WRITTEN),
    }[kind]()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    batch = padded("right")
    with plan_of(operator, site).attached(model) as attachment:
        compiled = torch.compile(model, backend=count, fullgraph=True)
        for strength in (1.0, 0.3):
            attachment.set_strength(strength)
            expected, found = with_gradient(model, model, batch), with_gradient(model, compiled, batch)
            assert torch.allclose(found[0], expected[0], atol=1e-4) and torch.allclose(found[1], expected[1], atol=1e-4)
    assert len(graphs) == 1
    assert (model(**batch, use_cache=False).logits - expected[0]).abs().max() > 0.01


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["autoencoder", "transcoder"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, reentrant: bool, tiny) -> None:
    model = tiny("qwen2")
    model.train()
    operator = steer.ClampFeatures(autoencoder() if kind == "autoencoder" else transcoder(), CHOSEN, low=1.0)
    with plan_of(operator, SITE if kind == "autoencoder" else WRITTEN).attached(model) as attachment:
        model.enable_input_require_grads()
        expected = with_gradient(model, model, padded("left"))
        once = attachment.fired()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = with_gradient(model, model, padded("left"))
        assert {name: 2 * count for name, count in once.items()} == attachment.fired()
    assert torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], atol=1e-6)


# ---- transcoders


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("made", ["to", "top-k", "keep only"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
def test_a_transcoder_reads_the_input_of_the_mlp_and_its_error_stays(family: str, made: str, norm: str, tiny) -> None:
    model = tiny(family)
    dictionary = transcoder(TopK(12) if made == "top-k" else None, norm=norm)
    keep = torch.zeros(FEATURES, dtype=torch.float64).index_fill(0, torch.tensor(CHOSEN), 1)
    if made == "keep only":
        operator, new = steer.KeepOnlyFeatures(dictionary, CHOSEN), lambda f: f * keep
    else:
        operator, new = steer.ClampFeatures(dictionary, CHOSEN, to=3.0), lambda f: f * (1 - keep) + 3.0 * keep
    anatomy = Anatomy.find(model)
    read = anatomy.point(READ)
    seen: list[Tensor] = []

    def splice(out: Tensor) -> Tensor:
        x, wide = seen[-1].double(), out.double()
        f = dictionary.encode(x)
        return (dictionary.decode(new(f), x) + (wide - dictionary.decode(f, x))).to(out.dtype)

    batch = padded("right")
    handle = read.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with edited(anatomy.point(WRITTEN).module, splice):
        expected = with_gradient(model, model, batch)
    handle.remove()
    with plan_of(operator, WRITTEN).attached(model) as attachment:
        found = with_gradient(model, model, batch)
        assert sum(attachment.fired().values()) == int(batch["attention_mask"].sum())
    real = batch["attention_mask"].bool()
    assert (found[0] - expected[0])[real].abs().max() <= 1e-5 * expected[0].abs().max()
    assert (found[1] - expected[1]).abs().max() <= 3e-5 * expected[1].abs().max()
    assert (model(**batch).logits - expected[0])[real].abs().max() > 0.01


def test_a_transcoder_reads_what_an_earlier_edit_left(tiny) -> None:
    model = tiny("llama")
    dictionary, added = transcoder(), numbers(32, seed=12)
    plan = Plan(
        [steer.Intervention(steer.Add(added), READ), steer.Intervention(steer.ClampFeatures(dictionary, CHOSEN, scale=-1.0), WRITTEN)]
    )
    with plan.attached(model):
        together = model(ids(), use_cache=False).logits
        text = model.generate(
            ids(), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        )
        at_once = model(text.sequences, use_cache=False).logits
    for step, logits in enumerate(text.logits):
        assert torch.allclose(logits, at_once[:, 6 + step], atol=2e-4)
    mlp = Anatomy.find(model).point(READ).module

    def by_hand(x: Tensor) -> Tensor:
        f = dictionary.encode_selected(x + added, CHOSEN)
        return plain(x + added) + dictionary.decode_selected(-2 * f, CHOSEN)

    plain, mlp.forward = mlp.forward, by_hand
    assert torch.allclose(model(ids(), use_cache=False).logits, together, atol=1e-4)


def test_transcoders_that_no_plan_can_carry_are_refused() -> None:
    late = transcoder()
    late.origin = Origin((WRITTEN,), (READ,))
    with pytest.raises(ConfigError, match="comes after the one it edits"):
        plan_of(steer.ClampFeatures(late, 5, to=1.0), READ).validate(FAMILIES["llama"]())
    with pytest.raises(SiteError, match=WRITTEN):
        plan_of(steer.ClampFeatures(transcoder(), 5, to=1.0), READ)
    narrow = Transcoder(
        Encoder(InMemory(numbers(4, 24, seed=1)), None, TopK(2)), InMemory(numbers(4, 32, seed=2)), torch.zeros(32), transcoder().origin
    )
    with pytest.raises(ConfigError, match="24 and 32"):
        steer.AblateFeatures(narrow, 1)
    assert steer.AddDecoder(narrow, 1).width == 32


# ---- text


def test_a_plan_as_text_and_back() -> None:
    names = {"sae": autoencoder(untrained=Untrained(first=1)), "coder": transcoder()}
    added = "(coder, features=[5,7], amount=[2,0.1])"
    text = f"0.5 clamp(sae, feature=5, to=3)@generated - add{added} + keep_only(sae, features=[1,2]) ^"
    plan = steer.plan_from_text(text, names)
    first, second, third = plan.interventions
    assert (first.operator.name, first.operator.features, first.strength) == ("clamp_features", (5,), (0.5,))
    assert str(first.scope) == "generated!positions[0]"
    assert (str(second.site), second.strength, str(second.scope)) == (WRITTEN, (-1.0,), "all")
    assert torch.allclose(second.operator.tensors["vector"][0], torch.tensor([2, 0.1]) @ names["coder"].decoder_rows([5, 7]))
    assert third.preserve_norm and str(third.site) == SITE
    written = steer.plan_to_text(plan, names)
    clamped = "0.5 clamp_features(sae, feature=5, to=3):layers.1.output@generated!positions[0]"
    assert written.startswith(f"{clamped} - 1 add_decoder{added}:layers.1.mlp.output@all + 1 keep_only_features(")
    again = steer.plan_from_text(written, names)
    assert again.explain() == plan.explain() and steer.plan_to_text(again, names) == written
    for before, after in zip(plan.interventions, again.interventions, strict=True):
        assert all(torch.equal(before.operator.tensors[name], tensor) for name, tensor in after.operator.tensors.items())


def test_plans_without_a_text_form_are_refused() -> None:
    sae = autoencoder()
    with pytest.raises(ConfigError, match="no text form"):
        steer.plan_to_text(plan_of(steer.ClampFeatures(sae, 5, to=1.0)), {"other": autoencoder(spread=2.0)})
    with pytest.raises(ConfigError, match="no text form"):
        steer.plan_to_text(plan_of(steer.ClampFeatures(sae, 5, to=torch.tensor([[1.0], [2.0]]))), {"sae": sae})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clamp(sae, feature=5)", "none of them"),
        ("clamp(sae)", "either feature=5 or features"),
        ("sae", "'sae' is a dictionary, at character 1"),
        ("clamp(sae, feature=5, too=3)", "unexpected keyword argument 'too'"),
        ("clamp(sae, feature=x, to=3)", "can be read, at character 20"),
        ("clamp(sae, feature=5, to=3", "a bracket is not closed, at character 27"),
        ("clamp(sae, feature=5, feature=6, to=3)", "'feature' is said twice"),
        ("clamp(saw, feature=5, to=3)", "no dictionary is called 'saw'[\\s\\S]*did you mean 'sae'"),
        ("clamp(sae, feature=99, to=3)", "0 to 39[\\s\\S]*99"),
        ("clamp(sae, feature=5, to=3):layers.0.output", "not for the site 'layers.0.output', at character 29"),
        ("clamp(warm, feature=5, to=3)", "'warm' is a direction"),
    ],
)
def test_a_mistake_in_a_text_is_found(text: str, message: str) -> None:
    warm = steer.Direction(steer.Site.parse(SITE), torch.randn(32), "given", "last")
    with pytest.raises(ConfigError, match=message):
        steer.plan_from_text(text, {"sae": autoencoder(), "warm": warm})


def test_a_plan_of_clamps_is_saved_beside_directions(tmp_path: Path) -> None:
    plan = Plan(
        [
            steer.Intervention(steer.ClampFeatures(transcoder(), CHOSEN, to=1.0), WRITTEN),
            steer.Intervention(steer.Add(torch.ones(32)), SITE),
        ]
    )
    again = Plan.load(plan.save(tmp_path / "plan.safetensors"))
    assert again.explain() == plan.explain() and str(again.interventions[0].operator.reads_at) == READ


def test_gains_are_learned_from_the_identity_and_read_as_a_table(tiny, tmp_path: Path) -> None:
    model = tiny("llama").requires_grad_(False)
    gains = steer.FeatureGains(autoencoder(), CHOSEN).train()
    plan = plan_of(gains)
    batch = padded("right")
    plain = model(**batch, use_cache=False)
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.5)
    losses = []
    with plan.attached(model):
        assert torch.equal(model(**batch, use_cache=False).logits, plain.logits)
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[0] == float(plain.loss) and losses[-1] < losses[0] - 1e-3
    table = Plan.load(plan.save(tmp_path / "plan")).interventions[0].operator.table()
    assert sorted(row.feature for row in table) == sorted(CHOSEN)
    changes = [abs(row.gain - 1) + abs(row.offset) for row in table]
    assert changes == sorted(changes, reverse=True) and changes[0] > 0


@pytest.mark.parametrize("made", [{"to": 6.0}, {"add": 1.0}, {"scale": 0.0}, {"low": 1.0}])
def test_a_plan_of_one_feature_and_one_number_is_saved(made: dict[str, float], tmp_path: Path) -> None:
    operator = steer.ClampFeatures(autoencoder("relu"), 3, **made)
    loaded = Plan.load(plan_of(operator).save(tmp_path / "one")).interventions[0].operator
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in operator.tensors.items())
