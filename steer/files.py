"""Files that are either whole or absent: a manifest and tensors, written under a temporary name and renamed, checked when they are read.

Two forms hold the same things. A path that ends in `.safetensors` is one file, with the manifest as JSON in its metadata; any other path is
a folder with `manifest.json` and `tensors.safetensors`. The manifest carries, beside what the caller put there, the schema version, the
kind, the library's version, a SHA-256 over the names, types, shapes and bytes of the tensors, and one over everything else in itself.
Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from steer import __version__
from steer.checks import json_value
from steer.errors import ConfigError, DamagedFileError, FileError, NonFiniteError, StorageFullError, WrongKindError
from steer.reading import parse_json, place_of, read_bytes
from steer.tensor_files import read_safetensors

try:
    import fcntl
except ImportError:  # not on Windows, where what killed saves leave behind stays
    fcntl = None  # type: ignore[assignment]

SCHEMA = 2  # from 2 on a manifest has a hash of its own
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
SEAL = "json_sha256"
_RESERVED = ("schema", "kind", "library", "sha256", SEAL)
METADATA_KEY = "steer"
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

    Example:
        >>> steer.save_artifact("means", "activation means", {"mean": torch.zeros(32)}, {"texts": 200})
        PosixPath('means')
        >>> manifest, tensors = steer.load_artifact("means", "activation means")
    """
    path = place_of(path)
    if reserved := [key for key in _RESERVED if key in manifest]:
        raise _reserved_keys(reserved)
    json_value(manifest, "manifest")
    # a copy each: safetensors refuses tensors that share memory, and a view would drag its whole storage along
    plain = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    _check_finite(plain, path)
    complete = sealed({"schema": SCHEMA, "kind": kind, "library": __version__, "sha256": tensor_hash(plain), **manifest})
    if path.suffix == ".safetensors":
        if path.is_dir():
            raise _folder_in_the_way(path)
        return atomic_write(path, safetensors.torch.save(plain, {"format": "pt", METADATA_KEY: json.dumps(complete)}))
    parts = {TENSORS: safetensors.torch.save(plain, {"format": "pt"}), MANIFEST: json.dumps(complete, indent=2).encode() + b"\n"}
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

    Example:
        >>> plan.save("warm")
        >>> manifest, tensors = steer.load_artifact("warm", "plan")
        >>> manifest["interventions"][0]["site"]
        'layers.12.output'
    """
    path = place_of(path)
    try:
        place = path if path.exists() else _previous(path)  # a crash between the two renames of a folder swap leaves the old folder there
        if not place.exists():
            raise _nothing_there(path, kind)
        manifest, tensors = _read_folder(place, path, kind) if place.is_dir() else _read_file(place, path, kind)
    except OSError as error:
        raise _unreadable(path, error) from error
    check_seal(manifest, path, is_required=manifest["schema"] > 1)
    digest = tensor_hash(tensors)
    if manifest.get("sha256") != digest:
        raise _altered(path, "tensors", manifest.get("sha256"), digest)
    _check_finite(tensors, path)
    return {key: value for key, value in manifest.items() if key not in _RESERVED}, tensors


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """JSON content with a SHA-256 over all of it, so that no changed bit goes unseen; `check_seal` looks at it."""
    return {**content, SEAL: _json_hash(content)}


def check_seal(content: Any, path: Path, *, is_required: bool = False) -> None:
    """Raises DamagedFileError when content was altered since it was sealed, is no object, or has no seal where one is required."""
    if not isinstance(content, dict):
        raise _no_object(path, content)
    if SEAL not in content and not is_required:
        return  # an older version wrote it
    digest = _json_hash({key: value for key, value in content.items() if key != SEAL})
    if content.get(SEAL) != digest:
        raise _altered(path, "contents", content.get(SEAL), digest)


def _json_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def atomic_write(path: str | Path, content: bytes | str) -> Path:
    """Replaces one small file in one step: a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        StorageFullError: no room; the old content is untouched.
    """
    path = place_of(path)
    data = content.encode() if isinstance(content, str) else content
    with storage_errors(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(path, is_folder=False) as temporary:
            _write_through(temporary, data)
            os.replace(temporary, path)
        sync_folder(path.parent)
    return path


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each CPU tensor, in order of name: the same in every file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        flat = tensor.contiguous().reshape(-1)
        flat = flat.as_strided(flat.shape, (1,))  # of one number, any stride counts as contiguous, also that of `expand`, 0
        digest.update(flat.view(torch.uint8).numpy().data)
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
    previous = _previous(path)
    with storage_errors(path, sum(map(len, parts.values()))):
        if previous.exists() and not path.exists():
            os.rename(previous, path)  # an earlier run was killed between its two renames
        if path.exists() and not (path.is_dir() and set(os.listdir(path)) <= {MANIFEST, TENSORS}):
            raise _would_delete(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(path, is_folder=True) as temporary:
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
        sync_folder(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    return path


@contextmanager
def temporary_sibling(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """A new file or folder beside a path, to be renamed into its place; what killed saves to that path left behind goes first.

    It is locked while it is written. The operating system drops a lock when its process dies, however it dies, so what is not locked
    belongs to nobody any more.
    """
    _remove_stale(path)
    while True:
        handle: int | None = None
        temporary = _sibling(path, f"{uuid.uuid4().hex[:12]}.tmp")
        try:
            temporary.mkdir() if is_folder else temporary.touch(exist_ok=False)
            handle = _lock(temporary, wait=True)
            if temporary.exists():  # another save may have taken it for a stale one before it was locked
                yield temporary
                return
        finally:
            shutil.rmtree(temporary, ignore_errors=True) if is_folder else temporary.unlink(missing_ok=True)
            if handle is not None:
                os.close(handle)


def _remove_stale(path: Path) -> None:
    """Removes what saves to this path left behind when they were killed, but nothing that a living process still writes."""
    sibling = _sibling(path, "")
    for entry in os.listdir(sibling.parent):
        if not re.fullmatch(re.escape(sibling.name) + r"[0-9a-f]{12}\.tmp", entry):
            continue
        stale = sibling.with_name(entry)
        handle = _lock(stale, wait=False)
        if handle is None:
            continue
        try:
            with suppress(OSError):  # of another user
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _lock(path: Path, *, wait: bool) -> int | None:
    """A handle that holds the lock of a file or folder; None where another process has it, or the file system has no locks."""
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    except BaseException:  # interrupted while it waited
        os.close(handle)
        raise
    return handle


def _previous(path: Path) -> Path:
    return _sibling(path, "previous")


def _sibling(path: Path, ending: str) -> Path:
    absolute = Path(os.path.abspath(path))  # "." has no name of its own
    return absolute.with_name(f".{absolute.name}.{ending}")


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # some file systems report a full disk only here


@contextmanager
def storage_errors(path: Path, size: int) -> Iterator[None]:
    """Turns what the operating system says about a write of so many bytes into a typed error."""
    try:
        yield
    except FileError:
        raise  # StorageFullError is an OSError too, and says it already
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _storage_full(path, size, error) from error
        raise _unwritable(path, error) from error


def _read_folder(folder: Path, path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / MANIFEST).exists():
        raise _missing_part(folder, folder, MANIFEST, remedy=f"check the path, or {_AGAIN}")
    manifest = _parse_manifest(read_bytes(folder / MANIFEST), folder / MANIFEST)
    _check_header(manifest, kind, path)
    if not (folder / TENSORS).exists():
        raise _missing_part(path, folder, TENSORS, remedy=_AGAIN)
    tensors, _ = read_safetensors(folder / TENSORS)
    return manifest, tensors


def _read_file(file: Path, path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, metadata = read_safetensors(file)
    if METADATA_KEY not in metadata:
        raise _of_other_origin(path, kind, tensors)
    manifest = _parse_manifest(metadata[METADATA_KEY], path)
    _check_header(manifest, kind, path)
    return manifest, tensors


def _parse_manifest(text: str | bytes, path: Path) -> dict[str, Any]:
    manifest = parse_json(text, f"the manifest of {path}")
    if not isinstance(manifest, dict):
        raise _broken_manifest(path, "a JSON object", type(manifest).__name__)
    return manifest


def _check_header(manifest: dict[str, Any], kind: str, path: Path) -> None:
    schema = manifest.get("schema")
    if type(schema) is not int:
        raise _broken_manifest(path, "a whole number as schema", f"schema {schema!r}")
    if schema < 1:
        raise _broken_manifest(path, f"a schema from 1 to {SCHEMA}", f"schema {schema}")
    if schema > SCHEMA:
        raise _newer_schema(path, schema)
    if manifest.get("kind") != kind:
        raise _other_kind(path, kind, manifest.get("kind", "no kind"))


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no isfinite
        if count := int((~torch.isfinite(wide)).sum()):
            raise _non_finite_tensor(name, path, f"{count} of {tensor.numel()} are NaN or infinite")


# ---- errors


def contents(folder: Path) -> str:
    """What stands in a folder, in few words, for an error."""
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    return _first_names(os.listdir(folder)) or "an empty folder"


def _first_names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def _reserved_keys(keys: list[str]) -> ConfigError:
    expected = f"keys other than {', '.join(_RESERVED)}"
    return ConfigError(f"manifest key '{keys[0]}' is reserved", expected=expected, found=keys, remedy="give it another name")


def _non_finite_tensor(name: str, path: Path, found: str) -> NonFiniteError:
    remedy = "make it again with finite numbers; overflow in half precision and division by zero are the usual causes"
    return NonFiniteError(f"tensor '{name}' of {path} is not finite", expected="finite numbers", found=found, remedy=remedy)


def _folder_in_the_way(path: Path) -> WrongKindError:
    remedy = "save to another path, or move the folder away"
    return WrongKindError(f"{path} is a folder", expected="a file, or no such path yet", found=contents(path), remedy=remedy)


def _would_delete(path: Path) -> WrongKindError:
    return WrongKindError(
        f"{path} holds other things, which a save would delete",
        expected=f"a new path, or a folder with nothing but {MANIFEST} and {TENSORS}",
        found=contents(path),
        remedy="save to another path",
    )


def _nothing_there(path: Path, kind: str) -> FileError:
    return FileError(f"no file or folder {path}", expected=f"a '{kind}' saved by steer", found="nothing there", remedy="check the path")


def _unreadable(path: Path, error: OSError) -> FileError:
    remedy = "check its permissions and the disk"
    return FileError(f"cannot read {path}", expected="a file that can be read", found=str(error), remedy=remedy)


def _unwritable(path: Path, error: OSError) -> FileError:
    remedy = "check the path and its permissions, or write to another place"
    return FileError(f"cannot write {path}", expected="a place that can be written to", found=str(error), remedy=remedy)


def _storage_full(path: Path, size: int, error: OSError) -> StorageFullError:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    full = StorageFullError(
        f"no room to write {path}",
        expected=f"{size} bytes",
        found=f"{shutil.disk_usage(folder).free} bytes free",
        remedy="free some space and save again; what was there before is intact",
    )
    full.errno = error.errno
    return full


def _missing_part(path: Path, folder: Path, part: str, *, remedy: str) -> DamagedFileError:
    return DamagedFileError(f"{path} lacks {part}", expected=f"{MANIFEST} and {TENSORS}", found=contents(folder), remedy=remedy)


def _broken_manifest(path: Path, expected: str, found: str) -> DamagedFileError:
    return DamagedFileError(f"the manifest of {path} is broken", expected=expected, found=found, remedy=_AGAIN)


def _no_object(path: Path, content: object) -> DamagedFileError:
    remedy = "restore it from a backup"
    return DamagedFileError(f"'{path}' is damaged", expected="a JSON object", found=type(content).__name__, remedy=remedy)


def _altered(path: Path, part: str, recorded: Any, digest: str) -> DamagedFileError:
    what = f"the {part} of {path} were altered"
    return DamagedFileError(what, expected=f"sha256 {recorded or 'in the file'}", found=f"sha256 {digest}", remedy=_AGAIN)


def _of_other_origin(path: Path, kind: str, tensors: dict[str, Tensor]) -> WrongKindError:
    return WrongKindError(
        f"{path} was not written by steer",
        expected=f"a '{kind}' saved by steer",
        found=f"plain safetensors with {_first_names(tensors) or 'no tensors'}",
        remedy=f"read vectors by steer.import_directions(path, site=...), other tensors by steer.files.read_safetensors; save a {kind}",
    )


def _newer_schema(path: Path, schema: int) -> WrongKindError:
    remedy = f"upgrade torchsteer (here: {__version__})"
    return WrongKindError(f"{path} is of a newer schema", expected=f"at most {SCHEMA}", found=schema, remedy=remedy)


def _other_kind(path: Path, kind: str, found: str) -> WrongKindError:
    remedy = f"give the path of a saved '{kind}', or load this one as what it is"
    return WrongKindError(f"{path} is of another kind", expected=kind, found=found, remedy=remedy)
