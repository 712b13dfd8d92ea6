"""Feature losses: the formula, its gradient, and the tokens that they count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from features.feature_plans import CHOSEN, FEATURES, SITE, autoencoder, numbers
from hand import packed, padded
from torch import Tensor

import steer
from steer.errors import ConfigError, ContextError
from steer.features import Encoder, FeatureLoss, InMemory, Origin, Untrained
from steer.features.activations.relu import ReLU
from steer.features.architectures.crosscoder import Crosscoder
from steer.model.anatomy import Anatomy
from steer.training.loss_run import LossRun
from steer.training.ranks import Ranks

KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "high": ({"high": [0.5, -1.0, 0.0]}, lambda p: (p - torch.tensor([0.5, -1.0, 0.0])).clamp_min(0)),
    "low": ({"low": 2.0}, lambda p: (2.0 - p).clamp_min(0)),
    "range": ({"low": -0.5, "high": 0.5}, lambda p: (p.abs() - 0.5).clamp_min(0)),
    "target": ({"target": 1.5}, lambda p: (p - 1.5) ** 2),
}


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_its_formula_on_whole_encoding(kind: str, activation: str, norm: str) -> None:
    dictionary = autoencoder(activation, norm=norm)
    words, formula = KINDS[kind]
    h = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    for of, whole in (("pre_activations", dictionary.pre_activations), ("activations", dictionary.encode)):
        found = FeatureLoss(dictionary, CHOSEN, of=of, **words).per_token(h)
        expected = formula(whole(h)[..., CHOSEN]).mean(-1)
        assert found.shape == (2, 5) and torch.allclose(found, expected, atol=1e-6) and float(expected.detach().max()) > 0.1
        gradients = [torch.autograd.grad(loss.sum(), h)[0] for loss in (found, expected)]
        assert torch.allclose(*gradients, atol=1e-5)


def test_a_feature_that_is_off_has_a_gradient_by_its_pre_activation_alone() -> None:
    dictionary = autoencoder("relu")
    h = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    off = (dictionary.encode(h)[..., [5]] == 0).squeeze(-1)
    gradients = [
        torch.autograd.grad(FeatureLoss(dictionary, 5, low=1.0, of=of).per_token(h)[off].sum(), h)[0].abs().sum()
        for of in ("pre_activations", "activations")
    ]
    assert gradients[0] > 1 and gradients[1] == 0


def test_without_a_number_features_are_kept_off() -> None:
    dictionary = autoencoder("jumprelu")
    h = torch.randn(3, 30, 32, generator=torch.Generator().manual_seed(3))
    loss = FeatureLoss(dictionary, CHOSEN).per_token(h)
    is_on = (dictionary.encode(h)[..., CHOSEN] != 0).any(-1)
    assert torch.equal(loss > 0, is_on) and 0 < int(is_on.sum()) < is_on.numel()
    with pytest.raises(ConfigError, match="no threshold that a loss could keep them below"):
        FeatureLoss(autoencoder("topk"), CHOSEN)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"high": 1.0, "target": 1.0}, "a target or bounds"),
        ({"high": 1.0, "low": 2.0}, "range of a feature loss is empty"),
        ({"high": [1.0, 2.0]}, "`high` does not fit"),
        ({"of": "features"}, "pre_activations"),
        ({"weight": 0.0}, "weight"),
        ({"scope": "respnse"}, "unknown scope"),
    ],
)
def test_what_makes_no_sense_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureLoss(autoencoder(), CHOSEN, **words)


def test_features_and_dictionaries_that_do_not_go() -> None:
    with pytest.raises(ConfigError, match="each named once"):
        FeatureLoss(autoencoder(), [5, 5], high=1.0)
    sites = ("layers.0.output", "layers.1.output")
    encoder = Encoder(InMemory(numbers(FEATURES, 2, 32, seed=1)), None, ReLU())
    crosscoder = Crosscoder(encoder, InMemory(numbers(FEATURES, 2, 32, seed=2)), torch.zeros(2, 32), Origin(sites, sites))
    with pytest.raises(ConfigError, match="cannot read features of this crosscoder"):
        FeatureLoss(crosscoder, [5], high=1.0)


# ---- in passes of a model


def states(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[batch, tokens, width] after block 1."""
    kept: list[Tensor] = []
    handle = (
        Anatomy.find(model)
        .point(SITE)
        .module.register_forward_hook(lambda _, __, output: kept.append(output[0] if isinstance(output, tuple) else output))
    )
    model(**batch, use_cache=False)
    handle.remove()
    return kept[0]


