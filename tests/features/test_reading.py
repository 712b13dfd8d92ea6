"""Reading of features: what one pass says equals what the activations say when all of them are kept."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from features.feature_plans import autoencoder
from features.words import sentences, token, word_dictionary
from method_tables import check_table
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

import steer
from steer.errors import ConfigError, DamagedFileError, JudgeError
from steer.features.encoding import encode_texts
from steer.features.provenance import Untrained
from steer.features.reading import EXPLAINERS, FeatureCard, FeatureReading, read_features, to_neuronpedia
from steer.features.search import MarkedTexts

WORDS = ["sun", "cat", "fire", "dog", "the", "water"]
TEXTS = sentences(40, length=9)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return FAMILIES["llama"]()


def read(model: PreTrainedModel, dictionary: Any = None, **options: Any) -> FeatureReading:
    settings = {"tokenizer": tiny_tokenizer(), "top": 3, "spread": 2, "before": 4, "after": 2, "tokens": 4, **options}
    return read_features(model, dictionary or autoencoder(untrained=Untrained(first=1)), settings.pop("texts", TEXTS), **settings)


def dense(model: PreTrainedModel, dictionary: Any, texts: list[str], length: int = 9) -> Tensor:
    """[texts, tokens, features], 0 at tokens that are left out."""
    f = torch.zeros(len(texts), length, dictionary.width)
    rows = MarkedTexts.read(tiny_tokenizer(), texts, {}).rows

    def take(part: Tensor, text: Tensor, position: Tensor) -> None:
        f[text, position] = part

    encode_texts(model, dictionary, rows, take)
    return f


# ---- the pass


@pytest.mark.parametrize("tile", [None, 40 * 20])  # all texts at once; two texts at a time
def test_statistics_and_examples_are_those_of_all_activations(
    model: PreTrainedModel, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile:
        monkeypatch.setattr("steer.features.encoding.TILE", tile)
    dictionary = autoencoder(untrained=Untrained(first=1))
    f = dense(model, dictionary, TEXTS)
    reading = read(model, dictionary)
    counted = f[:, 1:].flatten(0, 1)  # the first token of each text is left out
    assert torch.allclose(reading.tensors["density"], (counted != 0).float().mean(0))
    assert torch.allclose(reading.tensors["maximum"], counted.amax(0))
    assert torch.equal(reading.tensors["histogram"].sum(1), (counted > 0).sum(0))
    peaks = f.amax(1)  # [texts, features]
    for feature in range(dictionary.width):
        card = reading[feature]
        on = peaks[:, feature] > 0
        top, others = [e for e in card.examples if e.is_top], [e for e in card.examples if not e.is_top]
        assert [e.maximum for e in top] == pytest.approx(peaks[:, feature].sort(descending=True).values[: min(3, int(on.sum()))].tolist())
        assert len(others) == min(2, max(int(on.sum()) - 3, 0))
        assert all(e.maximum <= top[-1].maximum for e in others)
        for example in card.examples:
            (text,) = (peaks[:, feature] == example.maximum).nonzero()[0]
            peak = int(f[text, :, feature].argmax())
            said = TEXTS[text].split()
            assert list(example.tokens) == said[max(0, peak - 4) : peak + 3]
            assert list(example.values) == pytest.approx(f[text, max(0, peak - 4) : peak + 3, feature].tolist(), rel=0.01)


def test_a_few_features_are_read_as_they_are_among_all(model: PreTrainedModel) -> None:
    whole, few = read(model), read(model, features=[7, 3])
    assert few.features == [7, 3] and len(few) == 2
    for feature in (3, 7):
        ours, theirs = few[feature], whole[feature]
        assert ours.density == theirs.density and ours.histogram[1] == theirs.histogram[1]
        assert list(ours.histogram[0]) == near(theirs.histogram[0])
        for few_rows, many_rows in ((ours.promoted, theirs.promoted), (ours.nearest, theirs.nearest)):
            assert [name for name, _ in few_rows] == [name for name, _ in many_rows]
            assert [value for _, value in few_rows] == near([value for _, value in many_rows])
        top, same = ([e for e in reading.examples if e.is_top] for reading in (ours, theirs))
        assert bool(top) == (theirs.density > 0) and [(e.tokens, e.peak) for e in top] == [(e.tokens, e.peak) for e in same]
        assert [value for e in top for value in e.values] == near([value for e in same for value in e.values])


def near(values: Any) -> Any:
    """Products of few rows and of many round in another order on some processors."""
    return pytest.approx(list(values), rel=1e-6, abs=1e-6)


def test_the_histogram_counts_values_in_equal_steps(model: PreTrainedModel) -> None:
    dictionary = autoencoder("relu")
    reading = read(model, dictionary, bins=10)
    f = dense(model, dictionary, TEXTS)
    for feature in (0, 11, 29):
        edges, counts = reading[feature].histogram
        values = f[..., feature][f[..., feature] > 0]
        exact = torch.histc(values, 10, 0, edges[-1])
        assert edges[-1] == pytest.approx(values.max().item()) and sum(counts) == len(values)
        assert (torch.tensor(counts) - exact).abs().sum() <= 0.1 * len(values)  # values near an edge may fall to its other side


def test_logit_weights_and_neighbours(model: PreTrainedModel) -> None:
    dictionary = autoencoder()
    reading = read(model, dictionary)
    rows = dictionary.decoder_rows(list(range(dictionary.width)))
    logits = model.lm_head(model.model.norm(rows))
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1).fill_diagonal_(-2)
    for feature in (0, 39):
        card = reading[feature]
        assert [logit for _, logit in card.promoted] == pytest.approx(logits[feature].topk(4).values.tolist(), abs=1e-5)
        assert [logit for _, logit in card.suppressed] == pytest.approx(logits[feature].topk(4, largest=False).values.tolist(), abs=1e-5)
        assert card.promoted[0][0] == tiny_tokenizer().decode([int(logits[feature].argmax())])
        assert [other for other, _ in card.nearest] == cosines[feature].topk(5).indices.tolist()
    assert torch.equal(reading.tensors["logit_histogram"].sum(1), torch.full((40,), 96))


def test_a_feature_that_is_never_on_has_no_examples(model: PreTrainedModel) -> None:
    reading = read(model, word_dictionary(model, WORDS), texts=["the cat sat"] * 3)
    assert reading[0].examples == () and reading[0].density == 0 and len(reading[1].examples) == 3
    assert reading.explain("peak_words").names == {1: "cat", 4: "the"}


# ---- names


def test_explainers_name_features(model: PreTrainedModel) -> None:
    reading = read(model, word_dictionary(model, WORDS))
    named = reading.explain("peak_words", count=1)
    assert named.names == dict(enumerate(WORDS)) and not reading.names
    again = named.explain(lambda card: f"  about\n{card.feature} ", features=[2])
    assert again.names == {**named.names, 2: "about 2"} and again[2].name == "about 2"
    with pytest.raises(ConfigError, match="the name of feature 0"):
        reading.explain(lambda card: card.feature)
    with pytest.raises(ConfigError, match="did you mean 'peak_words'"):
        reading.explain("peak_word")
    with pytest.raises(ConfigError, match="cannot be made with these settings"):
        reading.explain("peak_words", size=3)


def test_an_endpoint_is_asked_once_for_each_feature(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append({**json.loads(self.rfile.read(int(self.headers["Content-Length"]))), "key": self.headers["Authorization"]})
            body = json.dumps({"choices": [{"message": {"content": "small animals\n"}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("STEER_EXPLAINER_KEY", "secret")
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        reading = read(model, word_dictionary(model, WORDS))
        settings = {"model": "m", "url": f"http://127.0.0.1:{server.server_port}/v1", "cache": tmp_path / "names"}
        for _ in range(2):
            named = reading.explain("endpoint", features=[1, 3], **settings)
            assert named.names == {1: "small animals", 3: "small animals"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert len(asked) == 2 and asked[0]["temperature"] == 0 and asked[0]["key"] == "Bearer secret"
    assert "<<cat>>" in asked[0]["messages"][1]["content"] and "secret" not in json.dumps([p.read_text() for p in tmp_path.rglob("*.json")])


def test_an_endpoint_without_an_address_or_an_answer(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEER_EXPLAINER_URL", raising=False)
    reading = read(model, word_dictionary(model, WORDS))
    with pytest.raises(ConfigError, match="the explainer has no server"):
        reading.explain("endpoint", model="m")
    monkeypatch.setattr("steer.chat_endpoint.sleep", lambda _: None)
    with pytest.raises(JudgeError, match="the explainer at 127.0.0.1 gives no reply"):
        reading.explain("endpoint", model="m", url="http://127.0.0.1:9/v1")


def test_every_explainer_is_tried_here() -> None:
    check_table(EXPLAINERS, {"function", "peak_words", "endpoint"}, "tests/features/test_reading.py", "a test")


# ---- files


def test_saved_and_loaded(model: PreTrainedModel, tmp_path: Path) -> None:
    reading = read(model).explain("peak_words")
    reading.save(tmp_path / "reading.safetensors")
    loaded = FeatureReading.load(tmp_path / "reading.safetensors")
    assert list(loaded) == list(reading) and loaded.facts == reading.facts and loaded.named_by == reading.named_by
    assert "feature 0: " in str(loaded[0]) and "<<" in str(loaded[0])
    with pytest.raises(ConfigError, match="feature 99 was not read"):
        loaded[99]
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "reading.safetensors").read_bytes()[:-100])
    with pytest.raises(DamagedFileError):
        FeatureReading.load(tmp_path / "cut.safetensors")


def test_the_export_has_the_records_of_neuronpedia(model: PreTrainedModel, tmp_path: Path) -> None:
    reading = read(model, autoencoder()).explain("peak_words", features=[5])
    names = {"model": "tiny-it", "source_set": "res-40", "title": "A test", "creator": "nobody", "creator_id": "c1"}
    root = to_neuronpedia(reading, tmp_path, **names)
    assert root == tmp_path / "tiny-it" / "1-res-40"
    (source,) = lines(root / "source.jsonl")
    assert (source["id"], source["setName"], source["num_tokens_in_prompt"]) == ("1-res-40", "res-40", 128)
    assert lines(root / "model.jsonl")[0]["instruct"] and lines(root / "release.jsonl")[0]["creatorName"] == "nobody"
    assert lines(root / "sourceset.jsonl")[0]["releaseName"] == lines(root / "release.jsonl")[0]["name"]
    features, activations, explanations = (packed(root / kind / "batch-0.jsonl.gz") for kind in ("features", "activations", "explanations"))
    assert [record["index"] for record in features] == [str(i) for i in range(40)]
    for record in features:
        assert {record["modelId"], record["layer"]} == {"tiny-it", "1-res-40"} and record["hookName"] == "blocks.1.hook_resid_post"
        for kind in ("freq", "logits"):
            assert len(record[f"{kind}_hist_data_bar_values"]) == len(record[f"{kind}_hist_data_bar_heights"]) == 40
        assert len(record["pos_str"]) == len(record["pos_values"]) == 4 and record["frac_nonzero"] == reading[int(record["index"])].density
    assert len(activations) == sum(len(card.examples) for card in reading) and len({record["id"] for record in activations}) == len(
        activations
    )
    for record in activations:
        assert len(record["tokens"]) == len(record["values"]) and record["values"][record["maxValueTokenIndex"]] == record["maxValue"]
        assert record["binMin"] <= record["maxValue"] <= record["binMax"]
    assert [(record["index"], record["description"]) for record in explanations] == [("5", reading.names[5])]
    with pytest.raises(ConfigError, match="cannot name a folder"):
        to_neuronpedia(reading, tmp_path, **{**names, "source_set": "../x"})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def packed(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_public_names() -> None:
    assert steer.read_features is read_features and steer.FeatureReading is FeatureReading
    assert FeatureCard.__dataclass_params__.frozen and token("cat") > 0  # type: ignore[attr-defined]
