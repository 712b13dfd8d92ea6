"""Artifacts: round trips, refusal of everything damaged or unsafe, and nothing lost on a full disk or in a crash."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from processes import FORK, ended, started
from safetensors.torch import save, save_file

from steer import files
from steer.errors import (
    ConfigError,
    DamagedFileError,
    FileError,
    NonFiniteError,
    SteerError,
    StorageFullError,
    UnsafeFileError,
    WrongKindError,
)

FORMS = pytest.mark.parametrize("name", ["artifact.safetensors", "artifact"])
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2, 3])}
MANIFEST = {"site": "layers.1.output", "metrics": {"auc": 0.5, "n": 3}, "list": [1, "two", None, True]}


def assert_holds(path: Path, tensors: dict[str, torch.Tensor], manifest: dict) -> None:
    loaded_manifest, loaded = files.load_artifact(path, "direction")
    assert loaded_manifest == manifest
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def leftovers(folder: Path) -> list[str]:
    return [entry for entry in os.listdir(folder) if entry.startswith(".")]


def tensor_file(path: Path) -> Path:
    return path / "tensors.safetensors" if path.is_dir() else path


# ---- round trips


@FORMS
def test_round_trip_and_overwrite(tmp_path, name):
    path = tmp_path / "new" / "parents" / name
    assert files.save_artifact(path, "direction", TENSORS, MANIFEST) == path
    assert path.is_dir() == (name == "artifact")
    assert_holds(path, TENSORS, MANIFEST)
    files.save_artifact(path, "direction", {"c": torch.ones(1)}, {"second": True})
    assert_holds(path, {"c": torch.ones(1)}, {"second": True})
    assert leftovers(path.parent) == []


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool, torch.complex64]


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_to_the_bit(tmp_path, name, dtype):
    tensors = {"x": torch.tensor([[0, 1], [1, 0]]).to(dtype), "empty": torch.zeros(0, 3).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    files.save_artifact(tmp_path / name, "direction", tensors, {})
    _, loaded = files.load_artifact(tmp_path / name, "direction")
    for key, tensor in tensors.items():
        assert loaded[key].dtype == dtype and loaded[key].shape == tensor.shape
        assert torch.equal(loaded[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@FORMS
def test_views_shared_memory_and_gradients_are_stored_plainly(tmp_path, name):
    base = torch.randn(4, 6, requires_grad=True)
    tensors = {"transposed": base.T, "slice": base[1:3, ::2], "same": base, "again": base}
    files.save_artifact(tmp_path / name, "direction", tensors, {})
    assert_holds(tmp_path / name, {key: value.detach() for key, value in tensors.items()}, {})


_TEXT = st.text(st.characters(codec="utf-8"))
_SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT
_JSON = st.recursive(_SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3), max_leaves=6)


@given(st.dictionaries(_TEXT.filter(lambda key: key not in files._RESERVED), _JSON, max_size=4))
def test_any_json_manifest_comes_back(tmp_path_factory, manifest):
    folder = tmp_path_factory.mktemp("manifest")
    for name in ("one.safetensors", "folder"):
        files.save_artifact(folder / name, "direction", {}, manifest)
        assert files.load_artifact(folder / name, "direction") == (manifest, {})


def test_manifest_file_is_readable_and_says_where_it_comes_from(tmp_path):
    files.save_artifact(tmp_path / "a", "direction", TENSORS, MANIFEST)
    full = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (full["schema"], full["kind"], full["site"]) == (files.SCHEMA, "direction", "layers.1.output")
    assert full["library"] and full["sha256"] == files.tensor_hash(TENSORS)


def test_hash_depends_on_name_dtype_shape_and_bytes():
    zero = torch.zeros(2, 3)
    variants = [{"a": zero}, {"b": zero}, {"a": zero.int()}, {"a": zero.reshape(3, 2)}, {"a": zero + 1}, {"a": zero, "b": zero}, {}]
    assert len({files.tensor_hash(variant) for variant in variants}) == len(variants)


# ---- bad input


@FORMS
def test_truncated_at_any_length(tmp_path, name):
    path = files.save_artifact(tmp_path / name, "direction", TENSORS, MANIFEST)
    victim = tensor_file(path)
    content = victim.read_bytes()
    for length in {0, 1, 7, 8, 9, 40, len(content) // 2, len(content) - 1}:
        victim.write_bytes(content[:length])
        with pytest.raises(DamagedFileError):
            files.load_artifact(path, "direction")


@FORMS
def test_an_altered_tensor_is_found(tmp_path, name):
    path = files.save_artifact(tmp_path / name, "direction", TENSORS, MANIFEST)
    victim = tensor_file(path)
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(DamagedFileError, match="altered") as caught:
        files.load_artifact(path, "direction")
    assert files.tensor_hash(TENSORS) in str(caught.value)


@pytest.mark.parametrize("missing", ["manifest.json", "tensors.safetensors"])
def test_missing_part_is_named(tmp_path, missing):
    path = files.save_artifact(tmp_path / "a", "direction", TENSORS, MANIFEST)
    (path / missing).unlink()
    with pytest.raises(DamagedFileError, match=missing):
        files.load_artifact(path, "direction")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"schema": "one"}'])
def test_broken_manifest(tmp_path, text):
    path = files.save_artifact(tmp_path / "a", "direction", TENSORS, MANIFEST)
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(DamagedFileError, match="manifest"):
        files.load_artifact(path, "direction")


def test_broken_manifest_in_the_metadata(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", {"steer": "{"})
    with pytest.raises(DamagedFileError, match="manifest"):
        files.load_artifact(tmp_path / "a.safetensors", "direction")


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 2", "protocol 5"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_pickle_is_refused_and_never_run(tmp_path, form, folder):
    if folder:
        path = files.save_artifact(tmp_path / "a", "direction", TENSORS, MANIFEST)
    else:
        path = tmp_path / "a.safetensors"
    victim, trap = tensor_file(path), _Trap(tmp_path / "sprung")
    if form in ("zip", "legacy"):
        torch.save({"trap": trap}, victim, _use_new_zipfile_serialization=form == "zip")
    else:
        victim.write_bytes(pickle.dumps({"trap": trap}, protocol=int(form[-1])))
    with pytest.raises(UnsafeFileError, match="pickle") as caught:
        files.load_artifact(path, "direction")
    assert "safetensors" in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_a_header_length_that_looks_like_a_pickle_is_not_one(tmp_path):
    """0x80 0x02 starts a pickle, and a safetensors file whose header is 640 bytes long."""
    for padding in range(700):
        full = {"schema": 1, "kind": "direction", "sha256": files.tensor_hash(TENSORS), "p": "x" * padding}
        content = save(TENSORS, {"steer": json.dumps(full)})
        if content[:2] == b"\x80\x02":
            break
    (tmp_path / "a.safetensors").write_bytes(content)
    assert content[:2] == b"\x80\x02"
    assert files.load_artifact(tmp_path / "a.safetensors", "direction")[0] == {"p": "x" * padding}


@FORMS
def test_another_kind(tmp_path, name):
    path = files.save_artifact(tmp_path / name, "plan", TENSORS, MANIFEST)
    with pytest.raises(WrongKindError) as caught:
        files.load_artifact(path, "direction")
    assert (caught.value.expected, caught.value.found) == ("direction", "plan")


def test_a_newer_schema(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SCHEMA", 2)
    path = files.save_artifact(tmp_path / "a", "direction", TENSORS, MANIFEST)
    monkeypatch.setattr(files, "SCHEMA", 1)
    with pytest.raises(WrongKindError, match="upgrade"):
        files.load_artifact(path, "direction")


def test_safetensors_of_another_origin(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(WrongKindError, match="not written by steer"):
        files.load_artifact(tmp_path / "a.safetensors", "direction")


def test_nothing_there(tmp_path):
    with pytest.raises(FileError, match="no file or folder"):
        files.load_artifact(tmp_path / "a", "direction")


@FORMS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_tensor_is_named_on_save_and_on_load(tmp_path, name, bad, monkeypatch):
    tensors = {"good": torch.ones(2), "bad one": torch.tensor([0.0, bad, bad])}
    with pytest.raises(NonFiniteError, match="'bad one'.*\n.*\n.*2 of 3"):
        files.save_artifact(tmp_path / name, "direction", tensors, {})
    assert os.listdir(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setattr(files, "_check_finite", lambda *_: None)
        files.save_artifact(tmp_path / name, "direction", tensors, {})
    with pytest.raises(NonFiniteError, match="'bad one'"):
        files.load_artifact(tmp_path / name, "direction")


@pytest.mark.parametrize(
    ("manifest", "error", "match"),
    [
        ({"kind": "x"}, ConfigError, "reserved"),
        ({"a": {"b": [0.0, float("nan")]}}, NonFiniteError, r"manifest\.a\.b\[1\]"),
        ({"a": {1: 2}}, ConfigError, r"key 1 of manifest\.a"),
        ({"a": torch.ones(1)}, ConfigError, r"manifest\.a"),
    ],
)
def test_manifest_that_json_cannot_hold(tmp_path, manifest, error, match):
    with pytest.raises(error, match=match):
        files.save_artifact(tmp_path / "a", "direction", TENSORS, manifest)
    assert os.listdir(tmp_path) == []


# ---- nothing is lost


def test_a_folder_with_other_things_is_not_replaced(tmp_path):
    path = tmp_path / "outputs"
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(WrongKindError, match=r"(?s)would delete.*thesis\.txt"):
        files.save_artifact(path, "direction", TENSORS, MANIFEST)
    assert (path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(WrongKindError, match="(?s)would delete.*a file"):
        files.save_artifact(path / "thesis.txt", "direction", TENSORS, MANIFEST)
    assert (path / "thesis.txt").read_text() == "years of work"


def test_a_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(WrongKindError, match="is a folder"):
        files.save_artifact(tmp_path / "a.safetensors", "direction", TENSORS, MANIFEST)


@FORMS
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_keeps_the_old_and_removes_the_temporary(tmp_path, name, code, monkeypatch):
    path = files.save_artifact(tmp_path / name, "direction", TENSORS, MANIFEST)

    def full(_handle: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFullError, match=r"(?s)no room.*\d+ bytes.*\d+ bytes free") as caught:
            files.save_artifact(path, "direction", {"other": torch.zeros(1000)}, {})
    assert isinstance(caught.value, OSError) and caught.value.errno == code
    assert os.listdir(tmp_path) == [name]
    assert_holds(path, TENSORS, MANIFEST)


@FORMS
def test_a_path_in_the_home_folder(tmp_path, name, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path = files.save_artifact(f"~/{name}", "direction", TENSORS, MANIFEST)
    assert path == tmp_path / "home" / name and os.listdir(tmp_path) == ["home"]
    assert_holds(f"~/{name}", TENSORS, MANIFEST)
    assert_holds(Path("~") / name, TENSORS, MANIFEST)


@pytest.mark.parametrize("path", [None, 3, ["a"], b"a"])
def test_what_is_no_path(path):
    for call in (
        lambda: files.save_artifact(path, "direction", TENSORS, MANIFEST),
        lambda: files.load_artifact(path, "direction"),
        lambda: files.read_safetensors(path),
        lambda: files.atomic_write(path, "text"),
    ):
        with pytest.raises(ConfigError, match="wrong type"):
            call()


@FORMS
def test_a_really_full_file_system(tmp_path, name):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        path = files.save_artifact(disk / name, "direction", TENSORS, MANIFEST)
        with pytest.raises(StorageFullError) as caught:
            files.save_artifact(path, "direction", {"large": torch.zeros(100_000)}, {})
        assert str(caught.value.expected).startswith("400")
        assert os.listdir(disk) == [name]
        assert_holds(path, TENSORS, MANIFEST)
        with pytest.raises(StorageFullError):
            files.atomic_write(disk / "small.json", "x" * 300_000)
        assert os.listdir(disk) == [name]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("killed_at", range(9))
def test_a_crash_during_a_folder_swap_leaves_the_old_or_the_new(tmp_path, killed_at, monkeypatch):
    """A kill runs no clean-up, so every call that changes a name fails from the given one on."""
    path = files.save_artifact(tmp_path / "a", "direction", TENSORS, MANIFEST)
    calls = 0

    def mortal(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > killed_at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "rename"), (os, "fsync"), (shutil, "rmtree")):
            patch.setattr(module, name, mortal(getattr(module, name)))
        with pytest.raises(KeyboardInterrupt):
            files.save_artifact(path, "direction", {"new": torch.ones(2)}, {"new": True})
    manifest, _ = files.load_artifact(path, "direction")
    assert manifest in (MANIFEST, {"new": True})
    files.save_artifact(path, "direction", {"third": torch.ones(2)}, {"third": True})
    assert_holds(path, {"third": torch.ones(2)}, {"third": True})
    assert not (tmp_path / ".a.previous").exists()


def test_the_old_folder_is_found_between_the_two_renames(tmp_path):
    path = files.save_artifact(tmp_path / "a", "direction", TENSORS, MANIFEST)
    path.rename(tmp_path / ".a.previous")
    assert_holds(path, TENSORS, MANIFEST)
    with pytest.raises(NonFiniteError):  # a save that fails must not lose it either
        files.save_artifact(path, "direction", {"x": torch.tensor(float("nan"))}, {})
    assert_holds(path, TENSORS, MANIFEST)


def save_and_hang(path, is_writing):
    def stop(handle):
        is_writing.set()
        time.sleep(600)

    os.fsync = stop
    files.save_artifact(path, "direction", {"a": torch.ones(2)}, {"child": True})


@FORMS
@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="needs locks")
def test_what_a_killed_save_left_behind_goes_with_the_next(tmp_path, name):
    path = tmp_path / name
    are_writing = [FORK.Event() for _ in range(2)]
    children = [started(save_and_hang, path, is_writing) for is_writing in are_writing]
    try:
        assert all(is_writing.wait(60) for is_writing in are_writing)
        assert len(leftovers(tmp_path)) == 2
        children[0].kill()
        children[0].join()
        files.save_artifact(tmp_path / f"{name}.other.safetensors", "direction", TENSORS, MANIFEST)
        assert len(leftovers(tmp_path)) == 2  # another file's
        files.save_artifact(path, "direction", TENSORS, MANIFEST)
        assert len(leftovers(tmp_path)) == 1  # the other child is alive
        assert_holds(path, TENSORS, MANIFEST)
    finally:
        ended(children, timeout=0)
    files.save_artifact(path, "direction", TENSORS, MANIFEST)
    assert leftovers(tmp_path) == []


# ---- the seal


@FORMS
def test_no_changed_bit_of_a_manifest_goes_unseen(tmp_path, name):
    path = files.save_artifact(tmp_path / name, "direction", TENSORS, {"strength": 1.5, "metrics": {"auc": 0.9}, "seed": 3})
    victim = path / "manifest.json" if path.is_dir() else path
    content = victim.read_bytes()
    start = 0 if path.is_dir() else content.index(b'"steer"')
    original = files.load_artifact(path, "direction")[0]
    seen = 0
    for position in range(start, start + 330 if path.is_dir() else content.index(b"}}") + 20):
        for bit in (0, 2, 5):
            changed = bytearray(content)
            changed[position % len(content)] ^= 1 << bit
            victim.write_bytes(changed)
            try:
                assert files.load_artifact(path, "direction")[0] == original
            except SteerError:
                seen += 1
    assert seen > 500


@pytest.mark.parametrize("schema", [1, 2])
def test_only_old_files_have_no_seal(tmp_path, schema):
    path = files.save_artifact(tmp_path / "a", "direction", TENSORS, MANIFEST)
    full = json.loads((path / "manifest.json").read_text())
    assert full.pop(files.SEAL)
    (path / "manifest.json").write_text(json.dumps({**full, "schema": schema, "site": "another"}))
    if schema == 1:
        assert files.load_artifact(path, "direction")[0]["site"] == "another"
    else:
        with pytest.raises(DamagedFileError, match="contents(.|\n)*sha256 in the file"):
            files.load_artifact(path, "direction")


# ---- no files at all


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("part", ["manifest.json", "tensors.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "loop", "folder"])
def test_a_part_that_is_no_file_is_refused_at_once(tmp_path, part, kind):
    path = files.save_artifact(tmp_path / "a", "direction", TENSORS, MANIFEST)
    (path / part).unlink()
    if kind == "fifo":
        os.mkfifo(path / part)
    elif kind == "folder":
        (path / part).mkdir()
    else:
        (path / part).symlink_to(kind if kind[0] == "/" else path / part)
    with pytest.raises(FileError) as caught:
        files.load_artifact(path, "direction")
    assert part in str(caught.value)


def test_files_of_other_kinds_are_named(tmp_path):
    for head, kind in ((b"GGUF", "a GGUF file"), (b"\x93NUMPY", "numpy"), (b"SQLite format 3", "SQLite"), (b"<!DOCTYPE html>", "web page")):
        (tmp_path / "a.safetensors").write_bytes(head + b" " * 100)
        with pytest.raises(WrongKindError, match=kind):
            files.load_artifact(tmp_path / "a.safetensors", "direction")


# ---- small files


def test_atomic_write(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    assert files.atomic_write(path, "één") == path
    assert path.read_text(encoding="utf-8") == "één"
    files.atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["metrics.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_write_where_writing_is_impossible(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        files.atomic_write(tmp_path / "file" / "below", "x")


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_one_number_whose_stride_is_0(tmp_path):
    value = torch.tensor(2.5).expand(1, 1)
    files.save_artifact(tmp_path / "one", "plan", {"value": value}, {})
    assert torch.equal(files.load_artifact(tmp_path / "one", "plan")[1]["value"], value)
    assert files.tensor_hash({"value": value}) == files.tensor_hash({"value": torch.tensor([[2.5]])})
