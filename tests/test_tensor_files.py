"""Tensors out of hostile files: what a file says of its sizes is measured first, and nothing waits, unpickles or reads beyond the end."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import steer
from steer import reading, tensor_files
from steer.drift import DriftStore
from steer.errors import DamagedFileError, FileError, NonFiniteError, UnsafeFileError, WrongKindError


def rezipped(path: Path, change, compression=zipfile.ZIP_STORED) -> Path:
    """The same zip with changed parts and correct checksums. change: name and content -> content."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))
    return path


def torch_file(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# ---- torch.save


def test_tensors_come_back_and_do_not_depend_on_the_file(tmp_path):
    content = {"a": torch.arange(6.0).reshape(2, 3), "b": [torch.ones(2).bfloat16(), 3, "x"], 4: (torch.tensor(True),)}
    for old in (False, True):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
        loaded = tensor_files.read_torch(tmp_path / "a.pt")
        (tmp_path / "a.pt").write_bytes(bytes((tmp_path / "a.pt").stat().st_size))
        assert torch.equal(loaded["a"], content["a"]) and torch.equal(loaded["b"][0], content["b"][0]) and loaded["b"][1:] == [3, "x"]
        assert loaded[4][0].item() is True


@pytest.mark.parametrize("size", [4, 10**4, 2**40])
def test_a_storage_that_says_it_is_larger_than_it_is(tmp_path, size):
    """The number stands in the pickle; torch alone would read beyond the end of the part, or of the memory."""
    path = torch_file(tmp_path / "a.pt", torch.arange(2.0))

    def change(name, content):
        if not name.endswith("data.pkl"):
            return content
        number = b"K" + bytes([size]) if size < 256 else b"\x8a\x08" + struct.pack("<q", size)
        shape = content.replace(b"cpuq\x04K\x02t", b"cpuq\x04" + number + b"t")
        assert shape != content
        return shape.replace(b"QK\x00K\x02\x85", b"QK\x00" + number + b"\x85")

    try:
        loaded = tensor_files.read_torch(rezipped(path, change))
    except DamagedFileError:
        return
    assert loaded.numel() * 4 <= path.stat().st_size


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (torch.eye(4).to_sparse(), WrongKindError),
        (torch.eye(4).to_sparse_csr(), WrongKindError),
        (torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), WrongKindError),
        ({"a": [torch.ones(3, dtype=torch.complex64)]}, WrongKindError),
        (torch.ones(3, device="meta"), WrongKindError),
        (torch.zeros(1).expand(10**12), DamagedFileError),
        ([torch.zeros(1).expand(2**23) for _ in range(9)], DamagedFileError),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_numbers(tmp_path, content, error):
    with pytest.raises(error):
        tensor_files.read_torch(torch_file(tmp_path / "a.pt", content))


def test_a_zip_that_inflates_is_not_unpacked(tmp_path):
    path = torch_file(tmp_path / "a.pt", torch.arange(2.0))
    rezipped(path, lambda name, content: bytes(2**27) if name.endswith("data/0") else content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2 * 2**20
    with pytest.raises(DamagedFileError, match=r"found: \d+ bytes in a file of"):
        tensor_files.read_torch(path)
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(2**25, np.float32))
    with pytest.raises(DamagedFileError, match="bytes in a file of"):
        tensor_files.read_npz(tmp_path / "a.npz")


def test_a_changed_number_is_seen_by_its_checksum(tmp_path):
    path = torch_file(tmp_path / "a.pt", torch.arange(2.0))
    content = path.read_bytes()
    position = content.index(struct.pack("<f", 1.0))
    path.write_bytes(content[:position] + struct.pack("<f", 2.0) + content[position + 4 :])
    with pytest.raises(DamagedFileError, match="CRC"):
        tensor_files.read_torch(path)


# ---- numpy


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "g", "<i4", "u1", "?"])
def test_arrays_of_every_number(tmp_path, dtype):
    array = np.asfortranarray(np.arange(6).reshape(2, 3).astype(dtype))
    np.save(tmp_path / "a.npy", array)
    assert tensor_files.read_npy(tmp_path / "a.npy").double().tolist() == array.astype(float).tolist()


