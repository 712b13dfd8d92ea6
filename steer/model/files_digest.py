"""Digest of a model's files: tells whether a local folder holds the same weights as before."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from steer.model import embedded
from steer.reading import place_of, read_json

_READ = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt")  # weights, configuration and tokenizer


def files_digest(name_or_path: str) -> str | None:
    """SHA-256 of the files that a model is loaded from, those of an adapter's base included.

    Returns:
        None where no local file is meant: the embedded model, which never changes, and hub ids, whose revisions are the hub's.
    """
    path = place_of(name_or_path)
    if name_or_path == embedded.NAME or not path.exists():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix in _READ) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        state = file.stat()
        whole.update(f"{file.name} {_file_digest(file, state.st_size, state.st_mtime_ns)}\n".encode())
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        whole.update(str(files_digest(str(read_json(adapter).get("base_model_name_or_path")))).encode())
    return whole.hexdigest()


@cache
def _file_digest(file: Path, size: int, modified: int) -> str:
    """By size and time of change, so that a file of many gigabytes is read once in a process."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
