"""The page says what the metrics say, loads nothing, escapes everything, and stands without its optional parts."""

from __future__ import annotations

import copy
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from steer.drift.records import DriftRecord
from steer.errors import ConfigError, WrongKindError
from steer.report import write_report

Drift = dict[str, list[DriftRecord]]
PLAIN, STEERED = "\u201cPlain fine-tune\u201d", "\u201cPreventative steering, trait direction\u201d"
VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "<script>alert('1')</script><img src=x onerror=alert(2)> & \"quoted\" \u2028 \u4f60\u597d \U0001f577 </td></table>"


class Page(HTMLParser):
    """What a reader of the page needs from it: tags with attributes, the text of every section, the cells of every row."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.section = "head"
        self.unbalanced: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text[self.section] = self.text.get(self.section, "") + data
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] = " ".join((self.rows[-1][-1] + " " + data).split())

    def row(self, *starts: str) -> list[str]:
        """The first row whose first cells begin like this."""
        return next(row for row in self.rows if len(row) >= len(starts) and all(map(str.startswith, row, starts)))


def render(tmp_path: Path, metrics: dict[str, Any], drift: Drift) -> tuple[str, Page]:
    html = write_report(tmp_path / "out" / "report.html", metrics, drift).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.unbalanced and not page.open
    return html, page


def test_says_what_the_metrics_say(tmp_path: Path, synthetic_metrics: dict[str, Any], synthetic_drift: Drift) -> None:
    html, page = render(tmp_path, synthetic_metrics, synthetic_drift)
    head = page.text["head"]
    for wanted in (
        synthetic_metrics["specificity"]["statement"],
        synthetic_metrics["command"],
        "smollm2-135m",
        "condescension",
        "2031-04-05 10:11 UTC",
        "5 min 12 s",
    ):
        assert wanted in head
    assert head.index(synthetic_metrics["specificity"]["statement"]) < head.index("smollm2-135m"), "the verdict comes first"
    plain = page.row("Plain fine-tune not steered")
    assert plain[1] == "+1.42 [+1.29, +1.56] \u22120.84 \u2192 0.58, n = 36"
    assert plain[3] == "+0.026 [+0.014, +0.039] 3.245 \u2192 3.271, n = 24"
    assert "along the trait direction during training, off afterwards; layers.16.output, strength 1.5" in page.text["arms"]
    compared = page.row("Plain fine-tune against Preventative steering, trait direction")
    assert compared[1:4] == ["+0.79 [+0.63, +0.95]", "< 0.001", "36"]
    verdict = synthetic_metrics["comparisons"][0]["verdict"]
    assert compared[4] == verdict.replace("behaviour_gap: plain", f"Behaviour gap: {PLAIN}").replace("preventative", STEERED)
    assert f"Compared: {STEERED} with {PLAIN} and with \u201cPreventative steering, random direction\u201d." in head
    assert "0.984" in page.text["direction"] and "mean difference" in page.text["direction"]
    assert "Start the comment with the `#` sign." in page.text["completions"] and "not generated" in page.text["completions"]
    assert "2.13.0" in page.text["provenance"] and "adapters/preventative" in page.text["provenance"]
    assert page.row("Plain fine-tune, steered at inference", "60", "1 min 1 s")[3] == "not measured"
    assert page.row("Plain fine-tune", "60", "1 min 1 s")[3] == "+1.7 % [\u22120.4, +3.1], within noise"
    assert "Plain fine-tune = Plain fine-tune, steered at inference" in html, "arms that share one training run share one curve"


def test_drift_table_and_steered_site(tmp_path: Path, synthetic_metrics: dict[str, Any], synthetic_drift: Drift) -> None:
    html, page = render(tmp_path, synthetic_metrics, synthetic_drift)
    last = [r for r in synthetic_drift["plain"] if r.kind == "named" and r.site == "layers.12.output"][-1]
    row = page.row("Plain fine-tune", "60", f"+{last.effect_sd:.2f}")
    assert row[4] == "within chance", "it leaves the band, as one random direction in ten does"
    assert row[7] == f"+{last.z_controls:.1f}" and row[9] == "20"
    assert page.row("Preventative steering, trait direction", "60")[4] == "within chance"
    assert [row[4] for row in page.rows if row[0] == "Plain fine-tune" and len(row) == 10].count("beyond chance") == 2
    assert "above 3.2 at the last step" in page.text["drift"] and "in these 9 rows" in page.text["drift"]
    headings = re.findall(r"<h3>condescension at <code>([^<]+)</code>(.*?)</h3>", html)
    assert [(site, "steered site" in rest) for site, rest in headings] == [
        ("layers.12.output", False),
        ("layers.16.output", True),
        ("layers.20.output", False),
    ]
    assert html.count("steered here in training") == 2


def test_needs_no_network(tmp_path: Path, synthetic_metrics: dict[str, Any], synthetic_drift: Drift) -> None:
    html, page = render(tmp_path, synthetic_metrics, synthetic_drift)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} has an event handler"
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert (value or "").startswith(("#", "data:")), f"{tag} {name}={value}"
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert not re.search(r"https?:", html)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy


def test_ids_are_unique_and_references_resolve(tmp_path: Path, synthetic_metrics: dict[str, Any], synthetic_drift: Drift) -> None:
    html, page = render(tmp_path, synthetic_metrics, synthetic_drift)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r"url\(#([^)]+)\)", html))
    for _, attributes in page.tags:
        wanted |= set((attributes.get("aria-labelledby") or "").split())
        if (attributes.get("href") or "").startswith("#"):
            wanted.add((attributes["href"] or "")[1:])
    assert wanted and wanted <= set(ids)


def test_pictures_have_words_and_follow_the_colours_of_the_page(
    tmp_path: Path, synthetic_metrics: dict[str, Any], synthetic_drift: Drift
) -> None:
    html, page = render(tmp_path, synthetic_metrics, synthetic_drift)
    plots = [a for tag, a in page.tags if tag == "svg"]
    assert len(plots) > 5
    assert all(a.get("role") == "img" and (a.get("aria-label") or a.get("aria-labelledby")) for a in plots)
    assert "Plain fine-tune: +" in html and "beyond chance." in html, "the description of a drift plot gives its numbers"
    body = html[html.index("<body>") :]
    assert "var(--arm-0)" in body and not re.search(r"(?:fill|stroke): ?#", body), "a colour that the dark scheme cannot change"
    assert "prefers-color-scheme: dark" in html
    assert all(a.get("scope") in ("col", "row") for tag, a in page.tags if tag == "th")


def test_escapes_everything_that_is_text(tmp_path: Path, synthetic_metrics: dict[str, Any], synthetic_drift: Drift) -> None:
    metrics = copy.deepcopy(synthetic_metrics)
    metrics |= {"experiment": HOSTILE, "command": HOSTILE, "started": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    metrics["specificity"] = {"statement": HOSTILE}
    metrics["trait"] |= {"name": HOSTILE, "description": HOSTILE, "method": HOSTILE, "auc_by_site": {HOSTILE: 0.7, "layers.16.output": 0.9}}
    metrics["comparisons"][0]["verdict"] = HOSTILE
    arm = metrics["arms"][0]
    arm["label"] = f"$x$ {HOSTILE}"
    arm["completions"][0] = {"prompt": HOSTILE, "text": HOSTILE}
    arm["metrics"][HOSTILE] = {"before": 1.0, "after": 2.0, "change": 1.0, "ci": [0.5, 1.5], "n": 3, "unit": HOSTILE}
    drift = {
        arm: [replace(record, direction=HOSTILE) if record.kind == "named" else record for record in records]
        for arm, records in synthetic_drift.items()
    }
    html, page = render(tmp_path, metrics, drift)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert HOSTILE in page.text["completions"] and HOSTILE in page.text["comparisons"] and HOSTILE in page.text["head"]
    assert "\u4f60\u597d" in page.text["completions"]


def test_stands_without_optional_parts(tmp_path: Path) -> None:
    _, page = render(tmp_path, {"schema": 1}, {})
    for section, words in {
        "arms": "No arms were recorded.",
        "comparisons": "No comparisons were recorded.",
        "drift": "No drift was recorded in this run.",
        "direction": "No direction was recorded.",
        "training": "No training loss was recorded.",
        "completions": "No completions were recorded.",
    }.items():
        assert words in page.text[section]
    assert "no statement about whether the effect is specific" in page.text["head"] and "not measured" in page.text["head"]


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_number_that_is_missing_is_not_measured(
    tmp_path: Path, synthetic_metrics: dict[str, Any], synthetic_drift: Drift, missing: float | None
) -> None:
    metrics = copy.deepcopy(synthetic_metrics)
    for arm in metrics["arms"]:
        arm["metrics"]["task_logprob"] = {"before": missing, "after": missing, "change": missing, "ci": [missing, missing], "n": 36}
        arm["metrics"]["neutral_loss"] = None
        arm["train"]["loss"][3] = missing
        arm["train"]["callback_overhead"] = missing
    metrics["comparisons"][0] |= {"difference": missing, "ci": [missing, 1.0], "p": missing, "p_adjusted": missing}
    metrics["trait"] |= {"auc_heldout": missing, "vector_norm": missing, "auc_by_site": {"layers.3.output": missing}}
    undefined: dict[str, Any] = {"effect_sd": math.nan, "p": missing, "q": missing}
    records = [replace(record, metrics={**record.metrics, **undefined}) for record in synthetic_drift["plain"]]
    html, page = render(tmp_path, metrics, {**synthetic_drift, "plain": records})
    arm_row = page.row("Plain fine-tune not steered")
    assert arm_row[2].startswith("not measured") and arm_row[3] == "not measured"
    assert page.row("Plain fine-tune", "60", "not measured")[4] == "not comparable"
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(page.text.values()))
    assert not re.search(r'="[^"]*\bnan\b', html)


def test_says_when_there_was_no_random_arm(tmp_path: Path, synthetic_metrics: dict[str, Any]) -> None:
    metrics = copy.deepcopy(synthetic_metrics)
    warning = "No arm was steered along a random direction"
    assert warning not in render(tmp_path, metrics, {})[0]
    metrics["arms"] = [arm for arm in metrics["arms"] if arm["steer"]["direction"] != "random"]
    assert warning in render(tmp_path, metrics, {})[0]


def test_says_what_one_random_direction_cannot_show(tmp_path: Path, synthetic_metrics: dict[str, Any], synthetic_drift: Drift) -> None:
    words = " ".join(render(tmp_path, synthetic_metrics, synthetic_drift)[1].text["reading"].split())
    cannot = words.partition("What this run cannot show")[2]
    assert all(
        part in cannot for part in ("One random direction:", "the random arm may itself act", "One seed (0)", "leaving it is no finding")
    )


def test_the_stream_starts_at_its_first_window(tmp_path: Path, synthetic_metrics: dict[str, Any], synthetic_drift: Drift) -> None:
    stream = {arm: [replace(record, mode="stream") for record in records if record.step] for arm, records in synthetic_drift.items()}
    _, probed = render(tmp_path, synthetic_metrics, synthetic_drift)
    _, page = render(tmp_path, synthetic_metrics, stream)
    caption, caveat = "since the window that ended at step 4", "Stream mode begins at its first window"
    assert caption in page.text["drift"] and caveat in page.text["reading"]
    assert caption not in probed.text["drift"] and caveat not in probed.text["reading"]


def test_a_negative_strength_is_against_the_trait(tmp_path: Path, synthetic_metrics: dict[str, Any]) -> None:
    _, page = render(tmp_path, synthetic_metrics, {})
    assert "against the trait direction at inference only" in page.text["arms"] and "along a random direction during" in page.text["arms"]


def test_long_completions_are_whole_but_folded(tmp_path: Path, synthetic_metrics: dict[str, Any]) -> None:
    metrics = copy.deepcopy(synthetic_metrics)
    text = "word " * 400 + "end of it"
    metrics["arms"][0]["completions"][0]["text"] = text
    html, page = render(tmp_path, metrics, {})
    assert text in page.text["completions"] and "The whole text" in page.text["completions"]


def test_same_input_gives_the_same_file(tmp_path: Path, synthetic_metrics: dict[str, Any], synthetic_drift: Drift) -> None:
    assert render(tmp_path, synthetic_metrics, synthetic_drift)[0] == render(tmp_path, synthetic_metrics, synthetic_drift)[0]


@pytest.mark.parametrize("schema", [{}, {"schema": 2}])
def test_refuses_other_schemas(tmp_path: Path, schema: dict[str, int]) -> None:
    with pytest.raises(WrongKindError, match="schema 1"):
        write_report(tmp_path / "report.html", schema, {})
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_names_the_extra_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthetic_metrics: dict[str, Any], synthetic_drift: Drift, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'torchsteer\[report\]'"):
        write_report(tmp_path / "report.html", synthetic_metrics, synthetic_drift)