def in_a_run(loss: FeatureLoss, model: torch.nn.Module, *batches: dict[str, Tensor]) -> Tensor:
    """What a run adds to a loss of 0, for passes that belong together."""
    run = LossRun([loss])
    run.attach(model, Ranks())
    run.start(0)
    for batch in batches:
        model(**batch, use_cache=False)
    added = run.added(torch.zeros(()))
    run.batch_end()
    run.detach()
    return added


@pytest.mark.parametrize("batch", [padded("left"), padded("right"), packed(prompt=2)], ids=["left", "right", "packed"])
@pytest.mark.parametrize("scope", ["all", "response", "prompt", "positions[1:3]", "response~2"])
def test_a_scope_means_what_it_means_to_a_plan(scope: str, batch: dict[str, Tensor]) -> None:
    """The tokens are those on which a plan of the same scope acts, found from what it adds."""
    model = FAMILIES["llama"]()
    dictionary = autoencoder(untrained=Untrained(first=1), site="layers.1.output")
    with torch.no_grad():
        plain = states(model, batch)
        plan = steer.Plan(steer.Intervention(steer.ClampFeatures(dictionary, CHOSEN, add=1.0), SITE, scope=scope))
        with plan.attached(model):
            moved = states(model, batch)
        share = (moved - plain).norm(dim=-1) / dictionary.decoder_rows(CHOSEN).sum(0).norm()  # [batch, tokens]
        per_token = FeatureLoss(dictionary, CHOSEN, high=-1.0).per_token(plain)
    expected = 0.5 * (per_token * share).sum() / share.sum()
    added = in_a_run(FeatureLoss(dictionary, CHOSEN, high=-1.0, scope=scope, weight=0.5), model, batch)
    assert float(added.detach()) == pytest.approx(float(expected), rel=1e-4) and float(expected) > 0.01


