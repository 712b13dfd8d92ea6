"""The Triton kernels compile for GPUs that are not there: no spilled register, 128-bit access, rows read once, tensor cores used."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_targets import SHARED, TARGETS, Compiled, Launch, compilations, compiled, launches_of, recorded
from torch import Tensor

from steer.kernels.edit_autograd import Edit
from steer.kernels.edit_task import EditNumbers

triton = pytest.importorskip("triton", reason="there is no Triton for this system")
BF16, WIDTH, BATCH, TOKENS = torch.bfloat16, 4096, 4, 2048
SPILLED_OF_SEVERAL = 32  # bytes of a thread
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PRODUCTS = {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "v_mfma"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles anew and leaves nothing in the user's folder."""
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
    """Adds a learned vector of its own to each row."""
    task = (there(8, WIDTH, learns=True), there(BATCH, TOKENS, learns=True), there(BATCH, 1, dtype=torch.int64), norm)
    module("steer_add").SteerAdd.apply(states(), *task).backward(states(learns=False))


def edit(m: int, names: tuple[str, ...], norm: bool = False, tokens: int = TOKENS) -> None:
    bank = there(1, m, WIDTH)
    numbers = [there(1, m) if name in names else None for name in EditNumbers._fields]
    Edit.apply(states(tokens), bank, bank, there(BATCH, tokens), None, *numbers, -1.0, False, False, norm).backward(
        states(tokens, learns=False)
    )


def drift(tokens: int = TOKENS, k: int = 17) -> None:
    weight, ends = there(BATCH, tokens), there(k)
    module("drift_stats").launch(states(tokens, learns=False), there(k, WIDTH), weight, ends, ends, 64, True, True)


def sparse(k: int = 64, features: int = 65536) -> None:
    """Decodes k features of each token; all is learned."""
    indices = there(BATCH * TOKENS, k, dtype=torch.int64)
    pattern = importlib.import_module("steer.kernels.sparse_pattern").SparsePattern.of_rows(indices, features)
    decode, weight, values = module("sparse_decode"), there(features, WIDTH, dtype=BF16), there(BATCH * TOKENS * k)
    decode.launch_gather_sum(weight, values, pattern.feature, None, there(BATCH * TOKENS + 1, dtype=torch.int64))
    decode.launch_entries(pattern, there(BATCH * TOKENS, WIDTH), weight)
    starts = there(features + 1, dtype=torch.int64)
    decode.launch_gather_sum(there(BATCH * TOKENS, WIDTH), values, pattern.token, pattern.feature, starts)


def merge(k: int) -> None:
    encode = module("topk_encode")
    old = encode.TopFeatures(there(TOKENS, k), there(TOKENS, k, dtype=torch.int64))
    encode.launch_merge(there(TOKENS, encode.TILE_SIZE), old, encode.TILE_SIZE, k)