def test_arrays_that_are_no_numbers_or_say_they_are_larger(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(UnsafeFileError):
        tensor_files.read_npy(path)
    for array in (np.array(["text"]), np.ones(3, complex), np.zeros(2, [("a", "f4")])):
        np.save(path, array)
        with pytest.raises(WrongKindError):
            tensor_files.read_npy(path)
    np.save(path, np.ones(8, np.float32))
    content = path.read_bytes()
    for shape in (b"(10**9,)", b"(9999999999999,)", b"(7,)", b"(-8,)", b"(99999999, 99999999999,)"):
        path.write_bytes(content.replace(b"(8,), }" + b" " * (len(shape) - 4), shape + b", }"))
        with pytest.raises(DamagedFileError):
            tensor_files.read_npy(path)


# ---- GGUF


@pytest.mark.parametrize("number", [2**16, 2**62])
def test_a_gguf_array_that_says_it_goes_on(tmp_path, number):
    """The package would count to that number at the end of the file."""
    text = b"general.x"
    entry = struct.pack("<Q", len(text)) + text + struct.pack("<IIQ", 9, 6, number)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + bytes(16))
    with pytest.raises(DamagedFileError, match="byte"):
        tensor_files.open_gguf(tmp_path / "a.gguf")


def test_a_gguf_type_that_nobody_unpacks(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "controlvector")
    writer.add_tensor("direction.1", np.zeros(256, np.uint8), raw_shape=[256], raw_dtype=gguf.GGMLQuantizationType.I8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    [tensor] = tensor_files.open_gguf(tmp_path / "a.gguf").tensors
    with pytest.raises(WrongKindError, match="I8"):
        tensor_files.gguf_tensor(tensor, tmp_path / "a.gguf")


# ---- no files, and JSON


READERS = [tensor_files.read_torch, tensor_files.read_npy, tensor_files.read_npz, tensor_files.open_gguf, tensor_files.read_safetensors]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("read", [*READERS, tensor_files.tensor_format, reading.read_json])
def test_what_is_no_file_is_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileError) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_a_file_larger_than_memory_is_not_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**42)
    for read in (*READERS, reading.read_json):
        with pytest.raises(DamagedFileError, match="fits into memory"):
            read(tmp_path / "sparse")


@pytest.mark.parametrize(
    "content", [b"", b"text\n", b"\x00" * 100, b"PK\x03\x04", b"\x80\x02", b"GGUF", b"\x93NUMPY\x01\x00", pickle.dumps([1])]
)
@pytest.mark.parametrize("read", READERS)
def test_a_few_bytes_of_anything(tmp_path, read, content):
    (tmp_path / "a").write_bytes(content)
    if read is tensor_files.read_torch and content == pickle.dumps([1]):
        return  # which is what torch.save once began with
    with pytest.raises(FileError):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"a": 1, "a": 2}', DamagedFileError),
        ('{"b": {"a": 1, "a": 1}}', DamagedFileError),
        ("[" * 100_000, DamagedFileError),
        ('{"a":' * 100_000, DamagedFileError),
        ('{"a": NaN}', NonFiniteError),
        ("[1e999]", NonFiniteError),
        (f"[{10**400}]", NonFiniteError),
        (f"[{'9' * 5000}]", NonFiniteError),
        (b"\xff\xfe\x00", DamagedFileError),
    ],
)
def test_json_that_says_two_things_or_none(text, error):
    with pytest.raises(error):
        reading.parse_json(text, "'file'")


def test_json_comes_back():
    content = {"a": [1, -2.5, True, None, "\ud800", 2**70], "b": {"a": {}}}
    assert reading.parse_json(json.dumps(content), "'file'") == content


# ---- names and headers


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
@pytest.mark.parametrize(
    "use",
    [
        lambda path: steer.import_directions(path, site="layers.1.output"),
        lambda path: steer.Plan.load(path),
        lambda path: steer.Plan(steer.Intervention(steer.Add(torch.ones(2)), "layers.1.output")).save(path),
        lambda path: DriftStore(path),
        lambda path: steer.load(path),
    ],
    ids=["import", "load", "save", "store", "model"],
)
def test_names_that_no_file_can_have(name, use, tmp_path):
    with pytest.raises(FileError):
        use(f"{tmp_path}/{name}")


def test_a_header_that_names_a_tensor_twice(tmp_path):
    entry = '"v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    header = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "twice.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(DamagedFileError, match="'v' twice"):
        tensor_files.read_safetensors(tmp_path / "twice.safetensors")
