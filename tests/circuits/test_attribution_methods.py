"""Attribution methods: each against gradients by the masks of edges, and the sums that its scores have to give."""

from __future__ import annotations

import pytest
import torch
from circuits.attribution_helpers import CLEAN, CORRUPTED, MaskedLlama, close, pairs, rows, target
from torch import Tensor

from steer.circuits import ATTRIBUTION_METHODS, ComponentScores, attribute, mean_ablation, zero_ablation
from steer.circuits.attribution_methods.eap_gp import EAPGP
from steer.circuits.attribution_methods.eap_ig import EAPIG
from steer.circuits.attribution_methods.eap_ig_activations import EAPIGActivations
from steer.circuits.attribution_methods.mask_gradient import MaskGradient
from steer.errors import ConfigError
from steer.model import hooks
from steer.model.anatomy import Anatomy
from steer.model.site import Site

NEEDS_PAIRS = ("clean_corrupted", "eap_ig", "eap_gp")


def scored(model, method, **how) -> ComponentScores:
    return attribute(model, how.pop("pairs", None) or pairs(model), target, method=method, progress=False, **how)


def test_eap_is_the_gradient_by_masks_of_edges(tiny):
    model = tiny("llama")
    written_out = MaskedLlama(model)
    expected = torch.stack([written_out.gradient(CLEAN[i], CORRUPTED[i], i) for i in range(2)]).mean(0)
    scores = scored(model, "eap")
    assert close(scores.edge_scores, expected)
    assert close(scores.node_scores, expected.sum(1))
    assert not scores.edge_scores[~scores.graph.possible].any()


def test_a_mask_gradient_is_that_by_masks_of_edges_wherever_the_masks_are(tiny):
    model = tiny("llama")
    written_out = MaskedLlama(model)
    ways = [written_out.gradient(CLEAN[i], CORRUPTED[i], i, at) for i in range(2) for at in (0.0, 0.5, 1.0)]
    assert close(scored(model, MaskGradient(steps=2)).edge_scores, torch.stack(ways).mean(0))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_a_mask_gradient_without_steps_is_eap_exactly(tiny, family):
    model = tiny(family)
    masks, plain = scored(model, MaskGradient(steps=0), neurons=True), scored(model, "eap", neurons=True)
    assert torch.equal(masks.edges, plain.edges) and torch.equal(masks.nodes, plain.nodes)
    assert all(torch.equal(masks.neurons[layer], plain.neurons[layer]) for layer in plain.neurons)


def test_mask_gradients_add_up_to_the_change_of_the_target(tiny):
    scores = scored(tiny("llama"), MaskGradient(steps=24), edges=False)
    change = scores.facts["value"] - scores.facts["corrupted_value"]
    assert float(scores.node_scores.sum()) == pytest.approx(change, rel=0.06)


def test_integrated_gradients_of_the_input_add_up_to_the_change_of_the_target(tiny):
    scores = scored(tiny("llama"), EAPIG(steps=16, points="midpoint"), edges=False)
    change = scores.facts["value"] - scores.facts["corrupted_value"]
    assert scores["input"] == pytest.approx(change, rel=5e-3)


def value_with(model, site: Site, values: list[Tensor]) -> float:
    """Mean target where one site has other activations."""
    anatomy, found = Anatomy.find(model), []
    for number, prompt in enumerate(CLEAN):
        replace = hooks.Installation(model, anatomy, [(anatomy.point(site), lambda h, ctx, number=number: values[number].expand_as(h))])
        replace.install()
        with torch.no_grad():
            found.append(target(model(torch.tensor([prompt])).logits[0], number))
        replace.remove()
    return float(torch.stack(found).mean())


