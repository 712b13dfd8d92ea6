"""The notebooks run from top to bottom on the embedded model, and what is committed is such a run, with its plots."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient is an extra: pip install 'torchsteer[dev]'")
pytest.importorskip("ipykernel", reason="ipykernel is an extra: pip install 'torchsteer[dev]'")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SAID = {  # of each a line that would not be there if it had shown nothing
    "01_steer_and_calibrate": "chosen",
    "02_watch_a_fine_tune": "standard deviations",
    "03_features": "(random):",
    "04_edits_and_circuits": "undone to the bit: True",
}


def executing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def kinds(notebook: Any) -> list[list[str]]:
    """What each code cell shows: streams by their name, displays by the richest of their forms."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[output.get("name") or ("image" if "image/png" in output.data else "text") for output in cell.outputs] for cell in code]


def said(notebook: Any) -> str:
    return "\n".join(output.get("text") or output.data.get("text/plain", "") for output in outputs(notebook))


def test_every_notebook_is_known() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(SAID)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_a_whole_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run python notebooks/execute.py"
    assert not any(cell.metadata for cell in notebook.cells) and set(notebook.metadata) == {"kernelspec"}
    assert SAID[path.stem] in said(notebook) and any("image" in kind for kind in kinds(notebook))
    assert path.stat().st_size < 300_000


@pytest.mark.real
@pytest.mark.usefixtures("smollm2")  # skips where the model is missing
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path) -> None:
    committed = kinds(nbformat.read(path, as_version=4))
    run = executing().executed(path)
    assert SAID[path.stem] in said(run) and kinds(run) == committed
