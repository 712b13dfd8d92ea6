"""The Triton kernels compile for GPUs that are not there: no spilled register, 128-bit access, rows read once, tensor cores used."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu_targets import SHARED, TARGETS, Compiled, Launch, compiled, launches_of
from torch import Tensor

from steer.kernels.edit_autograd import Edit
from steer.kernels.edit_task import EditNumbers

triton = pytest.importorskip("triton", reason="there is no Triton for this system")
BF16, WIDTH, BATCH, TOKENS = torch.bfloat16, 4096, 4, 2048
PRODUCTS = {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "v_mfma"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled anew, and nothing left in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def module(name: str) -> Any:
    return importlib.import_module(f"steer.kernels.{name}")


def there(*shape: int, dtype: torch.dtype = torch.float32, learns: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=learns)


def states(tokens: int = TOKENS, learns: bool = True) -> Tensor:
    return there(BATCH, tokens, WIDTH, dtype=BF16, learns=learns)


def add(norm: bool) -> None:
    """Rows with their own vectors, which learn."""
    task = (there(8, WIDTH, learns=True), there(BATCH, TOKENS, learns=True), there(BATCH, 1, dtype=torch.int64), norm)
    module("steer_add").SteerAdd.apply(states(), *task).backward(states(learns=False))


def edit(m: int, names: tuple[str, ...], norm: bool = False, tokens: int = TOKENS) -> None:
    bank = there(1, m, WIDTH)
    numbers = [there(1, m) if name in names else None for name in EditNumbers._fields]
    Edit.apply(states(tokens), bank, bank, there(BATCH, tokens), None, *numbers, -1.0, False, False, norm).backward(
        states(tokens, learns=False)
    )


def drift() -> None:
    module("drift_stats").launch(states(learns=False), there(17, WIDTH), there(BATCH, TOKENS), there(17), there(17), 64, True, True)


WAYS = ("forward", "backward")
FEATURES = ("bias", "shift", "threshold")
# what runs -> (name of the kernel, reads and writes of 128 bits of a thread: on NVIDIA, on AMD)
# In bf16 a thread of 8 warps holds 16 numbers of a row of 4,096: 2 reads; in fp32 4. AMD has 64 threads in a warp, so half of both.
CASES: dict[str, tuple[Callable[[], None], list[tuple[str, tuple[int, int], tuple[int, int]]]]] = {
    "add": (lambda: add(False), [("steer_add.forward", (6, 2), (3, 1)), ("weighted_sum.sum", (8, 0), (4, 0))]),
    "add, norm kept": (lambda: add(True), [("steer_add.forward", (6, 2), (3, 1)), ("steer_add.backward", (8, 4), (4, 2))]),
    "clamp, norm kept": (
        lambda: edit(4, ("low", "high"), norm=True),
        [("edit_scalar.forward", (10, 2), (5, 1)), ("edit_scalar.backward", (16, 2), (8, 1))],
    ),
    "16 features, few tokens": (lambda: edit(16, FEATURES, tokens=200), [(f"edit_scalar.{way}", (10, 2), (5, 1)) for way in WAYS]),
    "16 features": (lambda: edit(16, FEATURES), [(f"edit_tiles.{way}", (1, 4), (1, 0)) for way in WAYS]),
    "64 features": (lambda: edit(64, FEATURES), [("edit_tiles.forward", (1, 2), (1, 0))]),
    "256 features": (lambda: edit(256, FEATURES), [("edit_tiles.forward", (1, 1), (1, 0))]),
    "drift": (drift, [("drift_stats.stats", (1, 0), (1, 0)), ("drift_stats.merge", (12, 0), (4, 0))]),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile(case: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if target == "gfx942":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    run, expected = CASES[case]
    launches = launches_of(run)
    assert [one.name for one in launches][: len(expected)] == [name for name, *_ in expected]
    for launch, (name, nvidia, amd) in zip(launches, expected, strict=False):
        made = compiled(launch, target)
        check(launch, made, target)
        tiled = name in ("edit_tiles.forward", "edit_tiles.backward", "drift_stats.stats")
        reads, writes = amd if target == "gfx942" else nvidia
        if tiled:
            assert made.products == PRODUCTS[target] and made.reads >= reads and made.writes >= writes, (name, made)
        elif target == "gfx942":  # its compiler unrolls loops, so there are more
            assert made.reads >= reads and made.writes >= writes, (name, made)
        else:
            assert (made.reads, made.writes) == (reads, writes), (name, "a row is read twice, or not by 128 bits", made)


def check(launch: Launch, made: Compiled, target: str) -> None:
    assert made.spilled == 0 and made.registers <= (512 if target == "gfx942" else 255), (launch.name, made)
    assert made.shared <= SHARED[target], (launch.name, made)
    if launch.name in ("steer_add.forward", "steer_add.backward", "edit_scalar.forward", "edit_scalar.backward"):
        assert made.registers <= 128, "fewer than two programs of 8 warps would find room on a multiprocessor"
    constants = set(re.findall(r"(%\w+) = arith\.constant", made.ttir))
    wide = {name for name, value in re.findall(r"(%\w+) = arith\.constant (\d+) : i32", made.ttir) if int(value) >= 1024}
    for left, right, kind in re.findall(r"arith\.muli (%\w+), (%\w+) : (\S+)", made.ttir):
        assert "i64" in kind or {left, right} & constants, ("a product of two sizes in 32 bits", launch.name, left, right)
        counted = {left, right} & set(re.findall(r"(%\w+) = tt\.get_program_id", made.ttir))
        assert "i64" in kind or not counted or not wide & {left, right}, ("a token times a width in 32 bits", launch.name, left, right)


def test_a_launch_says_what_triton_needs_to_know() -> None:
    """The checks above look at what would really be launched."""
    (launch,) = launches_of(lambda: module("drift_stats").launch(states(learns=False), None, there(1, 1), None, None, 0, False, True))
    assert launch.grid == (BATCH * TOKENS // 64,) and launch.options == {"num_warps": 8, "num_stages": 3}
    assert launch.arguments["h_ptr"].shape == (BATCH, TOKENS, WIDTH) and launch.arguments["directions_ptr"] is None
