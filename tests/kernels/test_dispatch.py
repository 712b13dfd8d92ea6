"""Dispatch: which path a call takes, and that every call has one."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from steer import kernels
from steer.commands.info import environment
from steer.errors import ConfigError, WidthError
from steer.kernels import dispatch, drift_stats, edit, force, steer_add
from steer.kernels.dispatch import choose_path, wanted

H, U = torch.randn(2, 3, 8), torch.randn(2, 8)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor says that it is there."""
    monkeypatch.setattr("torch.Tensor.is_cuda", property(lambda self: True))


# ---- which path


def test_off_a_gpu_everything_is_pytorch() -> None:
    assert choose_path(H) == choose_path(H, opaque=True) == "aten" and not wanted(torch.empty(1, 256, 4096))


def test_on_a_gpu(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_path(H) == choose_path(H.bfloat16()) == choose_path(torch.nn.Parameter(H)) == "triton"
    assert choose_path(H.double()) == "aten", "no kernel takes fp64"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert (choose_path(H), choose_path(H, opaque=True)) == ("aten", "op")
    monkeypatch.setattr(dispatch, "_has_triton", False)
    assert choose_path(H, opaque=True) == "aten"


def test_operators_ask_for_kernels_where_they_pay(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    few, many = torch.empty(1, 255, 4096, dtype=torch.bfloat16), torch.empty(1, 256, 4096, dtype=torch.bfloat16)
    assert wanted(many) and not wanted(few) and not wanted(many.double())
    with force("aten"):
        assert not wanted(many)
    for name in ("op", "triton"):
        with force(name):
            assert wanted(few)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert wanted(few)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert wanted(few)


def test_what_wants_to_see_operations_gets_them(on_a_gpu: None) -> None:
    class Own(Tensor):
        pass

    seen: list[str] = []

    def note(h: Tensor) -> Tensor:
        seen.append(choose_path(h))
        return h

    note(H.as_subclass(Own))
    torch.func.vmap(note)(H)
    with torch.autograd.forward_ad.dual_level():
        note(torch.autograd.forward_ad.make_dual(H, H))
    with FlopCounterMode(display=False):
        note(H)
    assert seen == ["aten"] * 4 and choose_path(H) == "triton"


@pytest.mark.parametrize("name", ["aten", "op"])
def test_force(name: str) -> None:
    with force(name):
        assert choose_path(H) == name
        with force("auto"):
            assert choose_path(H) == "aten"
        assert choose_path(H) == name
    assert choose_path(H) == "aten"


def test_forced_triton_says_why_it_cannot_run(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with force("triton"):
        assert choose_path(H) == "triton"
        with pytest.raises(ConfigError, match="float64 on cpu"):
            choose_path(H.double())
        with FlopCounterMode(display=False):
            assert choose_path(H) == "op"
        monkeypatch.setattr(dispatch, "_has_triton", False)
        with pytest.raises(ConfigError, match="Triton missing"):
            choose_path(H)


def test_an_unknown_path_is_refused_and_nothing_changes() -> None:
    with pytest.raises(ConfigError, match="one of auto, aten, triton, op"), force("cuda"):
        pass
    assert choose_path(H) == "aten"


def test_the_variable_of_the_environment() -> None:
    code = "import torch; from steer.kernels.dispatch import choose_path; print(choose_path(torch.ones(2, 3, 4)))"
    assert python(code, STEER_KERNELS="op").stdout.split() == ["op"]
    done = python(code, STEER_KERNELS="fast")
    assert done.returncode != 0 and "unknown path 'fast' for kernels" in done.stderr


# ---- without Triton


def test_nothing_needs_triton() -> None:
    """Neither importing nor computing loads it, and where it is missing every function still works."""
    code = """
        import sys
        hide = sys.argv[1:] == ["hide"]
        if hide:
            sys.modules["triton"] = None
            import importlib.util as util
            real = util.find_spec
            util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else real(name, *a)
        import torch, steer
        from steer.kernels import drift_stats, edge_scores, edit, sparse_decode, status, steer_add, topk_encode
        h, u = torch.randn(2, 3, 8).requires_grad_(), torch.randn(2, 8)
        edit(steer_add(h, u[0], preserve_norm=True), u, low=0.0).sum().backward()
        assert drift_stats(h, u, bins=4).histogram.sum() == 12 and h.grad is not None
        sparse_decode(*topk_encode(h, u, None, 1), u).sum().backward()
        assert edge_scores(h, None, h).shape == (3, 3)
        assert not [name for name in sys.modules if name.split(".")[0] == "triton" and sys.modules[name]]
        print(sorted(status()["kernels"]))
    """
    import textwrap

    for argument in ("", "hide"):
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), argument], capture_output=True, text=True)
        assert done.stdout.strip() == "['drift_stats', 'edge_scores', 'edit', 'sparse_decode', 'steer_add', 'topk_encode']", done.stderr