def edges(heads: int, readers: int, dtype: torch.dtype = BF16) -> None:
    """Scores of a pair of layers."""
    dz, w_o = there(TOKENS, heads, 128, dtype=dtype), there(WIDTH, heads * 128, dtype=dtype)
    file = module("edge_scores")
    file.launch(dz, w_o, there(TOKENS, readers, WIDTH, dtype=dtype), file.MAX_BYTES)


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
    "drift, few tokens": (lambda: drift(512), [("drift_stats.stats", (1, 0), (1, 0))]),
    "drift, 64 directions": (lambda: drift(k=64), [("drift_stats.stats", (1, 0), (1, 0))]),
    "sparse decode": (
        sparse,
        [
            ("sparse_decode.gather_sum", (4, 1), (2, 0)),
            ("sparse_decode.entries", (12, 0), (6, 0)),
            ("sparse_decode.gather_sum", (8, 1), (4, 0)),
        ],
    ),
    "edges": (lambda: edges(32, 48), [("edge_scores.contract", (28, 4), (14, 0))]),
    "edges of many heads": (lambda: edges(64, 80), [("edge_scores.contract", (64, 16), (32, 0))]),
    "edges in fp32": (lambda: edges(32, 48, torch.float32), [("edge_scores.contract", (22, 4), (11, 0))]),
    "top 64": (lambda: merge(64), [("topk_encode.merge", (4, 0), (2, 0))]),
    "top 1,024": (lambda: merge(1024), [("topk_encode.merge", (4, 0), (2, 0))]),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile(case: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if target == "gfx942":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    run, expected = CASES[case]
    launches = launches_of(run)
    assert [launch.name for launch in launches][: len(expected)] == [name for name, *_ in expected]
    for launch, (name, nvidia, amd) in zip(launches, expected, strict=False):
        binary = compiled(launch, target)
        check(launch, binary, target)
        tiled = name in ("edit_tiles.forward", "edit_tiles.backward", "drift_stats.stats", "edge_scores.contract")
        tiled = tiled and case != "edges in fp32"  # which are exact, and so not for tensor cores
        reads, writes = amd if target == "gfx942" else nvidia
        if tiled:
            rows = launch.arguments.get("TILE_SIZE", launch.arguments.get("BLOCK_READERS"))
            products = "mma.sync" if target == "sm_90" and rows < 64 else PRODUCTS[target]  # wgmma takes 64 rows
            assert binary.products == products and binary.reads >= reads and binary.writes >= writes, (name, binary)
        elif target == "gfx942":  # its compiler unrolls loops, so there are more
            assert binary.reads >= reads and binary.writes >= writes, (name, binary)
        else:
            assert (binary.reads, binary.writes) == (reads, writes), (name, "a row is read twice, or not by 128 bits", binary)


def check(launch: Launch, binary: Compiled, target: str) -> None:
    assert binary.spilled == 0 and binary.registers <= (512 if target == "gfx942" else 255), (launch.name, binary)
    assert binary.shared <= SHARED[target], (launch.name, binary)
    if launch.name in ("steer_add.forward", "steer_add.backward", "edit_scalar.forward", "edit_scalar.backward"):
        assert binary.registers <= 128, "fewer than two programs of 8 warps would find room on a multiprocessor"
    constants = set(re.findall(r"(%\w+) = arith\.constant", binary.ttir))
    wide = {name for name, value in re.findall(r"(%\w+) = arith\.constant (\d+) : i32", binary.ttir) if int(value) >= 1024}
    for left, right, kind in re.findall(r"arith\.muli (%\w+), (%\w+) : (\S+)", binary.ttir):
        assert "i64" in kind or {left, right} & constants, ("a product of two sizes in 32 bits", launch.name, left, right)
        counted = {left, right} & set(re.findall(r"(%\w+) = tt\.get_program_id", binary.ttir))
        assert "i64" in kind or not counted or not wide & {left, right}, ("a token times a width in 32 bits", launch.name, left, right)


# ---- launch parameters that benchmarks/gpu.py sweeps


@pytest.fixture
def gpu_sweep(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_sweep")


def launches_of_variant(gpu_sweep: Any, width: int, tokens: int) -> list[tuple[Any, list[Launch]]]:
    """Launches of every variant for one row of tokens."""
    bank = gpu_sweep.Bank(there(16, width), there(16, width), there(16))
    h = there(1, tokens, width, dtype=BF16)
    return [(variant, launches_of(lambda variant=variant: variant.run(h, h))) for variant in gpu_sweep.variants(bank, tokens)]


@pytest.mark.parametrize("width", [4096, 8192])
def test_launch_parameters_of_the_sweep_spill_next_to_nothing(width: int, gpu_sweep: Any) -> None:
    """For a H200. Tiles are compiled at one width, since a program holds as many columns at any other."""
    names = set()
    for variant, launches in launches_of_variant(gpu_sweep, width, 8192):
        if width == 4096 or "scalar" in variant.kernel:
            binary = compiled(launches[0], "sm_90")
            fits(launches[0], binary)
            names.add((launches[0].name, str(variant.parameters)))
    assert len(names) == {4096: 12 + 3 + 2, 8192: 2}[width]


def fits(launch: Launch, binary: Compiled) -> None:
    """No spilled register, but for a few bytes where several tokens fill the registers and the card has to say whether that pays."""
    allowed = SPILLED_OF_SEVERAL if launch.name.startswith("edit_scalar") and launch.arguments["TILE_SIZE"] > 1 else 0
    assert binary.spilled <= allowed and binary.shared <= SHARED["sm_90"], (launch.name, launch.arguments, binary)


def test_backward_kernels_take_the_same_launch_parameters(gpu_sweep: Any) -> None:
    """They are not swept, but a new default would be theirs too."""
    tiles, scalar = module("edit_tiles"), module("edit_scalar")
    bank = gpu_sweep.Bank(there(16, WIDTH), there(16, WIDTH), there(16))
    many, few = gpu_sweep.clamp(bank, 16), gpu_sweep.clamp(bank, 4)
    g, p = there(1, 8192, WIDTH, dtype=BF16), there(1, 8192, 16)
    with recorded() as launches:
        for parameters in gpu_sweep.TILES:
            if parameters.reverse:
                tiles.launch_backward(g, many, p, None, g, p, parameters)
        for tile_size in gpu_sweep.SCALAR_TILES[WIDTH]:
            parameters = scalar.ScalarLaunch(tile_size, scalar.warps_for(tile_size * WIDTH))
            scalar.launch_backward(g, None, few, p, None, g, p, None, parameters)
    assert len(launches) == 6 + 3
    for launch in launches:
        fits(launch, compiled(launch, "sm_90"))


def test_the_sweep_compiles_few_kernels_and_tries_the_defaults(gpu_sweep: Any) -> None:
    launches = []
    for width in gpu_sweep.WIDTHS:
        for tokens in gpu_sweep.TOKENS:
            rows = launches_of_variant(gpu_sweep, width, tokens)
            launches += [launch for _, recorded in rows for launch in recorded]
            assert [variant.kernel.split()[0] for variant, _ in rows if variant.is_default] == ["edit_tiles", "edit_scalar", "drift_stats"]
    assert 30 <= len(compilations(launches)) <= 40


def test_a_launch_says_what_triton_needs_to_know() -> None:
    """The checks above look at what would really be launched."""
    (launch,) = launches_of(lambda: module("drift_stats").launch(states(learns=False), None, there(1, 1), None, None, 0, False, True))
    assert launch.grid == (BATCH * TOKENS // 64,) and launch.options == {"num_warps": 8, "num_stages": 3}
    assert launch.arguments["h_ptr"].shape == (BATCH, TOKENS, WIDTH) and launch.arguments["directions_ptr"] is None
