"""The page of features: what is in the file, and in a real browser what it shows, searches and refuses to load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from families import FAMILIES
from features.feature_plans import autoencoder
from features.words import sentences
from report.test_browser import browse, chromium  # noqa: F401  (a fixture)
from tiny_tokenizer import tiny_tokenizer

from steer.errors import ConfigError
from steer.features.reading import FeatureReading, read_features
from steer.report import write_feature_page

pytest.importorskip("jinja2")
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def reading() -> FeatureReading:
    model = FAMILIES["llama"]()
    settings = {"top": 3, "spread": 2, "before": 4, "after": 2, "tokens": 4}
    return read_features(model, autoencoder(), sentences(40, length=9), tokenizer=tiny_tokenizer(), **settings)  # type: ignore[arg-type]


def content(page: Path) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    assert found is not None
    return json.loads(found[1])


def test_the_file_holds_what_was_read(reading: FeatureReading, tmp_path: Path) -> None:
    page = write_feature_page(tmp_path / "new" / "page.html", reading.explain(lambda card: f"<i>{card.feature}</i>"), features=[5, 0])
    held = content(page)
    assert [feature["i"] for feature in held["features"]] == [5, 0]  # type: ignore[attr-defined, index]
    first, card = held["features"][0], reading[5]  # type: ignore[index]
    assert first["name"] == "<i>5</i>" and "<i>5" not in page.read_text(encoding="utf-8")
    assert [[held["tokens"][i] for i in one["t"]] for one in first["examples"]] == [list(one.tokens) for one in card.examples]  # type: ignore[index]
    for shown, one in zip(first["examples"], card.examples, strict=True):
        assert [digit == "0" for digit in shown["v"]] == [value <= 0 for value in one.values] and len(shown["v"]) == len(one.tokens)
    assert first["examples"][0]["v"][first["examples"][0]["p"]] == "9", "the largest value has the deepest shade"
    assert first["bars"] == list(card.histogram[1]) and [i for i, _ in first["near"]] == [i for i, _ in card.nearest]
    with pytest.raises(ConfigError, match="feature 99 was not read"):
        write_feature_page(tmp_path / "page.html", reading, features=[99])


def test_works_in_a_browser_without_a_network(reading: FeatureReading, tmp_path: Path, chromium: str) -> None:  # noqa: F811
    named = reading.explain(lambda card: HOSTILE if card.feature == 0 else f"name {card.feature}")
    page = write_feature_page(tmp_path / "page.html", named, title="Features & <b>")
    dom, log = browse(chromium, page, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=2000")
    assert "<title>Features &amp; &lt;b&gt;: steer</title>" in dom, "a script of a name has run"
    assert "CONSOLE" not in log, log
    rows = re.findall(r'<li><a href="#(\d+)"', dom)
    assert rows[:40] == [str(i) for i in range(40)] and "40 of 40" in dom
    assert 'class="bars"' in dom and dom.count("<rect ") == 40 and "Promotes" in dom and "Nearest decoder rows" in dom
    assert dom.count('<div class="example">') == len(reading[0].examples) and dom.count('class="token peak"') == len(reading[0].examples)


def test_opens_at_a_feature_and_finds_by_a_token(reading: FeatureReading, tmp_path: Path, chromium: str) -> None:  # noqa: F811
    named = reading.explain(lambda card: f"name {card.feature}!")
    page = write_feature_page(tmp_path / "page.html", named)
    # the test's own steps are added to the script that the policy lets run
    driven = page.read_text(encoding="utf-8").replace(
        "list();\nopen();", 'search.value = "name 17!"; location.hash = "#17"; list(); open();'
    )
    driven = re.sub(r"script-src 'sha256-[^']+'", "script-src 'unsafe-inline'", driven)
    page.write_text(driven, encoding="utf-8")
    dom, log = browse(chromium, page, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=2000")
    assert re.findall(r'<li><a href="#(\d+)"', dom)[:1] == ["17"] and "1 of 40" in dom and "<h2>17: name 17!</h2>" in dom, log


def test_no_other_script_runs(reading: FeatureReading, tmp_path: Path, chromium: str) -> None:  # noqa: F811
    page = write_feature_page(tmp_path / "page.html", reading)
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", "<script>document.title='taken'</script></body>"), encoding="utf-8")
    dom, log = browse(chromium, page, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=2000")
    assert "taken</title>" not in dom and "Content Security Policy" in log
