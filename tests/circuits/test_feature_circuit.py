"""Feature circuits: scores are gradients, edges add up to scores, ablation is exact where the model is linear, padding changes nothing."""

import math

import pytest
import torch
from circuits.circuit_helpers import FEATURES, WIDTH, autoencoder, every_node, transcoder
from families import FAMILIES
from hand import hook_count, ids, padded, vector
from transformers import OlmoConfig, OlmoForCausalLM

import steer
from steer.circuits import FeatureCircuit, Graph, LogitDifference, LogProbability, feature_circuit
from steer.circuits.evaluation import Evaluation
from steer.circuits.graph import TARGET
from steer.circuits.linear import norms_of
from steer.errors import AnatomyError, ConfigError
from steer.features import Untrained
from steer.model.anatomy import Anatomy
from steer.model.tokens import Row

TARGET_OF = LogitDifference(5, 9)
TOKENS = 7
STEP = 1e-3  # of finite differences: norms of llama compute in fp32 whatever the model does


def rows(*lengths: int) -> list[Row]:
    return [Row(tuple(ids(1, length, seed)[0].tolist()), 0) for seed, length in enumerate(lengths)]


def pair() -> dict:
    return {"tc": transcoder(), "sae": autoencoder()}


def whole(model, dictionaries, prompts, target=TARGET_OF, *, roles=1, **options):
    """The circuit of all nodes and edges."""
    options = {"evaluate": False, **options}
    return feature_circuit(
        model, dictionaries, prompts, target, nodes=every_node(*dictionaries.values(), roles=roles), edges=10**6, **options
    )


def outgoing(graph: Graph) -> torch.Tensor:
    """[nodes] sum of the weights of edges out of each."""
    return torch.zeros(len(graph.nodes)).index_add_(0, graph.edges[:, 0], graph.weights)


def linearised(model):
    """A tiny llama whose blocks from 1 on, final norm and unembedding are one linear map of the stream at each token."""
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    model.model.norm = torch.nn.Identity()
    return model


# ---- scores


