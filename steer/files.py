"""Files that are either whole or absent: a manifest and tensors, written under a temporary name and renamed, checked when they are read.

Two forms hold the same things. A path that ends in `.safetensors` is one file, with the manifest as JSON in its metadata; any other path is
a folder with `manifest.json` and `tensors.safetensors`. The manifest carries, beside what the caller put there, the schema version, the
kind, the library's version and a SHA-256 over the names, types, shapes and bytes of the tensors. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from steer import __version__
from steer.checks import of_type
from steer.errors import ConfigError, DamagedFileError, FileError, NonFiniteError, StorageFullError, UnsafeFileError, WrongKindError

SCHEMA = 1
MANIFEST, TENSORS = "manifest.json", "tensors.safetensors"
_RESERVED = ("schema", "kind", "library", "sha256")
_METADATA_KEY = "steer"
_AGAIN = "restore it from a backup, or make it and save it again"


def save_artifact(path: str | Path, kind: str, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> Path:
    """Writes one artifact; what stood at `path` before is replaced only when the new one is complete on disk.

    Args:
        path: `*.safetensors` for one file, anything else for a folder. Missing parents are made.
        kind: what it is ("plan", "directions", ...); the loader must ask for the same.
        tensors: finite, of any device and layout; stored dense and contiguous.
        manifest: JSON values only (tuples come back as lists), without the keys that this module writes itself.

    Raises:
        NonFiniteError: NaN or infinity, with the name of the tensor or the place in the manifest.
        ConfigError: a manifest that JSON cannot hold, or one with a reserved key.
        WrongKindError: `path` holds something that is not an artifact and would be lost.
        StorageFullError: no room; the old artifact is untouched.
    """
    path = place_of(path)
    taken = [key for key in _RESERVED if key in manifest]
    if taken:
        expected = f"keys other than {', '.join(_RESERVED)}"
        raise ConfigError(f"manifest key '{taken[0]}' is reserved", expected=expected, found=taken, remedy="give it another name")
    _check_json(manifest, "manifest")
    # a copy each: safetensors refuses tensors that share memory, and a view would drag its whole storage along
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    _check_finite(plain, path)
    full = {"schema": SCHEMA, "kind": kind, "library": __version__, "sha256": tensor_hash(plain), **manifest}
    if path.suffix == ".safetensors":
        if path.is_dir():
            wanted, remedy = "a file, or no such path yet", "save to another path, or move the folder away"
            raise WrongKindError(f"{path} is a folder", expected=wanted, found=contents(path), remedy=remedy)
        return atomic_write(path, safetensors.torch.save(plain, {"format": "pt", _METADATA_KEY: json.dumps(full)}))
    parts = {TENSORS: safetensors.torch.save(plain, {"format": "pt"}), MANIFEST: json.dumps(full, indent=2).encode() + b"\n"}
    return _swap_folder(path, parts)


def load_artifact(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads and checks one artifact.

    Returns:
        The manifest and the tensors as they were given to `save_artifact`.

    Raises:
        DamagedFileError: truncated, altered, or with a part missing.
        UnsafeFileError: a pickle (a PyTorch checkpoint, for example) where safetensors is wanted.
        WrongKindError: another kind, a newer schema, or a safetensors file of another origin.
        NonFiniteError: a tensor with NaN or infinity, by its name.
        FileError: there is nothing at `path`, or it cannot be read.
    """
    path = place_of(path)
    place = path if path.exists() else _previous(path)  # a crash between the two renames of a folder swap leaves the old folder there
    if not place.exists():
        raise FileError(f"no file or folder {path}", expected=f"a '{kind}' saved by steer", found="nothing there", remedy="check the path")
    try:
        if place.is_dir():
            full = _read_manifest(place / MANIFEST)
            _check_header(full, kind, path)
            if not (place / TENSORS).exists():
                wanted = f"{MANIFEST} and {TENSORS}"
                raise DamagedFileError(f"{path} lacks {TENSORS}", expected=wanted, found=contents(place), remedy=_AGAIN)
            tensors, _ = read_safetensors(place / TENSORS)
        else:
            tensors, metadata = read_safetensors(place)
            if _METADATA_KEY not in metadata:
                raise WrongKindError(
                    f"{path} was not written by steer",
                    expected=f"a '{kind}' saved by steer",
                    found=f"plain safetensors with {_some(tensors) or 'no tensors'}",
                    remedy=f"read its tensors with steer.files.read_safetensors, and make and save the {kind} with them",
                )
            full = _parse(metadata[_METADATA_KEY], path)
            _check_header(full, kind, path)
    except OSError as error:
        wanted, remedy = "a file that can be read", "check its permissions and the disk"
        raise FileError(f"cannot read {path}", expected=wanted, found=str(error), remedy=remedy) from error
    digest = tensor_hash(tensors)
    if full.get("sha256") != digest:
        wanted = f"sha256 {full.get('sha256')}"
        raise DamagedFileError(f"the tensors of {path} were altered", expected=wanted, found=f"sha256 {digest}", remedy=_AGAIN)
    _check_finite(tensors, path)
    return {key: value for key, value in full.items() if key not in _RESERVED}, tensors


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of any safetensors file; a pickle is recognised by its first bytes and refused."""
    path = place_of(path)
    with path.open("rb") as file:
        head = file.read(8)
    # eight bytes give the length of a safetensors header; a pickle or a zip read as one gives a length beyond the file
    header = int.from_bytes(head, "little")
    pickled = head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05"
    if (pickled or head[:4] == b"PK\x03\x04") and header > path.stat().st_size:
        raise UnsafeFileError(
            f"{path} is a pickle, which can run any code when it is opened",
            expected="safetensors",
            found="a pickle stream" if pickled else "a zip archive, as torch.save writes it",
            remedy="convert it where you trust it: torch.load(..., weights_only=True), then safetensors.torch.save_file",
        )
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        found = f"{path.stat().st_size} bytes; {error}"
        wanted = "a whole safetensors file"
        raise DamagedFileError(f"{path} is truncated or not safetensors", expected=wanted, found=found, remedy=_AGAIN) from error


def atomic_write(path: str | Path, content: bytes | str) -> Path:
    """Replaces one small file in one step: a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        StorageFullError: no room; the old content is untouched.
    """
    path = place_of(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = _temporary(path)
    with storage_errors(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_through(temporary, data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    return path


def place_of(path: str | Path) -> Path:
    """A path as it was given, `~` being the user's home. Raises ConfigError for what is no path."""
    of_type(path, (str, os.PathLike), "the path of a file", "pass the path as text, e.g. 'my_plan'")
    return Path(os.path.expanduser(path))


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each CPU tensor, in order of name: the same in every file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    if os.name != "posix":
        return  # a folder cannot be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap_folder(path: Path, parts: dict[str, bytes]) -> Path:
    """Writes the parts into a sibling, moves the old folder aside and the new one in; the old one goes only when the new one is there."""
    previous, temporary = _previous(path), _temporary(path)
    with storage_errors(path, sum(map(len, parts.values()))):
        if previous.exists() and not path.exists():
            os.rename(previous, path)  # an earlier run was killed between its two renames
        if path.exists() and not (path.is_dir() and set(os.listdir(path)) <= {MANIFEST, TENSORS}):
            raise WrongKindError(
                f"{path} holds other things, which a save would delete",
                expected=f"a new path, or a folder with nothing but {MANIFEST} and {TENSORS}",
                found=contents(path),
                remedy="save to another path",
            )
        try:
            temporary.mkdir(parents=True)
            for name, data in parts.items():
                _write_through(temporary / name, data)
            sync_folder(temporary)
            if path.exists():
                shutil.rmtree(previous, ignore_errors=True)
                os.rename(path, previous)
            try:
                os.rename(temporary, path)
            except BaseException:
                if previous.exists():
                    os.rename(previous, path)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    return path


