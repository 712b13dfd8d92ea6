"""The page of edits: self-contained, every number of the table, each fact, problems, and text that is no HTML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from report.page_reader import Page

from steer.edits.evaluation import EditEvaluation, EditRow
from steer.errors import ConfigError
from steer.report import write_edits

WRITTEN = {"before": " tree", "after": " dog"}


def evaluation(editor: str = "memit", **more: Any) -> EditEvaluation:
    def scores(p: float) -> dict[str, float]:
        return {"efficacy": float(p > 0.5), "efficacy_magnitude": p - 0.1, "efficacy_accuracy": float(p > 0.5), "efficacy_probability": p}

    rows = (
        EditRow("a", "the <b>cat</b> is a", "cat", "dog & dog", "tree", scores(0.01), scores(0.91), written=WRITTEN),
        EditRow("b", "the dog is a", "dog", "tree", "cat", scores(0.02), scores(0.42), problem="this dog stays"),
    )
    return EditEvaluation("single", editor, ("efficacy",), rows, None, {"model": "LlamaForCausalLM"}, **more)


def test_the_page_has_every_number(tmp_path: Path) -> None:
    found = evaluation()
    html = write_edits(tmp_path / "deep" / "edits.html", [found, evaluation("rome")], facts={"Weights": "tiny"}).read_text()
    page = Page(html)
    assert not page.unbalanced and "https:" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html) and "<script" not in html
    assert "the <b>cat</b> is a" not in html and "the &lt;b&gt;cat&lt;/b&gt; is a" in html and "dog &amp; dog" in html
    for title, *numbers in found.cells()[1:]:
        assert page.row(title)[1 : 1 + len(numbers)] == numbers
    assert "this dog stays" in page.text["measured"] and "1 of 2 facts" in page.text["measured"]
    assert "memit" in page.text["editors"] and "rome" in page.text["editors"] and "tiny" in page.text["head"]
    assert "0.01 to 0.91" in page.text["facts"] and "after memit" in page.text["continuations"]


def test_one_editor_without_texts(tmp_path: Path) -> None:
    found = evaluation()
    bare = EditEvaluation("sequence", "memit", ("efficacy",), tuple(EditRow(**{**vars(row), "written": {}}) for row in found.rows))
    page = Page(write_edits(tmp_path / "edits.html", [bare], title="mine").read_text())
    assert "mine" in page.text["head"] and "one after the other" in page.text["head"]
    assert "No text was generated" in page.text["continuations"]
    for wrong in ([], [3], found):
        with pytest.raises(ConfigError):
            write_edits(tmp_path / "edits.html", wrong)
