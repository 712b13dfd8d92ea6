"""The process of one worker of benchmarks/checkouts.py: runs the cases of a workload that it is asked for.

It gets one argument, a JSON object (checkout, workload, threads, arguments), answers with its cases, notes and versions, and then with one
line of JSON for every line of standard input, which names a case. Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

PACKAGES = ("torchsteer", "torch", "transformers", "steering-vectors", "repsteer")


class CheckoutFinder:
    """Imports `steer` and its mapped folders from a checkout, before any installed copy.

    Args:
        checkout: root of the repository.
    """

    def __init__(self, checkout: Path) -> None:
        folders = {"steer": "steer", "steer.callbacks": "callbacks", "steer.kernels": "kernels", "steer.conf": "conf"}
        self.folders = {name: checkout / folder for name, folder in folders.items() if (checkout / folder / "__init__.py").is_file()}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        folder = self.folders.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def use_checkout(checkout: str | Path) -> None:
    """Imports `steer` from a checkout from now on. Raises FileNotFoundError when it is none."""
    root = Path(checkout).resolve()
    finder = CheckoutFinder(root)
    if "steer" not in finder.folders:
        raise FileNotFoundError(f"{root} is no checkout of this repository: it has no steer/__init__.py")
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]  # importlib asks for nothing but find_spec


def installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=answers, flush=True)

    task = json.loads(sys.argv[1])
    try:
        if task["checkout"] is not None:
            use_checkout(task["checkout"])
        import torch

        torch.set_num_threads(task["threads"])
        workload = importlib.import_module(task["workload"]).Workload(task["arguments"])
        answer({"cases": list(workload.cases), "notes": workload.notes, "versions": installed_versions()})
    except Exception as error:
        answer({"error": _first_line(error)})
        raise
    for line in sys.stdin:
        try:
            answer(workload.measure(line.strip()))
        except Exception as error:
            answer({"error": _first_line(error)})


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    main()
