"""Circuits of pronouns in an experiment: log-odds by hand, treatments and controls, one circuit in every use, `steer bias`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_helpers import command, read_metrics
from families import FAMILIES
from metrics_keys import undocumented
from pronoun_data import pronoun_circuits, write_splits
from tiny_experiment import write_model
from tiny_tokenizer import tiny_tokenizer
from torch import nn

from steer.circuits import Circuit, ComponentGraph
from steer.errors import ConfigError
from steer.experiment.arms import Arm
from steer.experiment.metrics.log_odds import LogOdds
from steer.experiment.outcome import Outcome, measure_all
from steer.experiment.pronoun_circuits import _said
from steer.experiment.treatment import Bench
from steer.experiment.treatments.circuit import CircuitTreatment
from steer.experiment.treatments.mitigation import MitigationTreatment
from steer.model import precision

SHORT = {"steps": 2, "shifts": 3, "facts": 2, "texts": 1}
ARMS = [
    "experiment.arms.gates.treatment.settings.steps=2",
    "experiment.arms.gates.doses=[0.5,1]",
    "experiment.arms.baked.treatment.settings.steps=2",
    "experiment.arms.heads.treatment.settings.nodes=2",
    "experiment.arms.random_gates.draws=1",
    "experiment.arms.random_heads.draws=1",
    "experiment.arms.projection.treatment.options.site=layers.1.output",
    *(f"experiment.arms.{name}=null" for name in ("leace", "inlp", "sentence_debias", "self_debias", "cda", "prompt")),
]


@pytest.fixture
def model() -> nn.Module:
    return FAMILIES["llama"]()


@pytest.fixture
def bench(model: nn.Module, tmp_path: Path) -> Bench:
    return Bench(model, tiny_tokenizer(), [], circuits=pronoun_circuits(model, tmp_path))


def odds(model: nn.Module, text: str) -> float:
    tokenizer = tiny_tokenizer()
    he, she = (tokenizer.convert_tokens_to_ids(word) for word in ("he", "she"))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(text).input_ids])).logits[0, -1]
    return float(logits[he] - logits[she])


@pytest.mark.parametrize("reads", ["shift", "odds", "accuracy"])
def test_log_odds_are_those_of_the_logits(model: nn.Module, reads: str) -> None:
    text, baseline = "the cat is good and", "the game is good and"
    item = {"id": "0", "prompt": text, "baseline": baseline, "first": " he", "second": " she"}
    expected = {"odds": odds(model, text), "shift": abs(odds(model, text) - odds(model, baseline)), "accuracy": odds(model, text) > 0}
    assert LogOdds(reads).items(model, tiny_tokenizer(), [item])["0"] == pytest.approx(float(expected[reads]), abs=1e-4)


def test_odds_and_accuracy_of_the_same_items_are_read_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"prompt": f"the {word} is good and", "baseline": "the game is good and", "first": " he", "second": " she"}
        for word in ("cat", "dog")
    ]
    outcomes = [
        Outcome("shift", LogOdds("shift"), rows, role="primary", better="lower"),
        *(Outcome(reads, LogOdds(reads), rows, role="secondary", better="higher") for reads in ("odds", "accuracy")),
        Outcome("other", LogOdds("odds"), rows[::-1], role="secondary", better="higher"),
    ]
    read: list[str] = []
    reading = LogOdds.reading
    monkeypatch.setattr(LogOdds, "reading", lambda metric, *args: read.append(metric.reads) or reading(metric, *args))
    found = measure_all(outcomes, model, tiny_tokenizer())
    assert read == ["shift", "odds", "odds"]
    for outcome in outcomes:
        assert found[outcome.name] == outcome.metric.items(model, tiny_tokenizer(), outcome.items)


@pytest.mark.parametrize(("by", "settings"), [("attribution", {"nodes": 2}), ("gates", SHORT)])
def test_a_circuit_is_the_same_at_inference_and_baked_and_is_kept(bench: Bench, by: str, settings: dict) -> None:
    treatment = CircuitTreatment(by, settings=settings).prepare(bench)
    assert not treatment.circuit.is_empty
    text = "the house is good and"
    plain = odds(bench.model, text)
    with treatment.acting(bench.model):
        ablated = odds(bench.model, text)
    with treatment.baked(bench.model):
        baked = odds(bench.model, text)
    assert abs(ablated - plain) > 1e-4
    assert baked == pytest.approx(ablated, abs=1e-4)
    assert odds(bench.model, text) == plain
    (kept,) = bench.circuits.folder.iterdir()
    assert torch.equal(Circuit.load(kept).nodes, treatment.circuit.nodes)


def test_a_control_has_as_many_other_components_with_the_same_amounts(bench: Bench) -> None:
    arm = Arm("random", "", CircuitTreatment("attribution", settings={"nodes": 2}), "inference", control_of="heads", draws=2)
    wanted = arm.treatment.prepare(bench).circuit
    for partner in arm.treatments(bench):
        assert partner.circuit.nodes.sum() == wanted.nodes.sum() and not torch.equal(partner.circuit.nodes, wanted.nodes)


def test_a_mitigation_is_fitted_on_the_words_of_the_experiment(bench: Bench) -> None:
    treatment = MitigationTreatment("projection", {"site": "layers.1.output"}).prepare(bench)
    plain = odds(bench.model, "the sun is good and")
    with treatment.acting(bench.model):
        assert odds(bench.model, "the sun is good and") != plain
    assert odds(bench.model, "the sun is good and") == plain


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ConfigError, match="path"):
        CircuitTreatment("file")
    with pytest.raises(ConfigError, match="stepz"):
        CircuitTreatment("gates", settings={"stepz": 3})
    with pytest.raises(ConfigError, match="experiment"):
        CircuitTreatment("attribution").prepare(Bench(nn.Identity(), None, []))


@pytest.fixture(scope="module")
def bias(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Runs `steer bias` on a tiny model, and gives metrics.json."""
    shared = tmp_path_factory.mktemp("bias")
    parts = f"model.name={write_model(shared / 'model')}", f"experiment.data={write_splits(shared / 'data')}"

    def run(folder: Path, *more: str) -> dict[str, Any]:
        options = "experiment.circuit.baseline=game", "trainer.accelerator=cpu", f"folder={folder}"
        assert command("bias", *parts, *options, *ARMS, *more) == 0
        return read_metrics(folder)

    return run