def test_outliers_are_left_out_by_their_norm() -> None:
    model, batch = FAMILIES["llama"](), padded("right")
    lengths = states(model, batch).norm(dim=-1)
    limit = float(lengths[batch["attention_mask"].bool()].detach().median())
    dictionary = autoencoder(untrained=Untrained(max_norm=limit))
    loss = FeatureLoss(dictionary, CHOSEN, high=-1.0)
    kept = (lengths <= limit) & batch["attention_mask"].bool()
    expected = loss.per_token(states(model, batch))[kept].mean()
    assert float(in_a_run(loss, model, batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert 0 < int(kept.sum()) < int(batch["attention_mask"].sum())


def test_passes_before_one_backward_pass_are_one_mean_over_tokens() -> None:
    model = FAMILIES["llama"]()
    loss, short, long = FeatureLoss(autoencoder(), CHOSEN, high=-1.0), padded(lengths=(2, 2)), padded(lengths=(9, 8, 7), seed=7)
    values = torch.cat([loss.per_token(states(model, batch))[batch["attention_mask"].bool()] for batch in (short, long)])
    assert float(in_a_run(loss, model, short, long).detach()) == pytest.approx(float(values.mean().detach()), rel=1e-5)


def test_validation_generation_and_unlabelled_batches() -> None:
    model, batch = FAMILIES["llama"](), padded("right")
    run = LossRun([FeatureLoss(autoencoder(), CHOSEN, high=-1.0, scope="response")])
    run.attach(model, Ranks())
    with torch.no_grad():
        model(**batch, use_cache=False)
    model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    zero = torch.zeros(())
    assert run.added(zero) is zero
    with pytest.raises(ContextError, match="cannot tell prompt from response"):
        model(input_ids=batch["input_ids"], use_cache=False)
    run.batch_start({"labels": batch["labels"]})
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    assert float(run.added(zero).detach()) > 0
    run.detach()
    assert not Anatomy.find(model).point(SITE).module._forward_hooks


def test_a_loss_reads_what_the_edits_leave_whoever_was_attached_first() -> None:
    model, batch = FAMILIES["llama"](), padded("right")
    dictionary = autoencoder("relu")
    plan = steer.Plan(steer.Intervention(steer.Add(3 * numbers(32, seed=4)), SITE))
    found = []
    for loss_first in (True, False):
        run = LossRun([FeatureLoss(dictionary, CHOSEN, high=-1.0)])
        if loss_first:
            run.attach(model, Ranks())
        with plan.attached(model):
            if not loss_first:
                run.attach(model, Ranks())
            model(**batch, use_cache=False)
            found.append(float(run.added(torch.zeros(())).detach()))
            steered = states(model, batch)
        run.detach()
    mask = batch["attention_mask"].bool()
    expected = FeatureLoss(dictionary, CHOSEN, high=-1.0).per_token(steered)[mask].mean()
    assert found == [pytest.approx(float(expected.detach()), rel=1e-5)] * 2
    assert abs(found[0] - float(in_a_run(FeatureLoss(dictionary, CHOSEN, high=-1.0), model, batch).detach())) > 0.1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("site", [SITE, "layers.1.mlp.output"])
def test_gradient_checkpointing_changes_no_gradient_or_is_refused(site: str, reentrant: bool) -> None:
    """Hooks of transformers' blocks run outside of a checkpoint, those of modules inside a block run in it."""
    gradients = []
    for checkpointed in (False, True):
        model, batch = FAMILIES["llama"]().train(), padded("right")
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        run = LossRun([FeatureLoss(autoencoder(site=site), CHOSEN, high=-1.0, rows="silent")])
        run.attach(model, Ranks())
        run.batch_start({"silent": torch.tensor([1, 0, 1])})
        if checkpointed and reentrant and site != SITE:
            with pytest.raises(ConfigError, match="use_reentrant=False"):
                model(**batch, use_cache=False)
            run.detach()
            return
        added = run.added(model(**batch, use_cache=False).loss)
        run.batch_start(None)  # transformers forgets the batch before the backward pass
        added.backward()
        run.batch_end()
        assert run._readers[0].passes == 1  # what is computed again is not counted again
        gradients.append(model.model.embed_tokens.weight.grad.clone())
        run.detach()
    assert torch.allclose(*gradients, atol=1e-7)


def test_a_compiled_model_has_the_same_loss() -> None:
    model, batch = FAMILIES["llama"](), padded("right")
    run = LossRun([FeatureLoss(autoencoder(), CHOSEN, high=-1.0)])
    run.attach(model, Ranks())
    gradients = []
    for compiled in (False, True):
        model.zero_grad()
        if compiled:
            torch._dynamo.reset()
            model.compile(backend="eager")
        run.added(model(**batch, use_cache=False).loss).backward()
        run.batch_end()
        gradients.append(model.model.embed_tokens.weight.grad.clone())
    run.detach()
    torch._dynamo.reset()
    assert torch.allclose(*gradients, atol=1e-6)


def test_bf16_and_autocast_compute_the_loss_in_fp32() -> None:
    dictionary, batch = autoencoder(), padded("right")
    model = FAMILIES["llama"]().bfloat16()
    loss = FeatureLoss(dictionary, CHOSEN, high=-1.0)
    mask = batch["attention_mask"].bool()
    expected = loss.per_token(states(model, batch).float())[mask].mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        added = in_a_run(loss, model, batch)
    assert added.dtype is torch.float32 and float(added.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
