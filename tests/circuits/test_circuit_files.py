"""Circuits as graphs, files and plans: pruning keeps paths, files round-trip, damage and wrong input are told, an ablation is a plan."""

import json
from dataclasses import replace

import pytest
import torch
from circuits.circuit_helpers import autoencoder, transcoder
from circuits.test_feature_circuit import TARGET_OF, TOKENS, pair, rows
from hand import ids

import steer
from steer.circuits import FeatureCircuit, Graph, LogitDifference, LogProbability, Node, feature_circuit
from steer.errors import ConfigError, DamagedFileError, NonFiniteError, SiteError, WidthError, WrongKindError, WrongModelError
from steer.features import Origin


def chain(weights: list[float]) -> Graph:
    """a -> b -> target, c -> target, and a -> c, in this order of weights."""
    nodes = (*(Node("feature", "layers.0.output", name, 1) for name in "abc"), Node("target"))
    edges = torch.tensor([[0, 1], [1, 3], [2, 3], [0, 2]])
    return Graph(nodes, torch.tensor([3.0, 2.0, 1.0, 0.0]), edges, torch.tensor(weights))


@pytest.fixture
def circuit(tiny) -> FeatureCircuit:
    return feature_circuit(tiny("llama"), pair(), rows(TOKENS), TARGET_OF, nodes=5, edges=40)


# ---- graphs


def test_pruning_takes_the_strongest_edges_into_what_the_target_was_reached_from():
    graph = chain([5.0, -4.0, 0.1, 3.0])
    pruned = graph.pruned(2)
    assert [node.name for node in pruned.nodes] == ["a/1", "b/1", "target"]
    assert pruned.weight("a/1", "b/1") == 5 and pruned.weight("b/1", "target") == -4 and pruned["a/1"] == 3
    assert pruned.weight("a/1", "target") == 0
    three = graph.pruned(3)  # a -> c is stronger than c -> target, but leads nowhere before that is in
    assert three.weight("c/1", "target") == pytest.approx(0.1) and three.weight("a/1", "c/1") == 0
    assert graph.pruned(4).weight("a/1", "c/1") == 3 and len(graph.pruned(0).nodes) == 1


def test_a_graph_that_does_not_fit_together_is_refused():
    nodes, none = (Node("target"),), torch.empty(0, 2, dtype=torch.long)
    with pytest.raises(ConfigError, match="`scores`"):
        Graph(nodes, torch.zeros(2), none, torch.empty(0))
    with pytest.raises(ConfigError, match="one name"):
        Graph(nodes * 2, torch.zeros(2), none, torch.empty(0))
    with pytest.raises(ConfigError, match="no node"):
        Graph(nodes, torch.zeros(1), torch.tensor([[0, 1]]), torch.ones(1))
    with pytest.raises(ConfigError, match="no node 'b'"):
        chain([1.0] * 4)["b"]


# ---- files


@pytest.mark.parametrize("name", ["circuit", "circuit.safetensors"])
def test_files_round_trip(circuit, tmp_path, name):
    loaded = FeatureCircuit.load(circuit.save(tmp_path / name), circuit.dictionaries)
    assert loaded.graph.nodes == circuit.graph.nodes and loaded.graph.facts == circuit.graph.facts
    assert all(torch.equal(getattr(loaded.graph, part), getattr(circuit.graph, part)) for part in ("scores", "edges", "weights"))
    assert loaded.features == circuit.features and loaded.error_share == circuit.error_share
    assert loaded.faithfulness == circuit.faithfulness
    assert Graph.load(tmp_path / name).nodes == circuit.graph.nodes


def test_other_dictionaries_are_told(circuit, tmp_path):
    path = circuit.save(tmp_path / "circuit")
    with pytest.raises(WrongModelError, match="'sae', which was not given"):
        FeatureCircuit.load(path, {"tc": transcoder()})
    with pytest.raises(WrongModelError, match="another dictionary") as told:
        FeatureCircuit.load(path, {"tc": transcoder(), "sae": autoencoder("layers.0.output")})
    assert "layers.1.output" in str(told.value.expected) and "layers.0.output" in str(told.value.found)


def test_damaged_and_foreign_files_are_told(circuit, tmp_path):
    path = circuit.save(tmp_path / "circuit")
    tensors = bytearray((path / "tensors.safetensors").read_bytes())
    tensors[-1] ^= 1
    (path / "tensors.safetensors").write_bytes(bytes(tensors))
    with pytest.raises(DamagedFileError):
        FeatureCircuit.load(path, circuit.dictionaries)
    with pytest.raises(WrongKindError):
        Graph.load(circuit.ablation_plan().save(tmp_path / "plan"))
    steer.save_artifact(tmp_path / "odd", "circuit", {"scores": torch.zeros(3), "edges": torch.zeros(0, 2, dtype=torch.long),
                        "weights": torch.zeros(0)}, {"nodes": [], "facts": {}})  # fmt: skip
    with pytest.raises(DamagedFileError, match="no consistent circuit"):
        Graph.load(tmp_path / "odd")
    steer.save_artifact(tmp_path / "bare", "circuit", {}, {"facts": {}})
    with pytest.raises(DamagedFileError):
        Graph.load(tmp_path / "bare")


# ---- plans


def test_an_ablation_is_a_plan_in_generation_with_a_cache(tiny, circuit):
    """Every step of a cached generation gives the logits of an uncached pass over the same tokens."""
    model = tiny("llama")
    plan = circuit.ablation_plan()
    assert {i.name: list(i.operator.features) for i in plan.interventions} == circuit.features
    prompt = ids(1, 5)
    plain = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with plan.attached(model):
        out = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
        with torch.no_grad():
            whole = model(out.sequences).logits[0, 4:-1]
    assert torch.allclose(torch.cat(out.logits), whole, atol=1e-4) and not torch.equal(out.sequences, plain)