def test_steer_bias_finds_ablates_and_reports(bias: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    metrics = bias(folder, "experiment.precision=32-true")
    assert {made["method"] for made in metrics["circuits"]["made"]} == {"learned gates", "eap_ig"}
    assert [points[0]["guardrail"] for points in metrics["trade_off_others"]] == ["fact_accuracy"]
    arms = {arm["name"]: arm["outcomes"]["shift"] for arm in metrics["arms"]}
    assert arms["baked"]["mean"] == pytest.approx(arms["gates x1"]["mean"], abs=1e-4)
    page = (folder / "report.html").read_text()
    assert "The strongest edges" in page and "Effect against fact accuracy" in page
    assert not undocumented(metrics) and "bfloat16" not in page


def test_what_is_faster_here_is_settled_once_for_a_folder(
    bias: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [f"experiment.arms.{name}=null" for name in ("heads", "random_heads", "projection", "baked")]
    few.append("+experiment.outcomes.kl={metric:kl_to_base,data:damage,role:secondary}")
    whole = bias(tmp_path / "whole", *few, "experiment.precision=32-true")
    monkeypatch.setattr(precision, "_speed_of_bf16", lambda: 2.0)
    rounded = bias(tmp_path / "out", *few)
    monkeypatch.setattr(precision, "_speed_of_bf16", lambda: 1.0)  # a machine without instructions for it goes on with the run
    again = bias(tmp_path / "out", *few)
    assert again["cells"] == rounded["cells"] and again["design"]["precision"] == rounded["design"]["precision"] == "bf16-mixed"
    monkeypatch.setattr(precision, "_speed_of_bf16", lambda: 2.0)
    (tmp_path / "whole" / "config" / "precision.txt").unlink(missing_ok=True)
    same = bias(tmp_path / "whole", *few)
    assert same["cells"] == whole["cells"], "what a folder was begun with"
    assert not {cell["key"] for cell in rounded["cells"].values()} & {cell["key"] for cell in whole["cells"].values()}
    assert "bfloat16" in (tmp_path / "out" / "report.html").read_text()
    for of_rounded, of_whole in zip(rounded["arms"], whole["arms"], strict=True):
        for name, found in of_rounded["outcomes"].items():
            if name != "fact_accuracy":  # of near ties in a model that knows nothing
                assert found["mean"] == pytest.approx(of_whole["outcomes"][name]["mean"], abs=0.05)
    assert rounded["arms"][0]["outcomes"]["kl"]["before"] == 0, "the base is read for it as it is measured"
    assert rounded["arms"][0]["outcomes"]["damage"]["before"] != whole["arms"][0]["outcomes"]["damage"]["before"]


def test_what_is_said_of_circuits_is_the_same_after_json_for_any_number_of_blocks(bench: Bench) -> None:
    made = CircuitTreatment("gates", settings=SHORT).prepare(bench).circuit
    layers = [*made.graph.layers, *made.graph.layers * 4]
    deep = ComponentGraph(tuple(layers))
    width = len(next(iter(made.neurons.values())))
    nodes = torch.ones(len(deep.writers), dtype=torch.float64)
    said = _said(Circuit(deep, nodes, neurons={layer: torch.ones(width) for layer in (2, 10)}))
    assert json.dumps(said, sort_keys=True) == json.dumps(json.loads(json.dumps(said)), sort_keys=True)
