"""Metrics of schema 1 are shown as what they say, on the same page."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

from report.page_reader import render
from rich.console import Console

from steer.drift.records import DriftRecord
from steer.report import comparison_figure, summary_table
from steer.report.schema import read


def test_the_page_says_what_the_metrics_say(tmp_path: Path, schema1: dict[str, Any], synthetic_drift: dict[str, list[DriftRecord]]) -> None:
    _, page = render(tmp_path, schema1, synthetic_drift)
    assert "Yes: 'preventative' has a lower behaviour gap than 'plain' and 'random'" in page.words("head")
    assert "Items only: one seed" in page.words("head") and "Exploratory" in page.words("head")
    assert schema1["specificity"]["statement"] in page.words("result") and schema1["command"] in page.words("provenance")
    plain = page.row("plain Plain fine-tune not treated")
    assert plain[1] == "+1.42 [+1.29, +1.56] \u22120.84 \u2192 0.58"
    assert plain[3] == "+0.026 [+0.014, +0.039] 3.245 \u2192 3.271"
    assert "along the trait direction, layers.16.output, strength 1.5" in page.words("result")
    assert "against the trait direction" in page.words("result") and "along a random direction" in page.words("result")
    row = page.row("plain against preventative")
    assert row[2] == "+0.79 [+0.63, +0.95]" and row[3] == "< 0.001"
    assert "0.984" in page.text["training"] and "mean difference" in page.text["training"]
    assert "Start the comment with the `#` sign." in page.text["completions"] and "not generated" in page.text["completions"]
    assert page.row("plain", "1", "60", "1 min 1 s")[4] == "+1.7 % [\u22120.4, +3.1], within noise"
    assert "2.13.0" in page.text["provenance"] and "adapters/preventative" in page.text["provenance"]
    caveats = page.words("caveats")
    assert "One seed (0)" in caveats and "Written by version 0.1" in caveats and "1 control draw:" in caveats


def test_an_arm_that_repeats_the_training_of_another_is_no_run(schema1: dict[str, Any]) -> None:
    tree = read(schema1)
    assert list(tree["training"]) == ["plain", "preventative", "random"]
    assert tree["contrasts"][0]["a"] == "preventative" and tree["contrasts"][0]["role"] == "primary"
    assert len(tree["contrasts"]) == len(schema1["comparisons"]) == 18


def test_nothing_is_claimed_that_was_not_tested(tmp_path: Path, schema1: dict[str, Any]) -> None:
    metrics = copy.deepcopy(schema1)
    metrics["specificity"] = {"specific": None, "statement": "Not tested: there was no random arm."}
    assert read(metrics)["verdict"].startswith("Not tested")
    metrics["specificity"] = {**schema1["specificity"], "specific": False}
    assert read(metrics)["verdict"].startswith("Not shown") and len(read(metrics)["verdict"].split()) <= 20
    assert render(tmp_path, {"schema": 1})[1].words("head")


def test_table_and_figure(schema1: dict[str, Any]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(schema1))
    text = console.export_text()
    assert "+1.42" in text and "[+1.29, +1.56]" in text and "against random" in text
    (axes,) = comparison_figure(schema1).axes
    assert "change from the base model" in axes.get_xlabel()
