"""Features of an experiment: edits and controls by hand, a planted concept that is found, `steer ab` from a configuration to its table."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from experiment_helpers import command, read_metrics
from families import FAMILIES, WIDTH
from features.feature_plans import FEATURES, SITE, autoencoder
from metrics_keys import documented, keys, undocumented
from tiny_experiment import write_data, write_model
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn

import steer
from steer.directions.at_words import difference_at_words, token_states
from steer.errors import ConfigError, ContrastError
from steer.experiment.concept_search import find_concepts
from steer.experiment.experiment_features import ExperimentFeatures
from steer.experiment.metrics.concept_probability import next_word, word_tokens
from steer.experiment.result import Result
from steer.experiment.treatment import Bench
from steer.experiment.treatments.feature import FeatureTreatment
from steer.features import Encoder, InMemory, Origin, Untrained
from steer.features.activations.jumprelu import JumpReLU
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.model.site import Site
from steer.model.tokens import plain

TEXTS = ("the cat is good .", "where is the dog ?", "one two three four", "a song and a game", "the song is warm")
PLACE = Site.parse(SITE)


@pytest.fixture
def model() -> nn.Module:
    return FAMILIES["llama"]()


@pytest.fixture
def features(model: nn.Module) -> ExperimentFeatures:
    dictionary = autoencoder("jumprelu", untrained=Untrained(first=1))
    dictionary.maxima, dictionary.density = torch.linspace(1, 3, FEATURES), torch.full((FEATURES,), 0.1)
    return ExperimentFeatures(model, dictionary, [5])


@pytest.fixture
def bench(model: nn.Module, features: ExperimentFeatures) -> Bench:
    tokenizer = tiny_tokenizer()
    return Bench(model, tokenizer, [plain(tokenizer, text) for text in TEXTS], features=features)


def states(model: nn.Module, plan: steer.Plan | None = None) -> Tensor:
    """[tokens, width] of the first text at the site."""
    rows = [plain(tiny_tokenizer(), TEXTS[0])]
    with nullcontext() if plan is None else plan.attached(model):
        return token_states(model, rows, PLACE)[0]


# ---- the treatment


@torch.no_grad()
def test_a_clamp_sets_the_feature_to_multiples_of_its_maximum_but_at_the_first_token(bench: Bench, features: ExperimentFeatures) -> None:
    treatment = FeatureTreatment("clamp", dose=2.0).prepare(bench)
    before, after = states(bench.model), states(bench.model, treatment.training_plan())
    f = features.dictionary.encode_selected(before, [5])
    expected = before + (2 * features.dictionary.maxima[5] - f) * features.dictionary.decoder_rows([5])
    assert torch.equal(after[0], before[0]) and torch.allclose(after[1:], expected[1:], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("edit", ["clamp", "decoder"])
def test_random_features_are_clamped_by_as_much_as_the_chosen_one(edit: str, bench: Bench) -> None:
    treatment = FeatureTreatment(edit).prepare(bench)
    size = treatment.size(bench)[edit]
    used = set()
    for seed in range(4):
        partner = treatment.control(bench, seed)
        assert partner.size(bench)[edit] == pytest.approx(size, rel=1e-3)
        plan = partner.training_plan()
        assert plan is not None
        used.add(plan.interventions[0].operator.features)
    assert len(used) == 4 and (5,) not in used


def test_an_ablation_is_compared_with_that_of_other_features(bench: Bench) -> None:
    treatment = FeatureTreatment("ablate").prepare(bench)
    plan = treatment.control(bench, 0).training_plan()
    assert plan is not None and plan.interventions[0].operator.name == "ablate_features" and treatment.size(bench) == {}


def test_what_is_missing_is_named(bench: Bench, features: ExperimentFeatures) -> None:
    with pytest.raises(ConfigError, match="experiment that has none"):
        FeatureTreatment("clamp").prepare(Bench(bench.model, bench.tokenizer, bench.rows))
    with pytest.raises(ConfigError, match="chosen by number"):
        FeatureTreatment("at").prepare(bench)
    features.dictionary.maxima = None
    with pytest.raises(ConfigError, match="nobody recorded the largest"):
        _ = features.length
    with pytest.raises(ConfigError, match="clamp"):
        FeatureTreatment("clam")


# ---- mean differences


@torch.no_grad()
def test_mean_differences_at_and_before_words_by_hand(model: nn.Module) -> None:
    tokenizer = tiny_tokenizer()
    rows = [plain(tokenizer, text) for text in TEXTS]
    song = word_tokens(tokenizer, ["song"])["song"]
    every, at, before = [], [], []
    for row in rows:
        h = token_states(model, [row], PLACE)[0]
        for i, token in enumerate(row.ids):
            every.append(h[i])
            at.append(token == song)
            before.append(i + 1 < len(row.ids) and row.ids[i + 1] == song)
    every = torch.stack(every)
    for where, of_word in (("at", torch.tensor(at)), ("before", torch.tensor(before))):
        expected = every[of_word].mean(0) - every[~of_word].mean(0)
        assert torch.allclose(difference_at_words(model, rows, [song], PLACE, where=where), expected, atol=1e-5)
    with pytest.raises(ContrastError, match="0 at a word"):
        difference_at_words(model, rows, [word_tokens(tokenizer, ["moon"])["moon"]], PLACE)


# ---- the metric


@torch.no_grad()
def test_concept_probability_by_hand(model: nn.Module) -> None:
    tokenizer = tiny_tokenizer()
    rows = [plain(tokenizer, text) for text in TEXTS[:3]]
    words = torch.tensor([[10, 20], [30, 40]])
    found, losses = next_word(model, rows, words, pad=0)
    for row, of_row, loss in zip(rows, found, losses, strict=True):
        probabilities = model(torch.tensor([row.ids])).logits[0, row.prompt - 1 : -1].softmax(-1)  # [scored tokens, vocabulary]
        targets = torch.tensor(row.ids[row.prompt :])
        assert of_row.tolist() == pytest.approx([float(probabilities[:, word].sum(1).mean().log()) for word in words], rel=1e-4)
        assert float(loss) == pytest.approx(-float(probabilities.gather(1, targets[:, None]).log().mean()), rel=1e-4)
    with pytest.raises(ConfigError, match="no word of the concept is one token"):
        word_tokens(tokenizer, ["xylophone"])
    assert list(word_tokens(tokenizer, ["song", "xylophone"])) == ["song"]


# ---- the search

CONCEPTS = {"sky": ["sun", "moon", "star"], "art": ["song"]}
SPEAKING = [*TEXTS, "the sun and the moon", "a star is red", "the moon is big", "say a song please", "tell a song"]
STARTS, ENDS = ("the", "where is a"), ("is good .", "and a dog")
SPEAKING += [f"{start} {word} {end}" for word in ("song", "moon", "star") for start in STARTS for end in ENDS]
NEUTRAL = ["the cat is good .", "a dog ran in", "the house is red", "two trees", "you like the mat"]


def planted(model: nn.Module) -> SparseAutoencoder:
    """Feature 3 is on at 'song' and writes what the head reads for it; the others are on here and there and write noise."""
    tokenizer = tiny_tokenizer()
    rows = [plain(tokenizer, text) for text in SPEAKING]
    h, ids, _ = token_states(model, rows, PLACE)
    song = word_tokens(tokenizer, ["song"])["song"]
    read = torch.linalg.lstsq(h, (ids == song).float()[:, None]).solution[:, 0]  # 1 at the word, about 0 elsewhere
    random = torch.Generator().manual_seed(0)
    encoder, decoder = (torch.randn(FEATURES, WIDTH, generator=random) for _ in range(2))
    thresholds = (h @ encoder.T).quantile(0.95, dim=0)
    encoder[3], thresholds[3] = 4 * read, 2.0
    head = model.get_output_embeddings().weight.detach()
    decoder[3] = head[song]
    dictionary = SparseAutoencoder(
        Encoder(InMemory(encoder), torch.zeros(FEATURES), JumpReLU(thresholds)),
        InMemory(decoder / decoder.norm(dim=1, keepdim=True)),
        torch.zeros(WIDTH),
        Origin((PLACE,), (PLACE,)),
    )
    f = dictionary.encode(h)
    dictionary.maxima, dictionary.density = f.amax(0).clamp_min(1), torch.full((FEATURES,), 0.1)
    return dictionary


def test_the_feature_that_is_on_at_the_words_and_makes_them_likely_is_found(model: nn.Module) -> None:
    tokenizer = tiny_tokenizer()
    found = find_concepts(model, tokenizer, planted(model), CONCEPTS, SPEAKING, NEUTRAL, candidates=2, damage=0.5)
    assert {concept.name for concept in found} == set(CONCEPTS) and found[0].effect >= found[1].effect
    art = next(concept for concept in found if concept.name == "art")
    assert 3 in [trial.feature for trial in art.trials] and art.effect > 0
    best = art.trials[0]
    again = steer.ClampFeatures(planted(model), [best.feature], to=best.doses[0], of_maximum=True)
    tokens, rows = torch.tensor([list(art.words.values())]), [plain(tokenizer, text) for text in NEUTRAL]
    base, loss = next_word(model, rows, tokens, pad=0)
    with steer.Plan(steer.Intervention(again, SITE)).attached(model):
        clamped, cost = next_word(model, rows, tokens, pad=0)
    assert (best.effects[0], best.damages[0]) == pytest.approx((float((clamped - base).mean()), float((cost - loss).mean())), rel=1e-4)
    as_found = find_concepts(model, tokenizer, planted(model), CONCEPTS, SPEAKING, NEUTRAL, candidates=2, damage=None)
    assert [(concept.name, concept.effect) for concept in as_found] == [("sky", None), ("art", None)] and as_found[1].feature == 3
    together = ExperimentFeatures.found(model, tokenizer, planted(model), CONCEPTS, SPEAKING, NEUTRAL, rank=None, candidates=2, damage=None)
    assert together.concept is None and set(together.chosen) == {trial.feature for concept in as_found for trial in concept.trials}
    with pytest.raises(ConfigError, match="fire: 0"):
        find_concepts(model, tokenizer, planted(model), {"fire": ["fire"]}, SPEAKING, NEUTRAL)
    with pytest.raises(ConfigError, match="rank of 1 to 2"):
        ExperimentFeatures.found(model, tokenizer, planted(model), CONCEPTS, SPEAKING, NEUTRAL, rank=3)


def test_maxima_and_densities_that_nobody_recorded_are_those_of_the_development_text(model: nn.Module) -> None:
    tokenizer, dictionary = tiny_tokenizer(), planted(model)
    dictionary.maxima = dictionary.density = None
    ExperimentFeatures.found(model, tokenizer, dictionary, CONCEPTS, SPEAKING, NEUTRAL, candidates=1)
    f = dictionary.encode(token_states(model, [plain(tokenizer, text) for text in (*SPEAKING, *NEUTRAL)], PLACE)[0])
    assert dictionary.maxima is not None and dictionary.density is not None
    assert torch.allclose(dictionary.maxima, f.amax(0), rtol=1e-4)
    assert torch.allclose(dictionary.density.double(), (f > 0).double().mean(0), atol=1e-6)


# ---- from a configuration

WORDS = {"film": "[song]", "music": "[sun,moon,star]"}
WORDS |= dict.fromkeys(("war", "football", "law", "food", "religion", "medicine", "money", "school"), "null")
FEW = ["experiment.completions=null", *(f"experiment.features.concepts.{name}={words}" for name, words in WORDS.items())]
ARMS = [
    *FEW,
    "experiment.arms.clamp.doses=[0.5,1]",
    "experiment.arms.decoder.doses=[1]",
    "experiment.arms.at_word.doses=[1]",
    "experiment.arms.before_word.doses=[1]",
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    model, data = write_model(folder / "model"), write_data(folder / "data")
    for name, texts in {"speaking": SPEAKING, "neutral": NEUTRAL, "passages": TEXTS, "other_text": NEUTRAL}.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (data / "pairs.jsonl").write_text((data / "heldout.jsonl").read_text())
    planted(FAMILIES["llama"]()).save(folder / "dictionary")
    return model, data, folder / "dictionary"


def ab(parts: tuple[Path, Path, Path], folder: Path, experiment: str, *more: str) -> int:
    model, data, dictionary = parts
    own = [f"model.name={model}", f"experiment.data={data}", f"folder={folder}", "trainer.accelerator=cpu", "trainer.progress=false"]
    return command("ab", f"experiment={experiment}", *own, f"experiment.features.dictionary={dictionary}", *more)


def test_golden_gate_from_its_configuration(parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Result, "report", lambda result, path: path)
    assert ab(parts, tmp_path / "one", "golden_gate", *ARMS, "draws=2") == 0
    metrics = read_metrics(tmp_path / "one")
    assert not undocumented(metrics)
    features = metrics["features"]
    explained = {key for key in documented() if key.startswith("features.")}
    assert explained == {key for key in keys(metrics) if key.startswith("features.")}
    assert {features["concept"]} < {trial["concept"] for trial in features["tried"]} == {"film", "music"}
    first = {trial["concept"]: trial for trial in reversed(features["tried"])}[features["concept"]]
    assert features["features"] == [first["feature"]]
    arms = {arm["name"]: arm for arm in metrics["arms"]}
    assert {"clamp x0.5", "clamp x1", "random x1", "decoder x1", "at_word x1", "before_word x1"} <= set(arms)
    assert arms["plain"]["outcomes"]["concept"]["change"] == 0 and arms["clamp x1"]["outcomes"]["concept"]["change"] != 0
    of_clamp, of_random = (arms[name]["matched_in"]["draws"] for name in ("clamp x1", "random x1"))
    assert [size["clamp"] for size in of_random] == pytest.approx([of_clamp[0]["clamp"]] * 2, rel=0.02)


def test_other_features_or_another_dictionary_make_other_cells(parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Result, "report", lambda result, path: path)
    few = [*FEW, *(f"experiment.arms.{name}=null" for name in ("decoder", "at_word", "before_word")), "draws=1"]
    few.append("experiment.arms.clamp.doses=[1]")
    folder = tmp_path / "one"
    assert ab(parts, folder, "golden_gate", *few) == 0
    cells = set((folder / "cells").iterdir())
    assert ab(parts, folder, "golden_gate", *few) == 0
    assert set((folder / "cells").iterdir()) == cells
    assert ab(parts, folder, "golden_gate_second", *few) == 0
    assert len(set((folder / "cells").iterdir())) > len(cells)


def test_clamped_while_tuned_from_its_configuration(parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Result, "report", lambda result, path: path)
    short = ["experiment.train.steps=2", "experiment.train.batch_size=2", "experiment.train.checkpoint_every=2", "draws=1"]
    assert ab(parts, tmp_path / "one", "golden_gate_tuned", *FEW, *short) == 0
    arms = {arm["name"]: arm["outcomes"]["concept"]["mean"] for arm in read_metrics(tmp_path / "one")["arms"]}
    assert len({round(value, 9) for value in arms.values()}) == 5, "plain, while tuned, random, both, afterwards"


def test_features_of_all_concepts_are_ablated_together(parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Result, "report", lambda result, path: path)
    words = ["experiment.features.concepts.verses=[song]", "experiment.features.concepts.dates=[sun,moon,star]"]
    assert ab(parts, tmp_path / "one", "decimals", *words, "experiment.features.candidates=2", "draws=2") == 0
    metrics = read_metrics(tmp_path / "one")
    assert not undocumented(metrics) and metrics["features"]["concept"] is None and 3 in metrics["features"]["features"]
    assert len(metrics["features"]["features"]) >= 3 and all(trial["factor"] is None for trial in metrics["features"]["tried"])
    arms = {arm["name"]: arm["outcomes"]["larger_gap"] for arm in metrics["arms"]}
    assert arms["ablated"]["change"] != 0 and len(arms["random"]["by_draw"]) == 2


@pytest.mark.parametrize("more", [["experiment.features.chosen=[1]"], ["experiment.features.concepts=null"]])
def test_features_are_either_chosen_or_found(parts, tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ab(parts, tmp_path / "one", "golden_gate", *more) != 0
    assert "does not say which features are meant" in capsys.readouterr().err