def by_hand(model, dictionary, row: Row, change) -> torch.Tensor:
    """The target when `change(f, h)` is added to the output of block 1, in fp64 with gradients."""

    def hook(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        new = h + change(dictionary.encode(h), h).to(h.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.model.layers[1].register_forward_hook(hook)
    try:
        return TARGET_OF(model(torch.tensor([row.ids])).logits[0], 0)
    finally:
        handle.remove()


def test_a_score_is_the_slope_of_the_target_by_a_feature(tiny):
    model = tiny("llama").double()
    sae, (row,) = autoencoder(), rows(TOKENS)
    graph = whole(model, {"sae": sae}, [row]).graph
    decoder = sae.decoder_rows(list(range(FEATURES))).double()
    features = [node for node in graph.of_kind("feature")]
    assert len(features) >= 4
    for node in features:
        at = decoder[node.index]
        up, down = (by_hand(model, sae, row, lambda f, h, s=sign: s * STEP * f[..., [node.index]] * at).detach() for sign in (1, -1))  # noqa: B023
        assert graph[node.name] == pytest.approx(float(up - down) / (2 * STEP), rel=1e-2, abs=1e-3)


def test_a_score_of_an_error_is_the_slope_by_the_error(tiny):
    model = tiny("llama").double()
    sae, (row,) = autoencoder(), rows(TOKENS)
    graph = whole(model, {"sae": sae}, [row]).graph
    up, down = (by_hand(model, sae, row, lambda f, h, s=sign: s * STEP * (h - sae.decode(f))).detach() for sign in (1, -1))
    assert graph["sae/error"] == pytest.approx(float(up - down) / (2 * STEP), rel=1e-2)


@pytest.mark.parametrize("gradient", ["plain", "linear"])
@pytest.mark.parametrize("options", [{}, {"skip": True}, {"untrained": Untrained(first=2)}, {"norm": "layer_norm"}], ids=str)
def test_the_edges_out_of_a_node_add_up_to_its_score(tiny, gradient, options):
    """Through every feature, error and the target, nothing is lost and nothing counted twice, also around tokens without nodes."""
    skip = options.pop("skip", False)
    dictionaries = {"early": autoencoder("layers.0.output", seed=40), "tc": transcoder(skip=skip), "sae": autoencoder(**options)}
    options["skip"] = skip
    graph = whole(tiny("llama"), dictionaries, rows(TOKENS, 5), gradient=gradient).graph
    assert {node.kind for node in graph.nodes} == {"feature", "error", "embedding", TARGET}
    is_target = torch.tensor([node.kind == TARGET for node in graph.nodes])
    sums = outgoing(graph)
    assert torch.allclose(sums[~is_target], graph.scores[~is_target], rtol=1e-3, atol=1e-4 * float(graph.scores.abs().max()))
    assert float(graph.scores[~is_target].abs().min()) > 0 and sums[is_target] == 0


def test_integrated_scores_add_up_to_what_ablating_a_place_costs(tiny):
    circuit = whole(tiny("llama"), {"sae": autoencoder()}, rows(TOKENS, 4), steps=64, evaluate=True)
    total = float(sum(circuit.graph[node.name] for node in circuit.graph.nodes if node.part == "sae"))
    gradient_alone = whole(tiny("llama"), {"sae": autoencoder()}, rows(TOKENS, 4)).graph
    plain = float(sum(gradient_alone[node.name] for node in gradient_alone.nodes if node.part == "sae"))
    cost = circuit.faithfulness.full - circuit.faithfulness.empty
    assert total == pytest.approx(cost, rel=0.02)
    assert abs(plain - cost) > 0.2 * abs(cost)  # the test would see a gradient at the values


def test_in_a_linear_model_attribution_is_exact_ablation(tiny):
    model = linearised(tiny("llama"))
    for baseline in ("zero", "mean"):
        circuit = whole(model, {"sae": autoencoder()}, rows(TOKENS, 5, 6), exact=10, embedding=False, baseline=baseline)
        assert len(circuit.exact.names) == 10
        assert torch.allclose(circuit.exact.attributed, circuit.exact.exact, rtol=1e-3, atol=1e-4)
        assert circuit.exact.correlation > 0.9999 and circuit.exact.rank_correlation > 0.99


def test_an_edge_within_a_block_is_the_product_of_two_rows(tiny):
    """What a transcoder writes reaches an autoencoder behind its block with nothing in between."""
    model, dictionaries, (row,) = tiny("llama"), pair(), rows(TOKENS)
    graph = whole(model, dictionaries, [row], positions="each", roles=TOKENS).graph
    tc, sae = dictionaries.values()
    with torch.no_grad():
        outputs = {}
        for name, module in (("mlp", model.model.layers[1].mlp), ("block", model.model.layers[1])):

            def keep(module, args, output, name=name):
                outputs[name] = (args[0], output)

            handle = module.register_forward_hook(keep)
            model(torch.tensor([row.ids]))
            handle.remove()
    x = outputs["mlp"][0]
    f = tc.encode(x)[0]
    of_sae = sae.encode(outputs["block"][1].reshape(TOKENS, WIDTH))
    products = tc.decoder_rows(list(range(FEATURES))) @ sae.encoder_rows(list(range(FEATURES))).T
    weights = [e for e in range(len(graph.weights)) if graph.nodes[graph.edges[e, 0]].part == "tc"]
    checked = 0
    for e in weights:
        source, receiver = (graph.nodes[place] for place in graph.edges[e].tolist())
        if source.kind == receiver.kind == "feature":
            assert source.role == receiver.role
            by_feature = graph[receiver.name] / float(of_sae[int(receiver.role), receiver.index])
            expected = float(f[int(source.role), source.index] * products[source.index, receiver.index]) * by_feature
            assert float(graph.weights[e]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
            checked += 1
    assert checked > 20


# ---- prompts


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_either_side_changes_nothing(tiny, side):
    model, dictionaries = tiny("llama"), pair()
    batch = padded(side)
    alone = [Row(tuple(r[m.bool()].tolist()), 0) for r, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    together = whole(model, dictionaries, batch).graph
    one_at_a_time = whole(model, dictionaries, alone, max_tokens=1).graph
    assert [node.name for node in together.nodes] == [node.name for node in one_at_a_time.nodes]
    assert torch.allclose(together.scores, one_at_a_time.scores, rtol=1e-3, atol=1e-5)
    assert torch.allclose(together.weights, one_at_a_time.weights, rtol=1e-3, atol=1e-5)


def test_scores_of_positions_and_roles_add_up_to_those_of_all_tokens(tiny):
    model, dictionaries, prompts = tiny("llama"), pair(), rows(TOKENS, TOKENS)
    summed = whole(model, dictionaries, prompts).graph
    each = whole(model, dictionaries, prompts, positions="each", roles=TOKENS).graph
    labels = [["a"] * 3 + ["b"] * (TOKENS - 3)] * 2
    by_role = whole(model, dictionaries, prompts, positions=labels, roles=2).graph
    assert {node.role for node in each.nodes} == {"", *map(str, range(TOKENS))} and {node.role for node in by_role.nodes} == {"", "a", "b"}
    for graph in (each, by_role):
        totals: dict[tuple, float] = {}
        for node, score in zip(graph.nodes, graph.scores.tolist(), strict=True):
            totals[node.kind, node.part, node.index] = totals.get((node.kind, node.part, node.index), 0) + score
        for node, score in zip(summed.nodes, summed.scores.tolist(), strict=True):
            assert totals[node.kind, node.part, node.index] == pytest.approx(score, rel=1e-3, abs=1e-4)


def test_a_data_set_is_the_mean_of_its_prompts(tiny):
    model, dictionaries, prompts = tiny("llama"), pair(), rows(TOKENS, 4)
    both = whole(model, dictionaries, prompts).graph
    one, two = (whole(model, dictionaries, [prompt]).graph for prompt in prompts)

    def score(graph, name):
        return graph[name] if name in {node.name for node in graph.nodes} else 0.0

    for node in both.nodes:
        assert both[node.name] == pytest.approx((score(one, node.name) + score(two, node.name)) / 2, rel=1e-3, abs=1e-5)


def test_tokens_without_a_label_have_no_nodes_and_run_as_they_are(tiny):
    model, prompts = tiny("llama"), rows(TOKENS)
    labels = [[None] * (TOKENS - 1) + ["last"]]
    circuit = whole(model, pair(), prompts, positions=labels, evaluate=True)
    assert {node.role for node in circuit.graph.nodes} == {"", "last"}
    each = whole(model, pair(), prompts, positions="each", roles=TOKENS).graph
    name = next(node.name for node in circuit.graph.nodes if node.kind == "feature")
    assert circuit.graph[name] == pytest.approx(each[name.replace("last", str(TOKENS - 1))], rel=1e-4)


def test_a_target_may_be_any_function_of_the_logits(tiny):
    model, prompts = tiny("llama"), rows(TOKENS, 5)
    said = LogProbability([5, 6])
    same = whole(model, pair(), prompts, lambda logits, prompt: logits[-1].log_softmax(-1)[[5, 6][prompt]])
    assert torch.equal(whole(model, pair(), prompts, said).graph.scores, same.graph.scores)
    with torch.no_grad():
        values = [model(torch.tensor([row.ids])).logits[0, -1].log_softmax(-1)[token] for row, token in zip(prompts, (5, 6), strict=True)]
    assert same.graph.facts["value"] == pytest.approx(float(sum(values)) / 2, rel=1e-5)


# ---- pruning and evaluation


def test_the_circuit_of_all_features_is_the_model_and_the_empty_one_is_reported(tiny):
    model = tiny("llama")
    circuit = whole(model, pair(), rows(TOKENS, 5), evaluate=True)
    f = circuit.faithfulness
    assert f.circuit == pytest.approx(f.full, abs=1e-5) and f.without_circuit == pytest.approx(f.errors_alone, abs=1e-5)
    assert circuit.graph.facts["value"] == pytest.approx(f.full, abs=1e-5)
    assert f.share("full") == 1 and f.share("empty") == 0 and f.circuit_alone != pytest.approx(f.circuit, abs=1e-3)


def test_ablating_the_circuit_in_the_evaluation_is_the_plan(tiny):
    """Two ways of one ablation: features of the running pass, errors kept."""
    model, prompts = tiny("llama"), rows(TOKENS)
    circuit = feature_circuit(model, pair(), prompts, TARGET_OF, nodes=3, edges=30)
    assert len(circuit.features) == 2 and len(circuit.graph.nodes) <= 10
    with circuit.ablation_plan().attached(model), torch.no_grad():
        ablated = float(TARGET_OF(model(torch.tensor([prompts[0].ids])).logits[0], 0))
    assert ablated == pytest.approx(circuit.faithfulness.without_circuit, rel=1e-4)
    assert ablated != pytest.approx(circuit.faithfulness.full, rel=1e-2)


def test_random_features_are_as_many_as_the_circuits_and_were_on_at_the_same_tokens(tiny, monkeypatch):
    model, dictionaries, prompts = tiny("llama"), {"sae": autoencoder()}, rows(TOKENS)
    drawn = []
    drawing = Evaluation._drawn
    monkeypatch.setattr(Evaluation, "_drawn", lambda *given: drawn.append(drawing(*given)) or drawn[-1])
    circuit = feature_circuit(model, dictionaries, prompts, TARGET_OF, nodes=4, edges=30, positions="each", embedding=False, draws=2)
    with torch.no_grad():
        h = model(torch.tensor([prompts[0].ids]), output_hidden_states=True).hidden_states[2][0]
        was_on = dictionaries["sae"].encode(h) != 0  # [tokens, features]
    counts = dict.fromkeys(circuit.graph.facts["roles"], 0)
    for node in circuit.graph.of_kind("feature"):
        counts[node.role] += 1
    assert sum(counts.values()) >= 3 and circuit.faithfulness.drawn_share == 1
    for masks in drawn:
        assert masks["sae"].sum(1).tolist() == list(counts.values()) and not bool((masks["sae"] & ~was_on).any())


def test_too_few_others_for_a_random_circuit_are_reported(tiny, tmp_path):
    model, dictionaries = tiny("llama"), {"sae": autoencoder()}
    circuit = whole(model, dictionaries, rows(TOKENS), evaluate=True)
    f = circuit.faithfulness
    assert f.drawn_share < 0.5 and "drawn_share" not in f.shares()
    assert FeatureCircuit.load(circuit.save(tmp_path / "circuit"), dictionaries).faithfulness == f
    undrawn = feature_circuit(model, dictionaries, rows(TOKENS), TARGET_OF, nodes=3, edges=9, draws=0)
    nothing = FeatureCircuit.load(undrawn.save(tmp_path / "undrawn"), dictionaries).faithfulness
    assert nothing.circuit == undrawn.faithfulness.circuit and math.isnan(nothing.random) and math.isnan(nothing.share("without_random"))


def test_faithfulness_on_other_prompts_is_that_of_the_same_features_there(tiny):
    model, dictionaries, prompts, others = tiny("llama"), pair(), rows(TOKENS), rows(TOKENS, 5)[1:]
    for positions in ("sum", "each"):
        circuit = feature_circuit(model, dictionaries, prompts, TARGET_OF, nodes=4, edges=30, positions=positions)
        assert circuit.faithfulness_on(model, prompts, TARGET_OF, positions=positions) == circuit.faithfulness
    with pytest.raises(ConfigError, match="do not have"):
        circuit.faithfulness_on(model, others, TARGET_OF)
    summed = feature_circuit(model, dictionaries, prompts, TARGET_OF, nodes=4, edges=30)
    with summed.ablation_plan().attached(model), torch.no_grad():
        ablated = float(TARGET_OF(model(torch.tensor([others[0].ids])).logits[0], 0))
    assert summed.faithfulness_on(model, others, TARGET_OF).without_circuit == pytest.approx(ablated, rel=1e-4)


def test_error_shares_are_of_single_tokens_whatever_is_pruned_or_added_up(tiny):
    model, dictionaries = tiny("llama"), {"sae": autoencoder()}
    graph = whole(model, dictionaries, rows(TOKENS), positions="each", roles=TOKENS).graph
    sizes = {node.kind: sum(abs(graph[n.name]) for n in graph.nodes if n.kind == node.kind) for node in graph.nodes if node.part == "sae"}
    few = feature_circuit(model, dictionaries, rows(TOKENS), TARGET_OF, nodes=1, edges=5, evaluate=False)
    assert few.error_share["sae"] == pytest.approx(sizes["error"] / (sizes["error"] + sizes["feature"]), rel=1e-4)


def test_the_model_is_left_as_it_was(tiny):
    model = tiny("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    requires = {name: p.requires_grad for name, p in model.named_parameters()}
    whole(model, pair(), rows(TOKENS), gradient="linear")

    def broken(logits, prompt):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole(model, pair(), rows(TOKENS), broken)
    assert hook_count(model) == 0 and model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert requires == {name: p.requires_grad for name, p in model.named_parameters()}


def test_plans_that_are_attached_stay_in_force(tiny):
    """Also one at the site of a dictionary, whose edit comes before the split."""
    model, (row,) = tiny("llama"), rows(TOKENS)
    plan = steer.Plan(steer.Intervention(steer.Add(vector()), "layers.1.output", strength=2.0))
    plain = whole(model, pair(), [row]).graph
    with plan.attached(model):
        steered = whole(model, pair(), [row]).graph
        with torch.no_grad():
            value = float(TARGET_OF(model(torch.tensor([row.ids])).logits[0], 0))
    assert steered.facts["value"] == pytest.approx(value, rel=1e-5) and plain.facts["value"] != pytest.approx(value, rel=1e-2)
    assert torch.allclose(outgoing(steered)[:-1], steered.scores[:-1], rtol=1e-3, atol=1e-4 * float(steered.scores.abs().max()))


def test_a_pass_that_may_not_be_stopped_gives_the_same_edges(tiny, monkeypatch):
    model = tiny("llama")
    stopped = whole(model, pair(), rows(TOKENS)).graph
    monkeypatch.setattr("steer.circuits.attribution.is_sharded", lambda model: True)
    through = whole(model, pair(), rows(TOKENS)).graph
    assert through.nodes == stopped.nodes and torch.allclose(through.weights, stopped.weights, atol=1e-6)


def test_a_model_in_half_precision(tiny):
    graph = whole(tiny("llama").bfloat16(), pair(), rows(TOKENS), exact=4).graph
    full = whole(tiny("llama"), pair(), rows(TOKENS)).graph
    shared = sorted({node.name for node in graph.nodes} & {node.name for node in full.nodes})
    assert len(shared) > 10
    both = torch.tensor([[graph[name] for name in shared], [full[name] for name in shared]])
    assert float(torch.corrcoef(both)[0, 1]) > 0.9 and bool(torch.isfinite(graph.weights).all())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3"])
def test_other_families(family):
    """Frozen weights, other norms, parallel blocks: edges still add up to scores, for plain and linear gradients."""
    model = FAMILIES[family]().requires_grad_(False)
    for gradient in ("plain", "linear"):
        graph = whole(model, pair(), rows(TOKENS), gradient=gradient).graph
        assert torch.allclose(outgoing(graph)[:-1], graph.scores[:-1], rtol=2e-3, atol=2e-4 * float(graph.scores.abs().max()))


def test_linear_gradients_leave_norms_and_patterns_alone(tiny):
    """A change of the stream behind the last block that only its length sees has a plain gradient and a linear one of its own."""
    model, (row,) = tiny("llama"), rows(TOKENS)
    target = lambda logits, prompt: logits[-1, 5]  # noqa: E731
    site = f"layers.{len(model.model.layers) - 1}.output"
    sae = autoencoder(site)
    plain, linear = (
        whole(model, {"sae": sae}, [row], target, gradient=gradient, embedding=False).graph for gradient in ("plain", "linear")
    )
    with torch.no_grad():
        kept = {}
        handle = model.model.layers[-1].register_forward_hook(lambda m, a, out: kept.update(h=out[0] if isinstance(out, tuple) else out))
        logits = model(torch.tensor([row.ids])).logits[0]
        handle.remove()
    h = kept["h"].reshape(-1, WIDTH)[-1]
    norm = model.model.norm
    scale = norm.weight.detach() / (h.square().mean() + norm.variance_epsilon).sqrt()
    expected = sae.encode(h).detach() * ((sae.decoder_rows(list(range(FEATURES))) * scale) @ model.lm_head.weight[5].detach())
    for node in linear.of_kind("feature"):
        assert linear[node.name] == pytest.approx(float(expected[node.index]), rel=1e-3, abs=1e-5)
    rest = float((sae.decoder_bias * scale) @ model.lm_head.weight[5].detach())
    total = sum(linear[node.name] for node in linear.nodes) + rest
    assert total == pytest.approx(float(logits[-1, 5]), rel=1e-3)  # linear scores are the logit itself, part by part
    assert sum(plain[node.name] for node in plain.nodes) + rest != pytest.approx(float(logits[-1, 5]), rel=1e-2)


def test_norms_without_a_gain_are_constants_too():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OlmoForCausalLM(OlmoConfig(**sizes)).eval()
    assert len(norms_of(Anatomy.find(model))) == 7
    target = lambda logits, prompt: 100 * logits[-1, 5]  # noqa: E731
    graph = whole(model, {"sae": autoencoder("layers.2.output")}, rows(TOKENS), target, gradient="linear", embedding=False).graph
    with torch.no_grad():
        kept = {}
        handle = model.model.layers[-1].register_forward_hook(lambda m, a, out: kept.update(h=out[0] if isinstance(out, tuple) else out))
        logits = model(torch.tensor([rows(TOKENS)[0].ids])).logits[0]
        handle.remove()
        h = kept["h"].reshape(-1, WIDTH)[-1]
        bias = autoencoder().decoder_bias
        rest = 100 * ((bias - bias.mean()) / (h.var(correction=0) + 1e-5).sqrt()) @ model.lm_head.weight[5]
    assert sum(graph[node.name] for node in graph.nodes) + float(rest) == pytest.approx(100 * float(logits[-1, 5]), rel=1e-3)


def test_linear_gradients_reach_what_a_norm_of_the_block_gives(tiny):
    """OLMo 2 has a norm between an MLP and the stream: what is put in the place of its output has the gradient of the stream."""
    model, dictionary = tiny("olmo2"), autoencoder("layers.2.mlp.output")
    graph = whole(model, {"sae": dictionary}, rows(TOKENS), gradient="linear").graph
    kept = {}
    with torch.no_grad():
        handles = [
            model.model.norm.register_forward_pre_hook(lambda module, args: kept.update(stream=args[0][0, -1])),
            model.model.layers[2].post_feedforward_layernorm.register_forward_hook(lambda module, args, y: kept.update(written=y[0, -1])),
        ]
        model(torch.tensor([rows(TOKENS)[0].ids]))
        for handle in handles:
            handle.remove()
        norm = model.model.norm
        by_logits = model.lm_head.weight[5] - model.lm_head.weight[9]
        by_stream = by_logits * norm.weight / (kept["stream"].square().mean() + norm.variance_epsilon).sqrt()
        f = dictionary.encode(kept["written"][None])[0]
    for node in graph.nodes:
        if node.name.startswith("sae/") and node.name != "sae/error":
            number = int(node.name.removeprefix("sae/"))
            expected = float(f[number] * (dictionary.decoder.all(by_stream)[number] @ by_stream))
            assert graph[node.name] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert any(graph[f"sae/{number}"] for number in range(FEATURES))


def test_an_unknown_norm_is_refused_for_linear_gradients(tiny):
    model = tiny("llama")

    class OddNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(WIDTH))

        def forward(self, x):
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    model.model.layers[1].input_layernorm = OddNorm()
    whole(model, pair(), rows(TOKENS))
    with pytest.raises(AnatomyError, match="OddNorm"):
        whole(model, pair(), rows(TOKENS), gradient="linear")
    assert hook_count(model) == 0


def test_numbers_do_not_depend_on_who_shares_a_batch(tiny):
    model, dictionaries, prompts = tiny("llama"), pair(), rows(TOKENS, 6, 5, 4)
    a, b = (whole(model, dictionaries, prompts, max_tokens=most, exact=6) for most in (7, 4096))
    assert torch.allclose(a.graph.scores, b.graph.scores, atol=1e-5) and torch.allclose(a.graph.weights, b.graph.weights, atol=1e-5)
    assert torch.allclose(a.exact.exact, b.exact.exact, atol=1e-5)
