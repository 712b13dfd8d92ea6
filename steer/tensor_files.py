"""Tensors out of files: safetensors, torch.save, numpy and GGUF. Sizes are checked before memory is taken, and no object is unpickled.

A zip (torch.save, numpy.savez) is measured by the sizes that it declares and checked by its checksums before anything is unpacked.
"""

from __future__ import annotations

import importlib
import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.lib import format as npy
from torch import Tensor

from steer.errors import ConfigError, DamagedFileError, SteerError, UnsafeFileError, WrongKindError
from steer.reading import damage_of, damaged, kind_of, other_kind, parse_json, place_of, read_bytes, size_of

_ROOM = 64 * 2**20  # bytes that a file may always unpack to
_TIMES = 20  # and beyond these, how many times its own size: numbers of trained models hardly shrink


def tensor_format(path: Path) -> str | None:
    """`torch`, `npz`, `npy`, `gguf`, `safetensors`, `json` or `zip`, by the content of a regular file; None for another one."""
    head = read_bytes(path, 64)
    if head.startswith(b"PK\x03\x04"):
        return _zip_format(path, head)
    if head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05" and head[8:9] != b"{":
        return "torch"  # the pickles that torch.save wrote before it wrote zips
    for magic, name in ((b"\x93NUMPY", "npy"), (b"GGUF", "gguf")):
        if head.startswith(magic):
            return name
    if head[7:9] == b"\0{":  # after the length of its header in 8 bytes; JSON may have a brace there, but no zero
        return "safetensors"
    return "json" if head.lstrip()[:1] == b"{" else None


def _zip_format(path: Path, head: bytes) -> str:
    """What is zipped, by the names of all parts, or of the first one where the list at the end is cut off."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError):
        length = int.from_bytes(head[26:28], "little")
        names = [head[30 : 30 + length].decode("utf-8", "replace")]
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    return "npz" if names and all(name.endswith(".npy") for name in names) else "zip"


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of any safetensors file; a pickle is recognised by its first bytes and refused.

    Raises:
        DamagedFileError, UnsafeFileError: a pickle. WrongKindError: no file, or one of another kind. FileError: it cannot be read.
    """
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """A `safetensors.safe_open` of a file that is proven to be one, from which single tensors and slices can be read.

    Raises:
        As `read_safetensors`, for whatever fails inside the block too.
    """
    path = place_of(path)
    size = size_of(path)
    head = read_bytes(path, 32)
    # eight bytes give the length of a safetensors header; what another file begins with, read as one, gives a length beyond the file
    if int.from_bytes(head[:8], "little") > size:
        if head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05":
            raise _pickle(path, "a pickle stream")
        if (kind := kind_of(head)) is not None:
            raise _pickle(path, kind) if tensor_format(path) == "torch" else other_kind(path, "safetensors", kind)
    _check_header(path, head, size)
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except SteerError:
        raise
    except Exception as error:  # SafetensorError, and what torch says of a type or a size that it does not have
        raise _truncated(path, size, error) from error


def _check_header(path: Path, head: bytes, size: int) -> None:
    """Raises DamagedFileError for a header that says two things; safetensors takes the later one."""
    end = 8 + int.from_bytes(head[:8], "little")
    if len(head) > 8 and end <= size:
        parse_json(read_bytes(path, end)[8:], f"the header of {path}")


def read_torch(path: Path) -> Any:
    """What a file of torch.save holds: plain containers, numbers, text and dense tensors of real numbers.

    Raises:
        UnsafeFileError: it holds objects of other classes, which could run any code when they are unpickled.
        WrongKindError: it is no such file, or holds sparse, quantised or complex tensors. DamagedFileError: truncated or altered.
    """
    size = size_of(path)
    found = tensor_format(path)
    if found != "torch":
        raise other_kind(path, "a file of torch.save", found or kind_of(read_bytes(path, 32)) or "something else")
    zipped = read_bytes(path, 2) == b"PK"
    if zipped:
        for _ in _parts(path, size):  # reads each part, and compares its checksum
            pass
    with damage_of(path, "a whole file of torch.save"):
        try:
            # mapped, because torch believes what the pickle says of the size of a storage, and would read beyond it
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            raise _pickle_of_classes(path, error) from error
        return _owned(content, path, _Room(max(_ROOM, 4 * size)))


class _Room:
    """Bytes that the tensors of one file may still take; a view of one number can have a shape of any size."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, tensor: Tensor) -> None:
        """Raises ValueError when there is not enough left."""
        self.left -= tensor.numel() * tensor.element_size()
        if self.left < 0:
            raise ValueError(f"a tensor of the shape {list(tensor.shape)}, which is larger than the file")


def _owned(content: Any, path: Path, room: _Room) -> Any:
    """The content with tensors that do not depend on the file any more."""
    if isinstance(content, Tensor):
        if content.layout is not torch.strided or content.is_quantized or content.is_complex() or content.is_meta:
            raise _unusual_tensor(path, content)
        room.take(content)
        return content.detach().clone()
    if isinstance(content, Mapping):
        return {key: _owned(value, path, room) for key, value in content.items()}
    return type(content)(_owned(value, path, room) for value in content) if type(content) in (list, tuple) else content


def read_npy(path: Path) -> Tensor:
    """The array of a `.npy` file. Raises DamagedFileError; UnsafeFileError: pickled objects; WrongKindError: no real numbers."""
    return _array(read_bytes(path), path)


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of a file of numpy.savez, by name. Raises as `read_npy`."""
    return {name.removesuffix(".npy"): _array(data, path) for name, data in _parts(path, size_of(path))}


def _array(data: bytes, path: Path) -> Tensor:
    file = io.BytesIO(data)
    with damage_of(path, "a whole array of numpy"):
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, in_columns, dtype = read_header(file)
        if dtype.hasobject:
            raise _pickle(path, "an array of Python objects", "save an array of numbers")
        if dtype.kind not in "fiub":
            raise other_kind(path, "an array of real numbers", f"an array of {dtype}")
        if min(shape, default=0) < 0:
            raise ValueError(f"the shape {list(shape)}")
        # bounded by the data, whatever the shape says
        flat = np.frombuffer(data, dtype, math.prod(shape), file.tell())
        if file.tell() + flat.nbytes != len(data):
            raise ValueError(f"{len(data)} bytes for the shape {list(shape)} of {dtype}")
        array = flat.reshape(shape, order="F" if in_columns else "C")
        native = np.float64 if dtype.kind == "f" and dtype.itemsize > 8 else dtype.newbyteorder("=")
        return torch.from_numpy(np.array(array, native, order="C"))  # a copy, which may be written to


def _parts(path: Path, size: int) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a zip, which is measured before it is unpacked. Raises DamagedFileError."""
    with damage_of(path, "a whole zip archive"), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two parts of one name")
        with path.open("rb") as file:
            file.seek(-12 - len(archive.comment), io.SEEK_END)
            counted = int.from_bytes(file.read(2), "little")
        if counted not in (len(entries), 0xFFFF):  # which stands for more than two bytes hold
            raise ValueError(f"{len(entries)} parts where {counted} are listed")
        declared = sum(entry.file_size for entry in entries)
        if declared > max(_ROOM, _TIMES * size):
            raise _bomb(path, size, declared)
        for entry in entries:
            yield entry.filename, archive.read(entry)  # compares the checksum


# ---- GGUF


def gguf_package(what: str) -> Any:
    """The package `gguf`. Raises ConfigError when it is missing."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise _no_gguf_package(what) from error


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader` of a file that is proven to hold all that it declares. Raises DamagedFileError, WrongKindError, FileError."""
    size_of(path)
    package = gguf_package(f"cannot read {path}")
    head = read_bytes(path, 32)
    if not head.startswith(b"GGUF") and (kind := kind_of(head)) is not None:
        raise other_kind(path, "a GGUF file", kind)

    class BoundedReader(package.GGUFReader):  # type: ignore[name-defined]
        """The reader of the package returns less than it was asked for at the end of a file, and goes on counting there, up to 2**64."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"something at byte {end} of {len(self.data)}")
            return super()._get(int(offset), dtype, int(count), override_order)

    with damage_of(path, "a whole GGUF file"):
        return BoundedReader(path)


def gguf_tensor(tensor: Any, path: Path) -> Tensor:
    """A tensor of a GGUF file as fp32, flat, whatever its type. Raises WrongKindError for one that the package does not unpack."""
    package = gguf_package(f"cannot read {path}")
    kind = tensor.tensor_type.name
    try:
        return torch.from_numpy(np.array(package.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)).flatten()
    except NotImplementedError as error:
        raise _unknown_quantisation(path, tensor.name, kind) from error
    except (ValueError, IndexError, TypeError) as error:
        raise damaged(path, f"blocks of {kind} in '{tensor.name}'", error) from error


# ---- errors


def _truncated(path: Path, size: int, error: Exception) -> DamagedFileError:
    what = f"{path} is truncated or not safetensors"
    return damaged(path, "a whole safetensors file", f"{size} bytes; {error}", what)


_CONVERT = "convert it where you trust it: torch.load(..., weights_only=True), then safetensors.torch.save_file"


def _pickle(path: Path, found: str, remedy: str = _CONVERT) -> UnsafeFileError:
    what = f"{path} is a pickle, which can run any code when it is opened"
    return UnsafeFileError(what, expected="numbers, as safetensors hold them", found=found, remedy=remedy)


def _pickle_of_classes(path: Path, error: Exception) -> UnsafeFileError | DamagedFileError:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named is None and "Unsupported" not in str(error):
        return damaged(path, "a whole file of torch.save", error)
    return UnsafeFileError(
        f"{path} is a pickle of more than tensors, which can run any code when it is opened",
        expected="tensors, numbers, text, lists and dictionaries",
        found=f"an object of {named[1]}" if named else str(error).split("\n")[0],
        remedy="where you trust it, load it and save its attributes: torch.save(vars(loaded), path)",
    )


def _unusual_tensor(path: Path, tensor: Tensor) -> WrongKindError:
    found = "quantised" if tensor.is_quantized else f"{tensor.dtype}, {tensor.layout}".replace("torch.", "")
    return WrongKindError(
        f"{path} holds a tensor that cannot be used as it is",
        expected="dense tensors of real numbers",
        found=f"one of the shape {list(tensor.shape)}: {found} on {tensor.device}",
        remedy="save tensor.to_dense(), tensor.dequantize() or its real part",
    )


def _bomb(path: Path, size: int, declared: int) -> DamagedFileError:
    return damaged(path, f"parts of at most {max(_ROOM, _TIMES * size)} bytes in all", f"{declared} bytes in a file of {size}")


def _no_gguf_package(what: str) -> ConfigError:
    install = "pip install 'torchsteer[gguf]'"
    return ConfigError(what, expected="the package gguf", found="not installed", remedy=install)


def _unknown_quantisation(path: Path, name: str, kind: str) -> WrongKindError:
    return WrongKindError(
        f"'{name}' of {path} is of a type that cannot be unpacked",
        expected="floating point, or a quantisation that the package gguf unpacks",
        found=kind,
        remedy="upgrade gguf, or write the file again as F32",
    )
