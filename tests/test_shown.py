"""The README and the guides run on the embedded model, and print what they show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from extracted_once import extracting_once, folder_of_run
from shown import FENCE, Page, alike
from test_docs import SHOWN, code_lines, name_in_repository

import steer


@pytest.fixture
def extracted_once(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steer, "extract", extracting_once(folder_of_run(tmp_path_factory)))


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("extracted_once")
@pytest.mark.parametrize("path", sorted(SHOWN), ids=name_in_repository)
def test_a_page_prints_what_it_shows(path: Path, smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "trl" in path.name:
        pytest.importorskip("trl", reason="trl is an extra: pip install 'torchsteer[dev]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *os.sys.path])  # type: ignore[attr-defined]  # of modules that a page writes
    assert not (differences := list(Page(path).differences())), "\n\n".join(differences)


def test_the_examples_of_the_readme_are_short() -> None:
    readme = next(path for path in SHOWN if path.name == "README.md")
    assert len(readme.read_text(encoding="utf-8").splitlines()) < 150
    examples = [code for language, code in FENCE.findall(readme.read_text(encoding="utf-8")) if language == "python"]
    assert len(examples) == 6
    for example in examples:
        lines = [line for line in example.splitlines() if not line.startswith(("import ", "from "))]
        assert code_lines("\n".join(lines)) <= 10, example


def test_every_page_shows_something() -> None:
    for path in SHOWN:
        assert any(step.shown for step in Page(path).steps()), f"{path.name} shows no output"


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("loss 3.61", "loss 3.62", True),
        ("loss 3.61", "loss 3.91", False),
        ("step 2", "step 3", False),
        ("the dog", "the cat", False),
        ("a\n...\nb 1.0", "a\nx\ny\nb 1.01", True),
        ("a\n...\nb", "a\nx", False),
        ("+0.2 SD", "+0.3 SD", True),
        ("+0.2 SD", "-0.3 SD", False),
        ("a", "a\nb", False),
    ],
)
def test_what_counts_as_the_same_output(shown: str, printed: str, expected: bool) -> None:
    assert alike(shown, printed) is expected