def activations(model, site: Site) -> list[Tensor]:
    """[1, tokens, width] of each corrupted prompt."""
    anatomy, found = Anatomy.find(model), []
    look = hooks.Installation(model, anatomy, [(anatomy.point(site), lambda h, ctx: found.append(h.clone()))])
    look.install()
    with torch.no_grad():
        for prompt in CORRUPTED:
            model(torch.tensor([prompt]))
    look.remove()
    return found


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_integrated_gradients_of_activations_add_up_to_the_effect_of_each_ablation(tiny, ablation):
    model = tiny("llama")
    chosen = {"resample": None, "zero": zero_ablation(), "mean": mean_ablation(model, rows(CORRUPTED))}[ablation]
    scores = scored(model, EAPIGActivations(steps=6), ablation=chosen, edges=False)
    for site, places in ((Site("attn.z", 1), scores.graph.heads_at(1)), (Site("mlp.output", 0), slice(scores.graph.mlp_at(0), None))):
        constant = None if chosen is None else chosen.constants()(site, 32)
        values = activations(model, site) if constant is None else [constant] * 2
        effect = scores.facts["value"] - value_with(model, site, values)
        assert float(scores.node_scores[places][: 4 if site.part == "attn.z" else 1].sum()) == pytest.approx(effect, rel=2e-2)


def test_integrated_gradients_of_activations_keep_edges_and_nodes_together(tiny):
    scores = scored(tiny("gemma2"), EAPIGActivations(steps=1), neurons=True)
    assert close(scores.edge_scores.sum(1), scores.node_scores)
    assert len(scores.neurons) == 3 and all(bool(of_layer.any()) for of_layer in scores.neurons.values())


def test_clean_corrupted_is_half_of_either_end(tiny):
    model = tiny("llama")
    there, back = scored(model, "eap"), scored(model, "eap", pairs=pairs(model, CORRUPTED, CLEAN))
    both = scored(model, "clean_corrupted")
    assert close(both.edges, (there.edges - back.edges) / 2) and close(both.nodes, (there.nodes - back.nodes) / 2)


def test_a_path_of_gradients_goes_where_the_target_moves(tiny):
    model = tiny("llama")
    assert close(scored(model, EAPGP(steps=1)).edges, scored(model, "eap").edges, 1e-5)  # the first point is the clean one
    one = pairs(model, CLEAN[:1], CORRUPTED[:1])
    embed = model.model.embed_tokens.weight.detach()
    start, end = embed[CLEAN[0]], embed[CORRUPTED[0]]  # [tokens, width]

    def value_and_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x[None].clone().requires_grad_()
        value = target(model(inputs_embeds=x).logits[0], 0)
        return value.detach(), torch.autograd.grad(value, x)[0][0]

    at_end, point, gradients = value_and_gradient(end)[0], start, []
    for _ in range(3):
        value, gradient = value_and_gradient(point)
        gradients.append(gradient)
        point = point - (start - end).norm() / 3 * (value - at_end).sign() * gradient / gradient.norm()
    expected = ((start - end) * torch.stack(gradients).mean(0)).sum()
    assert scored(model, EAPGP(steps=3), pairs=one)["input"] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("method", list(ATTRIBUTION_METHODS))
def test_every_method_keeps_edges_and_nodes_together_and_says_how_it_was_set(tiny, method):
    scores = scored(tiny("llama"), method)
    assert close(scores.edge_scores.sum(1), scores.node_scores)
    assert scores.facts["method"]["name"] == method


@pytest.mark.parametrize("method", list(ATTRIBUTION_METHODS))
def test_a_method_takes_constants_or_says_that_it_needs_pairs(tiny, method):
    model = tiny("llama")
    if method in NEEDS_PAIRS:
        with pytest.raises(ConfigError, match=rf"'{method}'[\s\S]*resample ablation"):
            scored(model, method, ablation=zero_ablation())
    else:
        assert bool(scored(model, method, ablation=zero_ablation(), edges=False).nodes.any())


@pytest.mark.parametrize("method", [EAPIG, EAPIGActivations, MaskGradient])
def test_steps_are_whole_numbers(method):
    with pytest.raises(ConfigError, match="steps"):
        method(steps=-1)
