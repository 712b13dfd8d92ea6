"""Dictionaries of other libraries beside steer: does each file encode and decode here as in the library that wrote it, to 1e-5?

    python benchmarks/dictionary_agreement.py --environments DIR [--libraries saelens ...] [--out FILE]

Each library runs in a process of its own, with `DIR/<library>/bin/python`: DIR has environments `saelens` with sae-lens, `sparsify` with
eai-sparsify, `dictionary_learning` with dictionary-learning and `circuit_tracer` with circuit-tracer. The process makes dictionaries with
random weights by the library's own classes, saves them by its own functions, and encodes and decodes in float64
(`dictionary_peers/<library>.py`). Here the same files are loaded, given the same activations, and compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import steer

HERE = Path(__file__).resolve().parent
LIMIT = 1e-5
LIBRARIES = ("saelens", "dictionary_learning", "sparsify", "circuit_tracer")


@dataclass(frozen=True)
class Row:
    """One dictionary: largest differences as a share of the largest number, and how many features are on."""

    library: str
    version: str
    dictionary: str
    encoded: float
    decoded: float
    selected: float
    share_on: float

    @property
    def ok(self) -> bool:
        return max(self.encoded, self.decoded, self.selected) <= LIMIT and 0 < self.share_on < 1


def rows_of(library: str, python: Path, folder: Path) -> list[Row]:
    """Raises CalledProcessError when the library's process fails."""
    script = HERE / "dictionary_peers" / f"{library}.py"
    subprocess.run([python, script, folder], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    answers = json.loads((folder / "answers.json").read_text())
    rows = []
    for name, answer in answers["dictionaries"].items():
        tensors = load_file(folder / f"{name}.answer")
        dictionary = steer.load_dictionary(folder / answer["place"], **answer["arguments"])
        h, f, out = tensors["h"], tensors["f"], tensors["out"]
        features = torch.arange(0, dictionary.width, 3)
        selected = dictionary.encode_selected(h, features)
        differences = (
            apart(dictionary.encode(h), f),
            apart(dictionary.decode(f, h), out),
            apart(selected, f[..., features]),
        )
        rows.append(Row(library, answers["version"], name, *differences, float((f != 0).double().mean())))
    return rows


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Raises ValueError for another shape, which broadcasting would hide."""
    if found.shape != expected.shape:
        raise ValueError(f"{list(found.shape)} where the library has {list(expected.shape)}")
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for library in options.libraries:
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(library, (options.environments / library / "bin" / "python").absolute(), Path(folder))
    table = Table("library", "dictionary", "encode", "decode", "selected", "share on", "")
    for row in rows:
        numbers = [f"{value:.1e}" for value in (row.encoded, row.decoded, row.selected)]
        table.add_row(f"{row.library} {row.version}", row.dictionary, *numbers, f"{row.share_on:.2f}", "ok" if row.ok else "DIFFERS")
    Console(width=140).print(table)
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    sys.exit(0 if all(row.ok for row in rows) else 1)


if __name__ == "__main__":
    main()
