"""Runs the notebooks of this folder and writes them back with what they showed: python notebooks/execute.py [01_steer.ipynb ...]

What changes from run to run without saying anything (times of execution, progress bars, the version of Python) is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent


def executed(path: Path) -> NotebookNode:
    """The notebook after a run of all its cells in this folder. Raises nbclient.exceptions.CellExecutionError with the cell that failed."""
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place, coalesce_streams=True).execute()
    return without_volatile_parts(notebook)


def without_volatile_parts(notebook: NotebookNode) -> NotebookNode:
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("transient", None)
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.name for path in FOLDER.glob("*.ipynb")):
        nbformat.write(executed(FOLDER / name), FOLDER / name)
        print("wrote", name)
