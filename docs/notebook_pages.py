"""Notebooks as pages of the site: text, code and the stored outputs, pictures inside the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def notebook_page(file: Path) -> str:
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    parts = [part for cell in cells for part in _cell(cell)]
    return "\n\n".join([*parts, f"*The notebook: `notebooks/{file.name}`*"]) + "\n"


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield re.sub(r"\]\(([\w-]+)\.ipynb\)", r"](\1.md)", text).replace("](../docs/", "](../")
    elif cell["cell_type"] == "code" and text.strip():
        yield _fenced("python", text)
        for output in cell["outputs"]:
            yield from _output(output)


def _output(output: dict[str, Any]) -> Iterator[str]:
    data = output.get("data", {})
    if "image/png" in data:
        yield f'<img alt="output of the cell above" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'.replace("\n", "")
    elif "image/svg+xml" in data:
        yield f"<div>{re.sub(r'^.*?(?=<svg)', '', ''.join(data['image/svg+xml']), flags=re.S)}</div>".replace("\n\n", "\n")
    elif "text/plain" in data or "text" in output:
        yield _fenced("", "".join(data.get("text/plain") or output["text"]))


def _fenced(language: str, text: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"
