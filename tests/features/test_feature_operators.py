"""Clamped, ablated and kept features: equal to the whole dictionary with its error, forward and backward, under every rule of a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from features.feature_plans import ACTIVATIONS, CHOSEN, FEATURES, SITE, autoencoder, spliced, with_chosen
from hand import edited, ids, padded
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import steer
from steer.errors import ConfigError, NonFiniteError, SiteError, WidthError
from steer.features import Encoder, InMemory, Origin, Untrained
from steer.features.activations.jumprelu import JumpReLU
from steer.features.activations.relu import ReLU
from steer.features.architectures.crosscoder import Crosscoder
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.rows import InFile
from steer.intervene import Operator, Plan
from steer.model.anatomy import Anatomy

MADE = {
    "to": (lambda d: steer.ClampFeatures(d, CHOSEN, to=2.5), lambda f: 0 * f + 2.5),
    "scale": (lambda d: steer.ClampFeatures(d, CHOSEN, scale=-0.5), lambda f: -0.5 * f),
    "add": (lambda d: steer.ClampFeatures(d, CHOSEN, add=1.5), lambda f: f + 1.5),
    "low": (lambda d: steer.ClampFeatures(d, CHOSEN, low=0.8), lambda f: f.clamp_min(0.8)),
    "high": (lambda d: steer.ClampFeatures(d, CHOSEN, high=0.8), lambda f: f.clamp_max(0.8)),
    "ablate": (lambda d: steer.AblateFeatures(d, CHOSEN), lambda f: 0 * f),
}


def applied(operator: Operator, h: Tensor) -> Tensor:
    return operator.apply(h, torch.ones(1, 1, 1), None, operator.tensors)


def plan_of(operator: Operator, site: str = SITE, **options: object) -> Plan:
    return Plan(steer.Intervention(operator, site, **options))


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm", "centred"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("made", [*MADE, "keep only"])
def test_an_edit_is_the_whole_splice_forward_and_backward(made: str, activation: str, norm: str) -> None:
    dictionary = autoencoder(activation, norm=norm)
    h = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(10), dtype=torch.float64).requires_grad_()
    weights = torch.randn(2, 9, 32, dtype=torch.float64)
    if made == "keep only":
        operator, formula = (
            steer.KeepOnlyFeatures(dictionary, CHOSEN),
            lambda f: f * torch.zeros(FEATURES).index_fill(0, torch.tensor(CHOSEN), 1),
        )
    else:
        build, new = MADE[made]
        operator, formula = build(dictionary), lambda f: with_chosen(f, new)
    out, expected = applied(operator, h), spliced(dictionary, formula, h)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    found, gradient = (torch.autograd.grad((result * weights).sum(), h)[0] for result in (out, expected))
    assert (found - gradient).abs().max() <= 1e-5 * gradient.abs().max()
    assert (expected - h).abs().max() > 0.1


@pytest.mark.parametrize("activation", ["jumprelu", "gated", "topk"])
def test_gradients_are_those_of_finite_differences(activation: str) -> None:
    h = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(11), dtype=torch.float64).requires_grad_()
    for build, _ in MADE.values():
        operator = build(autoencoder(activation, norm="layer_norm"))
        assert torch.autograd.gradcheck(lambda h, operator=operator: applied(operator, h), (h,), eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "jumprelu, signed", "batchtopk", "gated"])
@pytest.mark.parametrize("made", [*MADE, "gains", "keep only"])
def test_the_gradient_in_one_node_is_that_of_autograd(made: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = autoencoder(activation.split(",")[0])
    dictionary.encoder.shift = None  # of the whole dictionary it is taken off by itself
    if "signed" in activation:
        dictionary.encoder.activation = JumpReLU(torch.full((FEATURES,), -0.5), rectified=False)
    build = {
        **{name: build for name, (build, _) in MADE.items()},
        "gains": lambda d: steer.FeatureGains(d, CHOSEN, 0.3, 0.2),
        "keep only": lambda d: steer.KeepOnlyFeatures(d, CHOSEN),
    }[made]
    operator = build(dictionary)
    h = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(12), dtype=torch.float64).requires_grad_()
    mask = torch.rand(2, 9, 1, dtype=torch.float64) * torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat(9, 1)[:9]
    weights = torch.randn(2, 9, 32, dtype=torch.float64)

    def run(few: int) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr("steer.features.edit_autograd.FEW", few)
        out = operator.apply(h, torch.full((1, 1, 1), 0.7), mask, operator.tensors)
        return out, torch.autograd.grad((out * weights).sum(), h)[0]

    picked, dense = run(0), run(10**6)
    with FlopCounterMode(display=False):  # which looks at the operations
        plain = run(0)
    in_one_node = made != "add"  # which reads no feature
    nodes = [str(result[0].grad_fn.next_functions) for result in (picked, plain)]
    assert ["EditFeatures" in node for node in nodes] == [in_one_node, False]
    for result in (picked, dense):
        torch.testing.assert_close(result, plain, rtol=1e-10, atol=1e-10)
    assert made in ("add", "low") or (plain[1] - weights).abs().max() > 0.1


def test_the_gradient_in_one_node_can_be_differentiated_and_is_not_rounded_by_autocast() -> None:
    operator = steer.ClampFeatures(autoencoder("jumprelu"), CHOSEN, to=2.0)
    h = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(11), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: applied(operator, h), (h,), eps=1e-7, atol=1e-4)
    assert torch.autograd.gradgradcheck(lambda h: applied(operator, h), (h,), eps=1e-7, atol=1e-4)
    h = torch.randn(2, 9, 32).requires_grad_()
    weights, gradients = torch.randn(2, 9, 32), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = applied(operator, h) + applied(operator, h)  # twice from one activation
            gradients.append(torch.autograd.grad(out, h, weights)[0])
    assert torch.equal(*gradients) and (gradients[0] - 2 * weights).abs().max() > 0.1


@pytest.mark.parametrize("learned", ["strength", "mask", "gain"])
def test_what_is_learned_besides_gets_its_gradient(learned: str) -> None:
    operator = steer.FeatureGains(autoencoder("relu"), CHOSEN, 0.3).train()
    tensors = {"strength": torch.full((1, 1, 1), 0.7), "mask": torch.rand(2, 9, 1)}
    if learned != "gain":
        operator = steer.AblateFeatures(autoencoder("relu"), CHOSEN)
        tensors[learned].requires_grad_()
    leaf = operator.parameters["gain"] if learned == "gain" else tensors[learned]
    h = torch.randn(2, 9, 32).requires_grad_()
    out = operator.apply(h, tensors["strength"], tensors["mask"], operator.tensors)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert gradient.abs().max() > 0.01


def test_all_features_in_tiles_are_all_features_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    h = torch.randn(2, 9, 32, dtype=torch.float64).requires_grad_()
    mask = torch.rand(2, 9, 1, dtype=torch.float64)
    for operator in (steer.KeepOnlyFeatures(autoencoder("topk"), CHOSEN), steer.ClampFeatures(autoencoder("topk"), CHOSEN, scale=3.0)):
        results = []
        for tile in (2**24, 4 * FEATURES):
            for module in ("steer.features.feature_edit", "steer.features.operators.keep_only_features"):
                monkeypatch.setattr(f"{module}.TILE", tile)
            out = operator.apply(h, torch.full((1, 1, 1), 0.7), mask, operator.tensors)
            results.append((out.detach(), torch.autograd.grad(out.square().sum(), h)[0]))
        for at_once, in_tiles in zip(*results, strict=True):
            assert torch.allclose(at_once, in_tiles, atol=1e-12)
        assert (results[0][0] - h).abs().max() > 0.1


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_in_every_family_a_plan_is_a_hook_with_the_whole_dictionary(family: str, tiny) -> None:
    model = tiny(family)
    dictionary = autoencoder("jumprelu", spread=0.3)
    batch = {**padded("left"), "use_cache": False}
    plan = plan_of(steer.ClampFeatures(dictionary, CHOSEN, to=[3.0, 0.0, 1.0]))
    values = torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64)

    def new(f: Tensor) -> Tensor:
        return f.index_copy(-1, torch.tensor(CHOSEN), values.expand(*f.shape[:-1], 3))

    results = []
    for context in (plan.attached(model), edited(Anatomy.find(model).point(SITE).module, lambda h: spliced(dictionary, new, h))):
        model.zero_grad()
        with context:
            output = model(**batch)
            output.loss.backward()
        results.append((output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (logits, gradients), (expected, expected_gradients) = results
    real = batch["attention_mask"].bool()
    assert (logits - expected)[real].abs().max() <= 1e-5 * expected.abs().max()
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= 3e-5 * max(float(gradient.abs().max()), 1e-2), name
    assert (model(**batch).logits - expected)[real].abs().max() > 0.01


def test_rows_in_a_file_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder("jumprelu").save(tmp_path / "dictionary", format="saelens")
    dictionary = steer.load_dictionary(tmp_path / "dictionary", reads=SITE, writes=SITE)
    whole = steer.ClampFeatures(dictionary, CHOSEN, to=2.0)

    def refuse(self: InFile) -> Tensor:
        raise AssertionError("the whole matrix was read")

    monkeypatch.setattr(InFile, "_all", refuse)
    again = steer.load_dictionary(tmp_path / "dictionary", reads=SITE, writes=SITE)
    few = steer.ClampFeatures(again, CHOSEN, to=2.0)
    assert all(torch.equal(few.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert sum(tensor.numel() for tensor in few.tensors.values()) < 3 * 2 * 32 + 3 * 4
    with pytest.raises(AssertionError, match="whole matrix"):
        steer.KeepOnlyFeatures(again, CHOSEN)


def test_tokens_of_no_training_keep_every_bit(tiny) -> None:
    model = tiny("llama")
    dictionary = autoencoder("jumprelu", untrained=Untrained(first=2))
    plan = plan_of(steer.ClampFeatures(dictionary, CHOSEN, to=9.0))
    assert str(plan.interventions[0].scope) == "all!positions[0,1]" and "positions[0,1]" in plan.explain()
    batch = padded("left")
    layer = Anatomy.find(model).point(SITE).module
    seen: list[Tensor] = []
    with edited(layer, lambda h: seen.append(h) or h):
        model(**batch, use_cache=False)
    with plan.attached(model) as attachment, edited(layer, lambda h: seen.append(h) or h):
        model(**batch, use_cache=False)
        assert attachment.fired() == {"clamp_features@layers.1.output": int(batch["attention_mask"].sum()) - 2 * 3}
    moved = (seen[0] != seen[1]).any(-1)
    expected = batch["attention_mask"].bool().clone()
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        expected[row, 7 - length : 9 - length] = False
    assert torch.equal(moved, expected)


def test_outliers_keep_every_bit() -> None:
    dictionary = autoencoder("relu", untrained=Untrained(max_norm=50.0))
    h = torch.randn(1, 4, 32)
    h[0, 2] *= 100
    for operator in (steer.ClampFeatures(dictionary, CHOSEN, to=9.0), steer.ClampFeatures(dictionary, CHOSEN, add=1.0)):
        assert ((applied(operator, h) != h).any(-1) == torch.tensor([[True, True, False, True]])).all()


def test_a_narrowed_scope_is_narrowed_once_and_keeps_its_window() -> None:
    operator = steer.ClampFeatures(autoencoder(untrained=Untrained(first=1)), 5, to=1.0)
    for scope, narrowed in {
        "all": "all!positions[0]",
        "generated[:4]": "generated[:4]!positions[0]",
        "all!positions[0]": "all!positions[0]",
    }.items():
        assert str(steer.Intervention(operator, SITE, scope).scope) == narrowed
    assert steer.Intervention(operator, SITE, "generated[:4]").scope.window is not None
    many = steer.ClampFeatures(autoencoder(untrained=Untrained(first=20)), 5, to=1.0)
    assert str(steer.Intervention(many, SITE).scope) == "all!positions[:20]"


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_a_saved_plan_needs_no_dictionary(tmp_path: Path, activation: str) -> None:
    dictionary = autoencoder(activation, untrained=Untrained(first=1, max_norm=90.0), norm="centred")
    dictionary.save(tmp_path / "dictionary")
    loaded = steer.load_dictionary(tmp_path / "dictionary")
    operators = [
        steer.ClampFeatures(loaded, CHOSEN, to=[[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]),
        steer.ClampFeatures(loaded, CHOSEN, low=0.1, high=2.0),
        steer.AblateFeatures(loaded, CHOSEN),
        steer.KeepOnlyFeatures(loaded, CHOSEN),
        steer.AddDecoder(loaded, CHOSEN, 0.5),
    ]
    plan = Plan([steer.Intervention(operator, SITE) for operator in operators])
    again = Plan.load(plan.save(tmp_path / "plan"))
    assert again.explain() == plan.explain()
    h = torch.randn(2, 5, 32)
    for before, after in zip(plan.interventions, again.interventions, strict=True):
        assert after.operator.features == (5, 33, 8) and after.operator.origin == before.operator.origin
        assert (after.operator.origin["width"], after.operator.origin["writes"]) == (FEATURES, [SITE])
        per_row = [{name: tensor[:1] for name, tensor in made.operator.tensors.items()} for made in (before, after)]
        edits = [made.operator.apply(h, torch.ones(1, 1, 1), None, rows) for made, rows in zip((before, after), per_row, strict=True)]
        assert torch.equal(*edits) and not torch.equal(edits[0], h)


def test_decoded_tokens_are_clamped_as_in_one_pass(tiny) -> None:
    model = tiny("qwen3")
    plan = plan_of(steer.ClampFeatures(autoencoder("gated", untrained=Untrained(first=1)), CHOSEN, to=4.0))
    batch = padded("left")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with plan.attached(model) as attachment:
        text = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True, output_logits=True
        )
        fired = attachment.fired()["clamp_features@layers.1.output"]
        assert fired == int(batch["attention_mask"].sum()) - 3 + 3 * 4  # not the first of each row; the last is never fed back
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 5), value=1)
        at_once = model(
            input_ids=text.sequences, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False
        ).logits
    for step, logits in enumerate(text.logits):
        assert torch.allclose(logits, at_once[:, 6 + step], atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_edit_in_fp32_rounded_once(dtype: torch.dtype) -> None:
    h = torch.randn(2, 5, 32).to(dtype)
    operator = steer.ClampFeatures(autoencoder("jumprelu"), CHOSEN, to=2.0)
    assert torch.equal(applied(operator, h), applied(operator, h.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(applied(operator, h.float()), applied(operator, h.float().clone()))
        in_autocast = applied(operator, h.float())
    assert torch.equal(in_autocast, applied(operator, h.float()))


def test_features_that_stay_as_they_are_change_no_bit() -> None:
    dictionary = autoencoder("jumprelu")
    h = torch.randn(3, 20, 32)
    f = dictionary.encode(h)[..., CHOSEN]
    out = applied(steer.AblateFeatures(dictionary, CHOSEN), h)
    assert torch.equal((out != h).any(-1), (f != 0).any(-1)) and 0 < (f != 0).any(-1).sum() < 60
    assert torch.equal(applied(steer.ClampFeatures(dictionary, CHOSEN, scale=1.0), h), h)


def test_multiples_of_a_recorded_maximum(tmp_path: Path) -> None:
    dictionary = autoencoder()
    maxima = torch.arange(1.0, FEATURES + 1)
    h = torch.randn(2, 5, 32)
    expected = applied(steer.ClampFeatures(dictionary, CHOSEN, to=[12.0, 68.0, 18.0]), h)
    assert torch.equal(applied(steer.ClampFeatures(dictionary, CHOSEN, to=2.0, of_maximum=True, maxima=[6.0, 34.0, 9.0]), h), expected)
    with pytest.raises(ConfigError, match="nobody recorded"):
        steer.ClampFeatures(dictionary, CHOSEN, to=2.0, of_maximum=True)
    dictionary.maxima = maxima
    dictionary.save(tmp_path / "dictionary")
    again = steer.load_dictionary(tmp_path / "dictionary")
    assert torch.equal(again.maxima, maxima)
    assert torch.equal(applied(steer.ClampFeatures(again, CHOSEN, to=2.0, of_maximum=True), h), expected)
    assert torch.allclose(steer.AddDecoder(again, 8, 0.5, of_maximum=True).tensors["vector"], 4.5 * again.decoder_rows(8))
    dictionary.maxima = maxima * 0
    with pytest.raises(ConfigError, match="never on"):
        steer.ClampFeatures(dictionary, 5, to=2.0, of_maximum=True)


def test_a_decoder_row_is_a_bias_and_a_clamp_is_not(tiny) -> None:
    model = tiny("llama")
    dictionary = autoencoder()
    plan = plan_of(steer.AddDecoder(dictionary, [5, 8], [2.0, -1.0]))
    with plan.attached(model):
        steered = model(ids(), use_cache=False).logits
    with plan_of(steer.Add(2 * dictionary.decoder_rows(5)[0] - dictionary.decoder_rows(8)[0])).attached(model):
        by_vector = model(ids(), use_cache=False).logits
    assert torch.allclose(steered, by_vector, atol=1e-5)
    for operator in (
        steer.ClampFeatures(dictionary, 5, to=1.0),
        steer.AblateFeatures(dictionary, 5),
        steer.KeepOnlyFeatures(dictionary, 5),
    ):
        with pytest.raises(steer.SteerError, match="clamp_features|ablate_features|keep_only_features"):
            steer.bake(plan_of(operator), tiny("llama"))
    steer.bake(plan, model)
    assert torch.allclose(model(ids(), use_cache=False).logits, steered, atol=1e-4)


def test_decoder_rows_of_dictionaries_of_several_sites() -> None:
    sites = ("layers.0.output", "layers.1.output")
    decoder = torch.randn(FEATURES, 2, 32)
    crosscoder = Crosscoder(
        Encoder(InMemory(torch.randn(FEATURES, 2, 32)), None, ReLU()), InMemory(decoder), torch.zeros(2, 32), Origin(sites, sites)
    )
    operator = steer.AddDecoder(crosscoder, [3, 4], site=sites[1])
    assert torch.allclose(operator.tensors["vector"], decoder[[3, 4], 1].sum(0, keepdim=True), atol=1e-6)
    with pytest.raises(SiteError, match="layers.0.output"):
        plan_of(operator, sites[0])
    with pytest.raises(ConfigError, match="not clear which"):
        steer.AddDecoder(crosscoder, 3)
    with pytest.raises(ConfigError, match="reads one site and writes one"):
        steer.ClampFeatures(crosscoder, 3, to=1.0)


REFUSED = {
    "no dictionary": (lambda: steer.ClampFeatures(torch.zeros(3), 1, to=1.0), ConfigError, "made of no dictionary"),
    "outside": (lambda: steer.ClampFeatures(autoencoder(), [5, 40], to=1.0), ConfigError, "expected: 0 to 39[\\s\\S]*found: \\[40\\]"),
    "twice": (lambda: steer.AblateFeatures(autoencoder(), [5, 8, 5]), ConfigError, "each named once"),
    "none": (lambda: steer.AblateFeatures(autoencoder(), []), ConfigError, "at least one feature"),
    "no mode": (lambda: steer.ClampFeatures(autoencoder(), 5), ConfigError, "none of them"),
    "two modes": (lambda: steer.ClampFeatures(autoencoder(), 5, to=1.0, low=0.0), ConfigError, "to and low"),
    "empty range": (lambda: steer.ClampFeatures(autoencoder(), 5, low=1.0, high=0.0), ConfigError, "empty"),
    "count": (lambda: steer.ClampFeatures(autoencoder(), [5, 8], to=[1.0, 2.0, 3.0]), ConfigError, "`to` does not fit"),
    "not finite": (lambda: steer.ClampFeatures(autoencoder(), 5, to=float("nan")), NonFiniteError, "`to` of features"),
    "scaled maximum": (lambda: steer.ClampFeatures(autoencoder(), 5, scale=2.0, of_maximum=True), ConfigError, "factor of each feature"),
    "unused maxima": (lambda: steer.ClampFeatures(autoencoder(), 5, to=2.0, maxima=3.0), ConfigError, "no use"),
    "site": (lambda: plan_of(steer.ClampFeatures(autoencoder(), 5, to=1.0), "layers.0.output"), SiteError, "expected: layers.1.output"),
    "pattern": (lambda: plan_of(steer.AddDecoder(autoencoder(), 5), "layers.*.output"), SiteError, "layers.1.output"),
    "norm": (lambda: steer.AddDecoder(autoencoder(norm="layer_norm"), 5), ConfigError, "no constant vectors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    build, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        build()


def test_another_model_is_refused_before_a_hook_is_installed(tiny) -> None:
    with pytest.raises(WidthError, match="width 32[\\s\\S]*width 24"):
        plan_of(steer.ClampFeatures(autoencoder(width=24), 5, to=1.0)).validate(tiny("llama"))
    with pytest.raises(SiteError, match="layers.7"):
        plan_of(steer.ClampFeatures(autoencoder(site="layers.7.output"), 5, to=1.0), "layers.7.output").validate(tiny("llama"))


def test_rows_that_are_not_finite_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = autoencoder().save(tmp_path / "dictionary", format="saelens")
    path = Path(folder) / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["W_dec"][8, 3] = float("nan")
    save_file(tensors, path)
    dictionary = steer.load_dictionary(folder, reads=SITE, writes=SITE)
    with pytest.raises(NonFiniteError, match="W_dec' of .*sae_weights.safetensors"):
        steer.ClampFeatures(dictionary, CHOSEN, to=1.0)
    assert isinstance(dictionary, SparseAutoencoder) and steer.ClampFeatures(dictionary, [5, 33], to=1.0).slots == 1