def test_an_ablation_is_a_plan_in_training(tiny, circuit):
    model, batch = tiny("llama").train(), ids(2, 6)

    def losses(plan):
        with plan.attached(model):
            loss = model(batch, labels=batch).loss
            (gradient,) = torch.autograd.grad(loss, [model.model.layers[0].mlp.up_proj.weight])
        return loss.item(), gradient

    ablated, none, half = (losses(circuit.ablation_plan(strength)) for strength in (1.0, 0.0, 0.5))
    plain = model(batch, labels=batch).loss.item()
    assert none[0] == pytest.approx(plain, rel=1e-6) and ablated[0] != pytest.approx(plain, rel=1e-5) and half[0] != ablated[0]
    assert bool(torch.isfinite(ablated[1]).all()) and not torch.allclose(ablated[1], none[1])
    assert circuit.ablation_plan(phases=("train",)).interventions[0].phases == ("train",)


def test_an_ablation_has_a_text_and_a_file(tiny, circuit, tmp_path):
    model, batch = tiny("llama"), ids(1, 6)
    plan = circuit.ablation_plan(0.5, scope="all")
    text = steer.plan_to_text(plan, circuit.dictionaries)
    assert text.startswith("0.5 ablate_features(tc, features=[") and "+ 0.5 ablate_features(sae, features=[" in text
    with torch.no_grad():
        logits = []
        for again in (plan, steer.plan_from_text(text, circuit.dictionaries), steer.Plan.load(plan.save(tmp_path / "plan"))):
            with again.attached(model):
                logits.append(model(batch).logits)
    assert torch.allclose(logits[0], logits[1], atol=1e-6) and torch.equal(logits[0], logits[2])


def test_a_circuit_without_features_has_no_plan(circuit):
    empty = replace(circuit, graph=circuit.graph.pruned(0))
    with pytest.raises(ConfigError, match="nothing to ablate"):
        empty.ablation_plan()


# ---- bad input


def of(model, dictionaries=None, prompts=None, target=TARGET_OF, **options):
    return feature_circuit(
        model, pair() if dictionaries is None else dictionaries, rows(5) if prompts is None else prompts, target, **options
    )


def test_wrong_input_is_told(tiny):
    model = tiny("llama")
    wide = autoencoder()
    wide.origin = Origin(("layers.1.mlp.neurons",), ("layers.1.mlp.neurons",))
    for error, match, arguments in (
        (ConfigError, "no dictionaries", {"dictionaries": {}}),
        (ConfigError, "the dictionaries of a circuit", {"dictionaries": [autoencoder()]}),
        (ConfigError, "is no word", {"dictionaries": {"": autoencoder()}}),
        (ConfigError, "is no word", {"dictionaries": {"a/b": autoencoder()}}),
        (ConfigError, "'sae'", {"dictionaries": {"sae": "a path"}}),
        (ConfigError, "split the same activation", {"dictionaries": {"a": autoencoder(), "b": autoencoder()}}),
        (WidthError, "does not fit this model", {"dictionaries": {"wide": wide}}),
        (SiteError, "out of range", {"dictionaries": {"sae": autoencoder("layers.7.output")}}),
        (ConfigError, "no prompts", {"prompts": []}),
        (ConfigError, "the prompts", {"prompts": "a text"}),
        (ConfigError, "tokens that the model does not know", {"prompts": [steer.model.tokens.Row((5, 900), 0)]}),
        (ConfigError, "different length", {"prompts": rows(5, 6), "positions": "each"}),
        (ConfigError, "do not fit the prompts", {"positions": [["a"]]}),
        (ConfigError, "a label", {"positions": [["", "a", "b", "c", "d"]]}),
        (ConfigError, "unknown `positions`", {"positions": "every"}),
        (ConfigError, "no target", {"target": 5}),
        (ConfigError, "gives no number", {"target": lambda logits, prompt: logits[-1]}),
        (NonFiniteError, "prompt 0 is not finite", {"target": lambda logits, prompt: logits[-1, 5] * float("nan")}),
        (ConfigError, "does not exist", {"target": LogProbability(900)}),
        (ConfigError, "tokens of a target", {"target": LogitDifference([5], 9), "prompts": rows(5, 5)}),
        (ConfigError, "`baseline`", {"baseline": "median"}),
        (ConfigError, "`gradient`", {"gradient": "gim"}),
        (ConfigError, "`nodes`", {"nodes": 0}),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            of(model, **arguments)


def test_prompts_may_be_texts(tiny, tiny_tokenizer):
    model, texts = tiny("llama"), ["the cat sat", "a dog ran in the house"]
    batch = tiny_tokenizer(texts, padding=True, return_tensors="pt")
    a = of(model, prompts=texts, tokenizer=tiny_tokenizer, evaluate=False)
    b = of(model, prompts=batch, evaluate=False)
    assert torch.equal(a.graph.scores, b.graph.scores) and a.graph.nodes == b.graph.nodes
    with pytest.raises(ConfigError):
        of(model, prompts=texts)  # this model was not loaded with a tokenizer


def test_a_manifest_that_was_changed_is_told(circuit, tmp_path):
    path = circuit.save(tmp_path / "circuit")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["nodes"][0]["index"] = 3
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedFileError):
        Graph.load(path)
