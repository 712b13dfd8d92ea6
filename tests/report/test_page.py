"""The page says what the metrics say, the verdict first; it loads nothing, escapes everything, and stands without its optional parts."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report import trees
from report.page_reader import SECTIONS, Page, render

from steer.drift.records import DriftRecord
from steer.errors import ConfigError, WrongKindError
from steer.report import write_report
from steer.report.numbers import number

Drift = dict[str, list[DriftRecord]]
HOSTILE = "<script>alert('1')</script><img src=x onerror=alert(2)> & \"quoted\" \u2028 \u4f60\u597d \U0001f577 </td></table>"


def test_begins_with_the_question_the_verdict_and_its_standing(five_seeds: dict[str, Any], full_page: tuple[str, Page]) -> None:
    html, page = full_page
    head = page.words("head")
    order = [
        five_seeds["question"]["text"],
        "Yes: preventative has lower behaviour gap than random",
        "Confirmatory: locked 2031-04-05 10:00 UTC, unchanged",
        "36 items \N{MULTIPLICATION SIGN} 5 seeds",
        five_seeds["contrasts"][0]["verdict"].replace("_", " "),
    ]
    places = [head.index(words) for words in order]
    assert places == sorted(places) and len(five_seeds["verdict"].split()) <= 20
    assert re.findall(r'<section id="(\w+)"', html) == [name for name in SECTIONS if name != "dose"]
    assert html.index('id="primary-title"') < html.index("<table"), "the chart comes before every table"


def test_one_seed_is_items_only_and_exploratory(tmp_path: Path, one_seed: dict[str, Any]) -> None:
    head = render(tmp_path, one_seed)[1].words("head")
    assert "Exploratory: the question was not locked" in head and "Items only: one seed" in head and "Confirmatory" not in head


def test_deviations_from_the_lock_are_listed(tmp_path: Path, five_seeds: dict[str, Any]) -> None:
    lock = five_seeds["design"]["lock"]
    five_seeds["design"]["lock"] = lock | {"confirmatory": False, "deviations": ["seeds: locked [0], now [0, 1]"]}
    page = render(tmp_path, five_seeds)[1]
    assert "then deviated from" in page.words("head") and "seeds: locked [0], now [0, 1]" in page.words("head")
    assert "deviated from: seeds: locked [0], now [0, 1]" in page.words("caveats")


def test_the_chart_has_every_arm_seed_and_draw_under_the_pointer(five_seeds: dict[str, Any], full_page: tuple[str, Page]) -> None:
    html, page = full_page
    for arm in five_seeds["arms"]:
        values = arm["outcomes"]["behaviour_gap"]
        for seed, mean in values["by_seed"].items():
            assert page.said.count(f"{arm['name']}, seed {seed}: {mean - values['before']:+.2f}".replace("-", "\u2212")) == 2, (
                "wide and narrow"
            )
        for draw, mean in enumerate(values.get("by_draw", ()), 1):
            assert f"{arm['name']}, control draw {draw}: {mean - values['before']:+.2f}" in page.said
    assert "behaviour gap, change from the base model, nat/token" in html and "lower is better" in page.words("result")
    assert "range of the 8 control draws" in page.words("result")
    values = five_seeds["arms"][2]["outcomes"]["behaviour_gap"]
    draws = [draw - values["before"] for draw in values["by_draw"]]
    holds = f"for these 8 draws, whose means go from {number(min(draws), signed=True)} to {number(max(draws), signed=True)}"
    assert holds in page.words("result") and any(said.endswith(f"95 % interval {holds}") for said in page.said)
    assert "holds for the mean of these draws" in html


def test_effect_against_damage_and_guardrails(five_seeds: dict[str, Any], full_page: tuple[str, Page]) -> None:
    page = full_page[1]
    cost = page.words("cost")
    for point in five_seeds["trade_off"]:
        assert any(said.startswith(f"{point['arm']}: effect ") and "undominated in" in said for said in page.said)
    for each in five_seeds["guardrails"]:
        assert each["verdict"].replace("_", " ") in cost and each["verdict"] in page.said
    for each in five_seeds["equal_damage"]:
        assert each["difference"] is None and f"{each['a']} and {each['b']} have no damage in common" in cost
    assert len(five_seeds["equal_damage"]) == 3
    assert "(dominated)" in cost and "exceeded" in cost and "task logprob: worse by, nat/token" in cost


def test_arms_at_equal_damage(tmp_path: Path, swept: dict[str, Any]) -> None:
    (compared,) = swept["equal_damage"]
    cost = render(tmp_path, swept)[1].words("cost")
    assert f"against minus random, where both cost {number(compared['damage'])} of task logprob: +{compared['difference']:.3f} [" in cost


def test_one_quantity_decides_and_the_others_are_folded(
    tmp_path: Path, one_seed: dict[str, Any], synthetic_drift: Drift, full_page: tuple[str, Page]
) -> None:
    """No 'p < 0.001' beside 'within chance', and no second verdict beside the first."""
    for html, page in (full_page, render(tmp_path, one_seed, synthetic_drift)):
        unfolded = re.sub(r"<details>.*?</details>", "", html, flags=re.S)
        assert "not shown to be specific" in html and "not shown to be specific" not in unfolded
        rows = [row for row in page.rows if row[-1] in ("within chance", "beyond chance") or "beyond chance in" in row[-1]]
        assert rows and all(len(row) == 4 for row in rows), "arm, step, shift and verdict, nothing else"
        assert "p over prompts" in html and "p over prompts" not in unfolded


def test_contrasts_show_the_interval_that_goes_with_their_p(five_seeds: dict[str, Any], full_page: tuple[str, Page]) -> None:
    page = full_page[1]
    row = page.row("preventative against random")
    assert row[1] == "behaviour gap, nat/token" and row[3] == "< 0.001" and row[4] == "primary"
    low, high = five_seeds["contrasts"][0]["ci"]
    assert f"[{low:+.2f}, {high:+.2f}]".replace("-", "\u2212") in row[2]
    assert page.row("random against plain")[4] == "exploratory"
    assert all(each["verdict"].replace("_", " ") in page.words("contrasts") for each in five_seeds["contrasts"])


def test_items_that_moved_most(tmp_path: Path, five_seeds: dict[str, Any], one_seed: dict[str, Any], full_page: tuple[str, Page]) -> None:
    page = full_page[1]
    ordered = sorted(five_seeds["items"], key=lambda item: item["difference"])
    rows = [row for row in page.rows if re.fullmatch(r"q\d\d", row[0])]
    assert [row[0] for row in rows] == [item["id"] for item in [*ordered[:4], *ordered[-4:]]]
    assert rows[0][2] == ordered[0]["text"] and "28 between them are left out" in page.words("items")
    assert any(said.startswith(f"{ordered[0]['id']}: {ordered[0]['text']} (") for said in page.said)
    wrong = render(tmp_path, one_seed)[1]
    assert any("(wrong way)" in row[1] for row in wrong.rows if re.fullmatch(r"q\d\d", row[0]))


def test_drift_of_the_site_that_matters_comes_first(full_page: tuple[str, Page]) -> None:
    html, page = full_page
    headings = re.findall(r"<h3>condescension at <code>([^<]+)</code>(.*?)</h3>", html)
    assert [(site, "steered site" in rest) for site, rest in headings] == [
        ("layers.16.output", True),
        ("layers.12.output", False),
        ("layers.20.output", False),
    ]
    before, _, after = html.partition("<h3>Other sites")
    assert "layers.12.output</code>" not in before[before.index('id="drift"') :] and "layers.12.output</code>" in after
    assert page.row("plain", "60")[3] == "beyond chance in 0 of 5 runs", "150 looks ask for a larger z than 9"
    assert page.row("random", "60")[3].endswith("of 40 runs") and "allows for 150 looks" in page.words("drift")


def test_drift_of_one_run_an_arm(tmp_path: Path, one_seed: dict[str, Any], synthetic_drift: Drift) -> None:
    _, page = render(tmp_path, one_seed, synthetic_drift)
    last = [r for r in synthetic_drift["plain"] if r.kind == "named" and r.site == "layers.16.output"][-1]
    assert page.row("plain", "60", f"+{last.effect_sd:.2f}")[3] == "beyond chance"
    assert page.row("preventative", "60")[3] == "within chance", "it leaves the band, as one random direction in ten does"
    folded = page.row("plain", "plain", "60", f"+{last.effect_sd:.2f}")
    assert folded[6] == f"+{last.z_controls:.1f}" and folded[8] == "0.004" and folded[9] == "20"


def test_completions_are_coloured_by_projection(
    tmp_path: Path, five_seeds: dict[str, Any], one_seed: dict[str, Any], full_page: tuple[str, Page]
) -> None:
    html, page = full_page
    most = max(abs(v) for answers in five_seeds["completions"].values() for answer in answers for _, v in answer["tokens"])
    tokens = re.findall(r'<span class="token (\w+)" style="--v:(\d+)%" title="([^"]+)">', html)
    assert len(tokens) == sum(len(a["tokens"]) for answers in five_seeds["completions"].values() for a in answers)
    assert {side for side, _, _ in tokens} == {"plus", "minus"} and max(int(share) for _, share, _ in tokens) == 100
    assert all((value[0] == "+") == (side == "plus") for side, _, value in tokens if value.strip("0.\u2212+"))
    assert f"\u2212{most:.2f}" in page.words("completions") and "projection of each token" in page.words("completions")
    plain, page = render(tmp_path, one_seed)
    assert 'class="token' not in plain and "A spider has eight legs." in page.text["completions"]


@pytest.mark.parametrize(
    ("held_out", "words"), [("groups", "0.980, on groups that it has not seen"), ("texts", "0.980, on unseen texts"), (None, "0.980")]
)
def test_the_direction_says_what_it_was_judged_on(tmp_path: Path, five_seeds: dict[str, Any], held_out: str | None, words: str) -> None:
    five_seeds["direction"] |= {"held_out": held_out} if held_out else {}
    training = render(tmp_path, five_seeds)[1].words("training")
    assert f"Held-out AUC{words}" in training and "The direction: condescension" in training
    assert held_out or "0.980," not in training


def test_sweep_is_drawn_with_its_controls(tmp_path: Path, swept: dict[str, Any], full_page: tuple[str, Page]) -> None:
    page = render(tmp_path, swept)[1]
    assert "dose" in page.words("dose") and len(swept["sweep"]) == 2 * 3
    for curve in swept["sweep"]:
        for point in curve["points"]:
            begins = f"{curve['name']} at dose {point['dose']:g}: "
            assert sum(said.startswith(begins) for said in page.said) == 2 * 3, "three outcomes, wide and narrow"
    assert sum(said.startswith("random, draw 8 at dose") for said in page.said) == 2 * 3 * 4
    assert "range of the 8 control draws" in page.words("result"), "of the control of the primary contrast alone"
    assert 'id="dose"' not in full_page[0] and "#dose" not in full_page[0]
    html = render(tmp_path, swept)[0]
    assert 'id="training"' not in html and "#drift" not in html, "nothing was trained"


def test_needs_no_network(full_page: tuple[str, Page]) -> None:
    html, page = full_page
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


def test_ids_are_unique_and_references_resolve(full_page: tuple[str, Page]) -> None:
    html, page = full_page
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and not any("hover" in (i or "") for i in ids)
    wanted = set(re.findall(r"url\(#([^)]+)\)", html))
    for _, attributes in page.tags:
        wanted |= set((attributes.get("aria-labelledby") or "").split())
        if (attributes.get("href") or "").startswith("#"):
            wanted.add((attributes["href"] or "")[1:])
    assert wanted and wanted <= set(ids)


def test_pictures_have_words_and_follow_the_colours_of_the_page(full_page: tuple[str, Page]) -> None:
    html, page = full_page
    plots = [a for tag, a in page.tags if tag == "svg"]
    assert len(plots) > 5
    assert all(a.get("role") == "img" and (a.get("aria-label") or a.get("aria-labelledby")) for a in plots)
    body = html[html.index("<body>") :]
    assert "var(--arm-0)" in body and not re.search(r"(?:fill|stroke): ?#", body), "a colour that the dark scheme cannot change"
    assert "prefers-color-scheme: dark" in html and html.count('<div class="wide">') == html.count('<div class="narrow">') > 5
    assert all(a.get("scope") in ("col", "row") for tag, a in page.tags if tag == "th")


def test_escapes_everything_that_is_text(tmp_path: Path, five_seeds: dict[str, Any], synthetic_drift: Drift) -> None:
    metrics = five_seeds
    metrics |= {"experiment": HOSTILE, "command": HOSTILE, "started": HOSTILE, "versions": {HOSTILE: HOSTILE}, "verdict": HOSTILE}
    metrics["question"]["text"] = metrics["contrasts"][0]["verdict"] = metrics["guardrails"][0]["verdict"] = HOSTILE
    metrics["trait"] = {"name": HOSTILE, "description": HOSTILE, "auc_by_site": {HOSTILE: 0.7, "layers.16.output": 0.9}}
    metrics["arms"][0]["label"] = f"$x$ {HOSTILE}"
    metrics["outcomes"][HOSTILE] = metrics["outcomes"]["behaviour_gap"] | {"unit": HOSTILE, "role": "secondary"}
    metrics["arms"][0]["outcomes"][HOSTILE] = metrics["arms"][0]["outcomes"]["behaviour_gap"]
    metrics["items"][0] = {"id": HOSTILE, "text": HOSTILE, "difference": -9.0}
    metrics["completions"]["plain"][0] = {"prompt": HOSTILE, "text": HOSTILE, "tokens": [[HOSTILE, 1.0]]}
    metrics["completions"]["prompt"][0] = {"prompt": HOSTILE, "text": HOSTILE}
    metrics["projections"]["direction"] = HOSTILE
    metrics["design"]["lock"]["deviations"] = [HOSTILE]
    drift = {
        arm: [replace(record, direction=HOSTILE) if record.kind == "named" else record for record in records]
        for arm, records in synthetic_drift.items()
    }
    html, page = render(tmp_path, metrics, drift)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert all(HOSTILE in page.text[section] for section in ("head", "completions", "contrasts", "items", "cost", "drift"))
    assert any(HOSTILE[:30] in said for said in page.said)


def test_stands_without_optional_parts(tmp_path: Path) -> None:
    _, page = render(tmp_path, {"schema": 2})
    for section, words in {
        "head": "No verdict was recorded.",
        "result": "No arms were recorded.",
        "cost": "No guardrail was set",
        "contrasts": "No contrasts were recorded.",
        "drift": "No drift was recorded in this run.",
        "training": "No training loss was recorded.",
        "completions": "No completions were recorded.",
        "items": "No differences of single items were recorded.",
    }.items():
        assert words in page.text[section]


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_number_that_is_missing_is_not_measured(
    tmp_path: Path, five_seeds: dict[str, Any], synthetic_drift: Drift, missing: float | None
) -> None:
    metrics = five_seeds
    for arm in metrics["arms"]:
        for key in ("mean", "before", "change"):
            arm["outcomes"]["task_logprob"][key] = missing
        arm["outcomes"]["task_logprob"] |= {"ci": [missing, missing], "change_ci": [missing, 1.0], "by_seed": {"0": missing, "1": missing}}
        arm["outcomes"]["neutral_loss"] = None
    metrics["contrasts"][0] |= {"difference": missing, "ci": [missing, 1.0], "p": missing, "p_adjusted": missing}
    metrics["guardrails"][0] |= {"harm": missing, "bounds": [missing, missing]}
    metrics["trade_off"][0] |= {"effect": missing}
    metrics["items"][0]["difference"] = missing
    metrics["power"]["smallest_effect"] = missing
    next(iter(metrics["training"].values()))["loss"][3] = missing
    metrics["overhead"]["random"] = {"median": missing, "range": [missing, missing]}
    undefined: dict[str, Any] = {"effect_sd": math.nan, "p": missing, "q": missing}
    records = [replace(record, metrics={**record.metrics, **undefined}) for record in synthetic_drift["plain"]]
    html, page = render(tmp_path, metrics, {**synthetic_drift, "plain": records})
    arm_row = page.row("plain Plain fine-tune")
    assert arm_row[2].startswith("not measured") and arm_row[3] == "not measured"
    assert page.row("plain", "60", "not measured")[3] == "not comparable"
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(page.text.values()))
    assert not re.search(r'="[^"]*\bnan\b', html)


def test_the_stream_starts_at_its_first_window(tmp_path: Path, one_seed: dict[str, Any], synthetic_drift: Drift) -> None:
    stream = {arm: [replace(record, mode="stream") for record in records if record.step] for arm, records in synthetic_drift.items()}
    _, probed = render(tmp_path, one_seed, synthetic_drift)
    _, page = render(tmp_path, one_seed, stream)
    caption, caveat = "since the window that ended at step 4", "Stream mode begins at its first window"
    assert caption in page.text["drift"] and caveat in page.text["caveats"]
    assert caption not in probed.text["drift"] and caveat not in probed.text["caveats"]


def test_long_completions_are_whole_but_folded(tmp_path: Path, one_seed: dict[str, Any]) -> None:
    text = "word " * 400 + "end of it"
    one_seed["completions"]["plain"][0]["text"] = text
    html, page = render(tmp_path, one_seed)
    assert text in page.text["completions"] and "The whole text" in page.text["completions"]


def test_same_input_gives_the_same_file(
    tmp_path: Path, five_seeds: dict[str, Any], drift_of_cells: Drift, full_page: tuple[str, Page]
) -> None:
    assert render(tmp_path, five_seeds, drift_of_cells)[0] == full_page[0]


@pytest.mark.parametrize("schema", [{}, {"schema": 3}])
def test_refuses_other_schemas(tmp_path: Path, schema: dict[str, int]) -> None:
    with pytest.raises(WrongKindError, match="schema 1 or 2"):
        write_report(tmp_path / "report.html", schema, {})
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_names_the_extra_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bare: dict[str, Any], module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'torchsteer\[report\]'"):
        write_report(tmp_path / "report.html", bare, {})


def test_the_verdict_says_when_single_control_draws_do_as_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contrast with the mean of draws that differ widely says little about the edit."""
    monkeypatch.setattr(trees, "SPREAD", (0.6, 0.02, 0.004))
    found = trees.tree(5, effect=0.2, chosen=("plain", "preventative", "random"))
    rank = found["specificity"]["rank"]
    assert found["contrasts"][0]["shown"] and rank > 1 and f"but {rank - 1} of 8 control draws do as much" in found["verdict"]
    assert "lies within the range of its control draws" in render(tmp_path, found)[1].words("caveats")
