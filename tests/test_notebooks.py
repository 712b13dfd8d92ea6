"""The notebooks run from top to bottom on the embedded model, and what is committed is such a run, with its plots."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import processes
import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient is an extra: pip install 'torchsteer[dev]'")
pytest.importorskip("ipykernel", reason="ipykernel is an extra: pip install 'torchsteer[dev]'")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
IN_A_KERNEL = "03_features"  # by execute.py, as a reader does; the others in a process that need not import torch and the rest again
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


def run_here(path: Path, written: Path) -> None:
    """Runs a notebook by a kernel inside this process, cell after cell, and writes it with what it showed."""
    from ipykernel.inprocess import InProcessKernelManager

    os.chdir(FOLDER)
    manager = InProcessKernelManager()
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            client.execute(cell.source)
            cell.outputs = shown_by(client)
    nbformat.write(executing().without_volatile_parts(notebook), written)


def shown_by(client: Any) -> list[Any]:
    """Outputs of the cell that was executed last, streams in one piece."""
    shown: list[Any] = []
    while (message := client.get_iopub_msg(timeout=60))["content"].get("execution_state") != "idle":
        assert message["msg_type"] != "error", "\n".join(message["content"]["traceback"])
        if message["msg_type"] in ("stream", "display_data", "execute_result"):
            output = nbformat.v4.output_from_msg(message)
            if shown and output.output_type == "stream" and output.name == shown[-1].get("name"):
                shown[-1].text += output.text
            else:
                shown.append(output)
    return shown


@pytest.mark.real
@pytest.mark.usefixtures("smollm2")  # skips where the model is missing
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    committed = kinds(nbformat.read(path, as_version=4))
    if path.stem == IN_A_KERNEL:
        run = executing().executed(path)
    else:
        assert processes.ended([processes.started(run_here, path, tmp_path / path.name)], timeout=600) == [0]
        run = nbformat.read(tmp_path / path.name, as_version=4)
    assert SAID[path.stem] in said(run) and kinds(run) == committed