def test_status_names_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.status()["kernels"] == ["drift_stats", "edge_scores", "edit", "sparse_decode", "steer_add", "topk_encode"]
    assert kernels.status()["path"] == "auto"
    with force("aten"):
        assert kernels.status()["path"] == "aten" and "(aten forced)" in environment()["kernels"]
    assert "drift_stats, edge_scores, edit, sparse_decode, steer_add, topk_encode (PyTorch only, " in environment()["kernels"]
    monkeypatch.setattr(kernels.available.importlib.metadata, "version", lambda name: "3.9")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a card")
    assert "drift_stats, edge_scores, edit, sparse_decode, steer_add, topk_encode (Triton)" in environment()["kernels"]
    lines = dict(kernels.KERNELS.table())
    assert all(lines[name] for name in lines)


def test_a_kernel_runs_on_the_device_of_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from steer.kernels.lazy_triton import LazyKernel

    entered: list[Any] = []

    class Device:
        def __init__(self, device: Any) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            pass

    runs: list[dict[str, Any]] = []
    kernel = LazyKernel(lambda: None)
    kernel._jit_function = {(4,): lambda **arguments: runs.append(arguments)}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    for index in (0, 1):
        kernel[(4,)](x_ptr=SimpleNamespace(device=torch.device("cuda", index)), n=7, num_warps=2)
    assert entered == [torch.device("cuda", 1)]
    assert [run.pop("x_ptr").device.index for run in runs] == [0, 1]
    assert runs == [{"n": 7, "num_warps": 2, "enable_fp_fusion": True}] * 2


# ---- arguments that do not fit


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: steer_add(H, torch.ones(9)), WidthError, "the last one 8"),
        (lambda: steer_add(H, torch.ones(1, 1, 8)), WidthError, "steering vectors"),
        (lambda: steer_add(H, U, torch.ones(3)), ConfigError, "strength does not fit"),
        (lambda: steer_add(H, U, torch.ones(3, 1, 1)), ConfigError, "broadcasts to"),
        (lambda: steer_add(H, U, mask=torch.ones(2, 3)), ConfigError, "mask does not fit"),
        (lambda: steer_add(H, U, slots=torch.zeros(3, dtype=torch.long)), ConfigError, "slots do not fit"),
        (lambda: steer_add(H, U, slots=torch.zeros(2)), ConfigError, "whole numbers"),
        (lambda: edit(H, U, U[:1]), ConfigError, "do not pair up"),
        (lambda: edit(H, U, low=torch.zeros(3)), ConfigError, "'low' does not fit"),
        (lambda: edit(H, U[None].expand(2, 2, 8), low=torch.zeros(3, 2)), ConfigError, "differ in slots"),
        (lambda: edit(H, torch.ones(2, 9)), WidthError, "directions to read"),
        (lambda: drift_stats(H, torch.ones(2, 7)), WidthError, "directions to project on"),
        (lambda: drift_stats(H, bins=4), ConfigError, "needs directions"),
        (lambda: drift_stats(H, U, bins=-1), ConfigError, "at least one bin"),
        (lambda: drift_stats(H, U, bins=4, low=1.0), ConfigError, "range of a histogram is empty"),
        (lambda: drift_stats(H, U, bins=4, low=torch.zeros(3)), ConfigError, "does not fit the directions"),
    ],
)
def test_arguments_that_do_not_fit(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()