def _temporary(path: Path) -> Path:
    return _sibling(path, f"{uuid.uuid4().hex[:12]}.tmp")


def _previous(path: Path) -> Path:
    return _sibling(path, "previous")


def _sibling(path: Path, ending: str) -> Path:
    whole = Path(os.path.abspath(path))  # "." has no name of its own
    return whole.with_name(f".{whole.name}.{ending}")


def _write_through(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # some file systems report a full disk only here


@contextmanager
def storage_errors(path: Path, wanted: int) -> Iterator[None]:
    """Turns what the operating system says about a write into a typed error."""
    try:
        yield
    except FileError:
        raise  # StorageFullError is an OSError too, and says it already
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = StorageFullError(
                f"no room to write {path}",
                expected=f"{wanted} bytes",
                found=f"{shutil.disk_usage(_nearest(path)).free} bytes free",
                remedy="free some space and save again; what was there before is intact",
            )
            full.errno = error.errno
            raise full from error
        expected, remedy = "a place that can be written to", "check the path and its permissions, or write to another place"
        raise FileError(f"cannot write {path}", expected=expected, found=str(error), remedy=remedy) from error


def _nearest(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        wanted, found = f"{MANIFEST} and {TENSORS}", contents(path.parent)
        raise DamagedFileError(f"{path.parent} lacks {MANIFEST}", expected=wanted, found=found, remedy=f"check the path, or {_AGAIN}")
    return _parse(path.read_bytes(), path)


def _parse(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        full = json.loads(text)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        wanted = "a JSON object"
        raise DamagedFileError(f"the manifest of {path} is broken", expected=wanted, found=str(error), remedy=_AGAIN) from error
    if not isinstance(full, dict):
        found = type(full).__name__
        raise DamagedFileError(f"the manifest of {path} is broken", expected="a JSON object", found=found, remedy=_AGAIN)
    return full


def _check_header(full: dict[str, Any], kind: str, path: Path) -> None:
    schema = full.get("schema")
    if type(schema) is not int:
        found = f"schema {schema!r}"
        raise DamagedFileError(f"the manifest of {path} is broken", expected="a whole number as schema", found=found, remedy=_AGAIN)
    if schema > SCHEMA:
        raise WrongKindError(
            f"{path} is of a newer schema", expected=f"at most {SCHEMA}", found=schema, remedy=f"upgrade torchsteer (here: {__version__})"
        )
    if full.get("kind") != kind:
        remedy = f"give the path of a saved '{kind}', or load this one as what it is"
        raise WrongKindError(f"{path} is of another kind", expected=kind, found=full.get("kind", "no kind"), remedy=remedy)


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no isfinite
        bad = int((~torch.isfinite(wide)).sum())
        if bad:
            found = f"{bad} of {tensor.numel()} are NaN or infinite"
            remedy = "make it again with finite numbers; overflow in half precision and division by zero are the usual causes"
            raise NonFiniteError(f"tensor '{name}' of {path} is not finite", expected="finite numbers", found=found, remedy=remedy)


def _check_json(value: object, where: str) -> None:
    """JSON turns integer keys into strings and NaN into what other readers refuse: say so instead."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                found, remedy = type(key).__name__, f"write it as {str(key)!r}"
                raise ConfigError(f"key {key!r} of {where} is no string", expected="a string", found=found, remedy=remedy)
            _check_json(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_json(inner, f"{where}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            remedy = "leave it out, or store None in its place"
            raise NonFiniteError(f"{where} is not finite", expected="a finite number", found=value, remedy=remedy)
    elif not (value is None or isinstance(value, str | int)):
        expected, remedy = "a JSON value (text, number, boolean, list, dict or None)", "convert it, e.g. with .tolist() or str()"
        raise ConfigError(f"{where} is no JSON value", expected=expected, found=type(value).__name__, remedy=remedy)


def contents(folder: Path) -> str:
    """What stands in a folder, in few words, for an error."""
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    return _some(os.listdir(folder)) or "an empty folder"


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
