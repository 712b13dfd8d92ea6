"""Backward rules: gradients against a llama written out, values that stay, everything put back, and refusals."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from circuits.attribution_helpers import CLEAN, CORRUPTED, MaskedLlama, close, pairs, target
from families import FAMILIES
from hand import ids
from torch import nn
from transformers import AttentionInterface, GptOssConfig, GptOssForCausalLM

from steer.circuits import BACKWARD_RULES, LogitDifference, attribute, zero_ablation
from steer.circuits.attention_backward import _REPLACEMENTS, Attended, attention_as
from steer.errors import AnatomyError, ConfigError
from steer.model.anatomy import Anatomy

RULES = ("gim", "relp")
REFUSED = {("falcon", "gim"), *((family, rule) for family in ("mixtral", "qwen3_moe") for rule in RULES)}


def scored(model, rule, **how):
    return attribute(model, pairs(model), how.pop("target", target), method=how.pop("method", "eap"), rule=rule, progress=False, **how)


@pytest.mark.parametrize("rule", ["plain", *RULES])
def test_scores_are_those_of_a_llama_written_out_with_the_rule(tiny, rule):
    model = tiny("llama")
    written_out = MaskedLlama(model, rule)
    expected = torch.stack([written_out.gradient(CLEAN[i], CORRUPTED[i], i) for i in range(2)]).mean(0)
    scores = scored(model, rule)
    assert close(scores.edge_scores, expected) and close(scores.node_scores, expected.sum(1))
    assert scores.facts["rule"] == rule


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rule_changes_gradients_and_no_value(tiny, family, rule):
    model = tiny(family)
    if (family, rule) in REFUSED:
        with pytest.raises(AnatomyError, match=rf"{family}[\s\S]*rule='"):
            scored(model, rule)
        return
    plain, scores = scored(model, "plain"), scored(model, rule)
    assert scores.facts["value"] == pytest.approx(plain.facts["value"], rel=1e-6)
    assert close(scores.edge_scores.sum(1), scores.node_scores)
    assert not close(scores.node_scores, plain.node_scores, 0.02)


def test_relp_leaves_nothing_out_of_a_model_without_biases(tiny):
    """All that is left is linear in the embedding, so that its score against zero is the whole logit difference."""
    scores = scored(tiny("llama"), "relp", target=LogitDifference(5, 9), ablation=zero_ablation())
    assert scores["input"] == pytest.approx(scores.facts["value"], rel=1e-4)
    queries = [place for place, reader in enumerate(scores.graph.readers) if reader.kind in "qk"]
    assert not scores.edge_scores[:, queries].any()


@pytest.mark.parametrize("rule", RULES)
def test_scores_of_neurons_add_up_to_their_mlp(tiny, rule):
    scores = scored(tiny("llama"), rule, neurons=True)
    for layer, of_layer in scores.neurons.items():
        assert float(of_layer.sum()) == pytest.approx(float(scores.node_scores[scores.graph.mlp_at(layer)]), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_goes_with_every_method(tiny, rule):
    model = tiny("llama")
    scores = scored(model, rule, method="eap_ig")
    assert close(scores.edge_scores.sum(1), scores.node_scores) and not close(scores.nodes, scored(model, "plain", method="eap_ig").nodes)


# ---- everything is put back


def state_of(model: nn.Module) -> tuple:
    modules = list(model.modules())
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules]
    return hooks, [copy.copy(vars(module).get("forward")) for module in modules], model.config._attn_implementation, model.training


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", ["nowhere", "attention", "mlp", "target"])
def test_a_model_is_as_it_was_on_every_way_out(tiny, rule, where):
    model = tiny("qwen3")
    gradients, before = scored(model, "plain", edges=False), state_of(model)

    def interrupt(*_: object) -> None:
        raise Interrupt

    part = {"attention": model.model.layers[1].self_attn.o_proj, "mlp": model.model.layers[2].mlp.act_fn}.get(where)
    hook = None if part is None else part.register_forward_hook(lambda *_: interrupt() if torch.is_grad_enabled() else None)
    if where == "nowhere":
        scored(model, rule, edges=False)
    else:
        with pytest.raises(Interrupt):
            scored(model, rule, target=interrupt if where == "target" else target, edges=False)
    if hook is not None:
        hook.remove()
    assert state_of(model) == before and not _REPLACEMENTS
    assert torch.equal(scored(model, "plain", edges=False).nodes, gradients.nodes)


def test_another_model_is_trained_meanwhile_as_if_nothing_were(tiny):
    """Inside a rule another model of the same class, in another thread, has its own gradients."""
    model, other = tiny("llama"), tiny("llama")

    def gradient() -> torch.Tensor:
        other.zero_grad()
        other(input_ids=ids(), labels=ids()).loss.backward()
        return other.model.layers[0].self_attn.q_proj.weight.grad.clone()

    alone, found = gradient(), []
    for rule in RULES:
        with BACKWARD_RULES.get(rule)().applied(Anatomy.find(model)):
            thread = threading.Thread(target=lambda: found.append(gradient()))
            thread.start()
            thread.join()
            model(ids())
    assert len(found) == 2 and all(torch.equal(each, alone) for each in found)


# ---- refusals


class OtherMLP(nn.Module):
    """A product of three."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).tanh() * 2)


@pytest.mark.parametrize("rule", RULES)
def test_a_product_that_is_not_proven_is_refused(tiny, rule):
    model = tiny("llama")
    model.model.layers[1].mlp = OtherMLP(model.model.layers[1].mlp)
    with pytest.raises(AnatomyError, match=rf"'{rule}'[\s\S]*neurons in block 1[\s\S]*act\(x\) \* other[\s\S]*rule='plain'"):
        scored(model, rule)


def test_attention_with_sinks_is_refused():
    """A part of each pattern goes to no token, which is not the function of the rule."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8, "num_local_experts": 2}
    config = GptOssConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GptOssForCausalLM(config).eval()

    def softmax_attention(of: Attended) -> torch.Tensor:
        return of.mixed(of.scores(of.query, of.key).softmax(-1), of.value)

    with (
        pytest.raises(AnatomyError, match=r"attention of GptOssAttention[\s\S]*rule='plain'"),
        attention_as(Anatomy.find(model), softmax_attention),
    ):
        model(ids())


def test_an_attention_function_of_ones_own_is_refused(tiny):
    model = tiny("llama")
    AttentionInterface.register("of_ones_own", AttentionInterface._global_mapping["sdpa"])
    try:
        model.config._attn_implementation = "of_ones_own"
        with pytest.raises(AnatomyError, match=r"'of_ones_own'[\s\S]*rule='plain'"):
            scored(model, "gim", edges=False)
    finally:
        del AttentionInterface._global_mapping["of_ones_own"]


@pytest.mark.parametrize("rule", ["gimm", 3, None])
def test_an_unknown_rule_is_refused(tiny, rule):
    with pytest.raises(ConfigError, match=r"rule"):
        scored(tiny("llama"), rule)
