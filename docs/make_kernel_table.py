"""Counts what each kernel moves, launches and keeps, and writes the roofline table of docs/kernels.md.

    python docs/make_kernel_table.py

Nothing runs on a GPU here. PyTorch: every operation of the reference reads its tensors once and writes its results once. Inductor: the
bytes of the code that it generates for a H200, from fake tensors (the torch of tests/fake_cuda.py only). Triton: every tensor that a
launch is given is moved once; what is read again comes from the L2 cache. A pass is one read or write of the activation. Times stand in
the table once benchmarks/gpu.py has been run: those of the newest file in benchmarks/results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from fake_cuda import Code, empty, generated  # noqa: E402
from gpu_targets import launches_of  # noqa: E402

from steer.kernels import drift_stats, edit, force, steer_add  # noqa: E402
from steer.kernels.drift_stats import launch as launch_drift  # noqa: E402
from steer.kernels.edge_scores import MAX_BYTES, edge_scores_reference  # noqa: E402
from steer.kernels.edge_scores import launch as launch_edges  # noqa: E402
from steer.kernels.edit_autograd import Edit  # noqa: E402
from steer.kernels.edit_task import EditNumbers  # noqa: E402
from steer.kernels.sparse_decode import launch_entries, launch_gather_sum  # noqa: E402
from steer.kernels.sparse_pattern import SparsePattern  # noqa: E402
from steer.kernels.steer_add import SteerAdd  # noqa: E402
from steer.kernels.topk_encode import TILE_SIZE, TopFeatures, launch_merge  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "kernels.md", ROOT / "benchmarks" / "results"
BATCH, TOKENS, WIDTH = 4, 2048, 4096
PASS = BATCH * TOKENS * WIDTH * 2  # bytes of one read or write of a bf16 activation
BF16, FP32, LONG = torch.bfloat16, torch.float32, torch.long
FEATURES, ACTIVE, PART = 65536, 64, 2048  # features of a dictionary, those of a token, tokens that top-k encoding takes at a time
# heads, width of a head, readers, width, dtype of a pair of layers
PAIRS = {"Llama 3 8B, bf16": (32, 128, 48, 4096, BF16), "SmolLM2 135M, fp32": (9, 64, 15, 576, FP32)}
Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]
SCALAR, MASK, ROWS = ((1, 1, 1), FP32), ((BATCH, TOKENS, 1), BF16), ((BATCH,), LONG)
ENDS = (((8,), FP32), ((8,), FP32))
VIEWS = set(
    "view _unsafe_view t transpose unsqueeze expand slice select detach alias squeeze permute reshape as_strided split lift_fresh unbind"
    " empty_like new_empty empty arange".split()
)


@dataclass(frozen=True)
class Case:
    """One edit or reading: as a function of an activation and small tensors, and as the launches behind it.

    Attributes:
        floor: passes that cannot be avoided, forward. measured: its name in benchmarks/gpu.py.
        apply: the same through autograd, on the meta device, where launches are recorded.
    """

    floor: int
    run: Callable[..., Any]
    shapes: Shapes
    apply: Callable[[Tensor], Any]
    measured: str = ""


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def added(rows: bool, norm: bool) -> Callable[[Tensor], Any]:
    slots = meta(BATCH, 1, dtype=LONG) if rows else None
    return lambda h: SteerAdd.apply(h, meta(8, WIDTH), meta(BATCH, TOKENS), slots, norm)


def edited(
    m: int, names: str = "", gain: float = 0.0, relative: bool = False, gated: bool = False, norm: bool = False
) -> Callable[[Tensor], Any]:
    numbers = [meta(1, m) if name in names.split() else None for name in EditNumbers._fields]
    return lambda h: Edit.apply(h, meta(1, m, WIDTH), meta(1, m, WIDTH), meta(BATCH, TOKENS), None, *numbers, gain, relative, gated, norm)


def read(k: int) -> Callable[[Tensor], Any]:
    u, ends = (meta(k, WIDTH), meta(k)) if k else (None, None)
    return lambda h: launch_drift(h.detach(), u, meta(BATCH, TOKENS), ends, ends, 64 if k else 0, True, True)


def bank(m: int) -> tuple[tuple[int, ...], torch.dtype]:
    return ((m, WIDTH), FP32)


CASES: dict[str, Case] = {
    "add a vector": Case(2, lambda h, v, a: steer_add(h, v, a), (bank(1), SCALAR), added(False, False)),
    "add, a slot for each row, mask": Case(
        2, lambda h, v, a, m, s: steer_add(h, v, a, m, s), (bank(8), SCALAR, MASK, ROWS), added(True, False), "add, rows"
    ),
    "the same, norm kept": Case(
        2, lambda h, v, a, m, s: steer_add(h, v, a, m, s, True), (bank(8), SCALAR, MASK, ROWS), added(True, True), "add, rows, norm kept"
    ),
    "ablate rank 1": Case(
        2, lambda h, u, a, m: edit(h, u, scale=0.0, strength=a, mask=m), (bank(1), SCALAR, MASK), edited(1, gain=-1.0), "ablate rank 1"
    ),
    "ablate rank 4": Case(
        2, lambda h, u, a, m: edit(h, u, scale=0.0, strength=a, mask=m), (bank(4), SCALAR, MASK), edited(4, gain=-1.0), "ablate rank 4"
    ),
    "clamp a projection, norm kept": Case(
        2,
        lambda h, u, n, a, m: edit(h, u, low=n, high=n, strength=a, mask=m, preserve_norm=True),
        (bank(1), ((1,), FP32), SCALAR, MASK),
        edited(1, "low high", norm=True),
        "clamp, norm kept",
    ),
    "add where the cosine is over a threshold": Case(
        2,
        lambda h, u, v, n, a: edit(h, u, v, threshold=n, relative=True, gated=True, shift=1.0, strength=a),
        (bank(1), bank(1), ((1,), FP32), SCALAR),
        edited(1, "threshold shift", relative=True),
        "gate by cosine",
    ),
    "set 8 features": Case(
        2,
        lambda h, u, v, n, a: edit(h, u, v, bias=n, threshold=n, scale=0.0, shift=n, strength=a),
        (bank(8), bank(8), ((8,), FP32), SCALAR),
        edited(8, "bias threshold shift", gain=-1.0),
    ),
    "set 16 features": Case(
        2,
        lambda h, u, v, n, a: edit(h, u, v, bias=n, threshold=n, scale=0.0, shift=n, strength=a),
        (bank(16), bank(16), ((16,), FP32), SCALAR),
        edited(16, "bias threshold shift", gain=-1.0),
        "set 16 features",
    ),
    "drift: channel moments, norms": Case(1, lambda h, m: drift_stats(h, None, m)[:4], (MASK,), read(0), "drift: moments, norms"),
    "drift: and 8 projections, histograms": Case(
        1,
        lambda h, m, u, a, b: tuple(drift_stats(h, u, m, bins=64, low=a, high=b)),
        (MASK, bank(8), *ENDS),
        read(8),
        "drift: and 8 projections",
    ),
}


class Moved(TorchDispatchMode):
    """Counts the bytes that operations read and write, and these operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in VIEWS:
            self.bytes += sum(stored(tensor) for tensor in tree_leaves((args, kwargs, result)) if isinstance(tensor, Tensor))
            self.kernels += 1
        return result


def stored(x: Tensor) -> int:
    """Bytes of a tensor, counting what is repeated once."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else 1
    return size


def inputs(case: Case) -> list[Tensor]:
    return [empty(BATCH, TOKENS, WIDTH, dtype=BF16), *(empty(*shape, dtype=dtype) for shape, dtype in case.shapes)]


def eager(case: Case) -> tuple[float, int]:
    """Passes and kernels of the PyTorch operations."""
    with FakeTensorMode(), torch.no_grad(), force("aten"):
        arguments = inputs(case)
        with Moved() as moved:
            case.run(*arguments)
    return moved.bytes / PASS, moved.kernels


def compiled(case: Case) -> Code:
    """What Inductor makes of them."""
    return generated(case.run, lambda: inputs(case))


def triton(case: Case) -> tuple[float, int, float, int]:
    """Passes and launches of the kernels, forward and backward; passes of the latter 0 where there is nothing to do or to differentiate."""

    def moved(launches: Sequence[Any]) -> float:
        return sum(stored(x) for launch in launches for x in launch.arguments.values() if isinstance(x, Tensor)) / PASS

    h = meta(BATCH, TOKENS, WIDTH, dtype=BF16).requires_grad_()
    results: list[Any] = []
    forward = launches_of(lambda: results.append(case.apply(h)))
    is_edit = isinstance(results[0], Tensor)
    backward = launches_of(lambda: results[0].backward(torch.empty_like(h))) if is_edit else []
    return moved(forward), len(forward), moved(backward), len(backward)


def saved_bytes(case: Case, by_kernel: bool) -> float | None:
    """Bytes of a token that backward keeps beside the activation and the vectors; None where nothing is differentiated."""
    known: set[int] = set()
    n_bytes: dict[int, int] = {}
    results: list[Any] = []

    def pack(x: Tensor) -> Tensor:
        if id(x) not in known and x.dim() > 1 and x.shape[:2] == (BATCH, TOKENS):
            n_bytes[x.untyped_storage()._cdata] = stored(x)
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    if by_kernel:
        h = meta(BATCH, TOKENS, WIDTH, dtype=BF16).requires_grad_()
        known.add(id(h))
        with hooks:
            launches_of(lambda: results.append(case.apply(h)))
    else:
        with FakeTensorMode(), force("aten"):
            arguments = inputs(case)
            arguments[0].requires_grad_()
            known.update(id(x) for x in arguments)
            with hooks:
                results.append(case.run(*arguments))
    return sum(n_bytes.values()) / (BATCH * TOKENS) if isinstance(results[0], Tensor) else None


def measured() -> tuple[str, dict[str, dict[str, Any]]]:
    """(what was measured on, rows by task) of the newest run on a GPU; nothing without one."""
    files = sorted(RESULTS.glob("*_gpu.json"))
    if not files:
        return "", {}
    run = json.loads(files[-1].read_text())
    return f"{run['card']}, {run['date']}", {row["task"]: row for row in run["kernels"]}


def counted() -> dict[str, dict[str, Any]]:
    """All numbers of the table, by case."""
    rows = {}
    for name, case in CASES.items():
        code = compiled(case)
        rows[name] = {
            "eager": eager(case),
            "compiled": (code.moved / PASS, code.kernels, code.calls),
            "triton": triton(case),
            "kept": (saved_bytes(case, by_kernel=False), saved_bytes(case, by_kernel=True)),
        }
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    card, times = measured()
    head = ["edit", "floor", "PyTorch", "Inductor", "Triton forward", "Triton backward", "kept, PyTorch", "kept, Triton"]
    lines = [head + [f"measured on {card}"] * bool(card)]
    lines.append(["---"] * len(lines[0]))
    for name, row in rows.items():
        case = CASES[name]
        passes, kernels = row["eager"]
        fused, launched, calls = row["compiled"]
        forward, launches, back, back_launches = row["triton"]
        reads = case.floor == 1
        line = [
            name,
            str(case.floor),
            f"{passes:.1f} / {kernels}",
            f"{fused:.2f} / {launched + calls}",
            f"{forward:.2f} / {launches}",
            "-" if reads else f"{back:.2f} / {back_launches}",
            *("-" if n_bytes is None else f"{n_bytes:,.0f} B" for n_bytes in row["kept"]),
        ]
        if card:
            seen = times.get(case.measured)
            line.append("" if seen is None else f"{seen['us']:.0f} us, {seen['fraction']:.0%} of copy")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sparse_cases() -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int]]:
    """Name -> (the same on all features in PyTorch, what launches the kernels, products that the kernels do not do themselves)."""
    tokens, entries = BATCH * TOKENS, BATCH * TOKENS * ACTIVE
    pattern = SparsePattern.of_rows(meta(tokens, ACTIVE, dtype=LONG), FEATURES)
    place, order, values = meta(entries, dtype=LONG), meta(entries, dtype=LONG), meta(entries)
    by_token, by_feature = meta(tokens + 1, dtype=LONG), meta(FEATURES + 1, dtype=LONG)
    weight, h, g = meta(FEATURES, WIDTH, dtype=BF16), meta(tokens, WIDTH, dtype=BF16), meta(tokens, WIDTH, dtype=BF16)
    f = meta(tokens, FEATURES, dtype=BF16)
    old, part = TopFeatures(meta(PART, ACTIVE), meta(PART, ACTIVE, dtype=LONG)), meta(PART, TILE_SIZE)

    def top() -> None:
        for first in range(0, FEATURES, TILE_SIZE):
            for _ in range(tokens // PART):
                launch_merge(part, old, first, ACTIVE)

    return {
        "sparse decode": (lambda: f @ weight, lambda: launch_gather_sum(weight, values, place, None, by_token), 0),
        "gradient of the values": (lambda: g @ weight.mT, lambda: launch_entries(pattern, g, weight), 0),
        "gradient of the weight": (lambda: f.mT @ g, lambda: launch_gather_sum(g, values, place, order, by_feature), 0),
        "top-k encode": (lambda: (h @ weight.mT).float().topk(ACTIVE), top, 2 * tokens * WIDTH * FEATURES),
    }


def sparse_table() -> str:
    """Bytes and products with 64 of 65,536 features on; a row that is gathered counts each time, since nobody knows what a cache keeps."""
    lines = [["task", "PyTorch, all features: GB", "products, 10^12", "Triton: GB", "products, 10^12", "launches"], ["---"] * 6]
    for name, (dense, run, others) in sparse_cases().items():
        with Moved() as moved, FlopCounterMode(display=False) as flops:
            dense()
        launches = launches_of(run)
        n_bytes = sum(moved_by(launch.arguments) for launch in launches)
        own = 2 * BATCH * TOKENS * ACTIVE * WIDTH if not others else others
        dense_flops = flops.get_total_flops()
        numbers = [moved.bytes / 1e9, dense_flops / 1e12, n_bytes / 1e9, own / 1e12]
        lines.append([name, *(f"{number:.2g}" if number < 0.1 else f"{number:.2f}" for number in numbers), str(len(launches))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def edge_table() -> str:
    """Bytes and products of edge scores of a pair of layers; the products with W_O, which the library does, are counted with the kernel."""
    head = ["pair", "outputs of heads: GB", "at a time", "PyTorch: GB moved", "Triton and library", "products, 10^12", "Triton launches"]
    lines = [head, ["---"] * len(head)]
    for name, (heads, d, readers, width, dtype) in PAIRS.items():
        tokens = PART
        dz, w_o, r = (meta(*shape, dtype=dtype) for shape in ((tokens, heads, d), (width, heads * d), (tokens, readers, width)))
        with Moved() as moved:
            edge_scores_reference(dz, w_o, r, MAX_BYTES)
        launches = launches_of(lambda pair=(dz, w_o, r): launch_edges(*pair, MAX_BYTES))  # type: ignore[misc]
        outputs = [launch.arguments["u_ptr"] for launch in launches]
        by_library = stored(dz) + sum(stored(w_o) + stored(u) for u in outputs)
        n_bytes = by_library + sum(moved_by(launch.arguments) for launch in launches)
        numbers = [4 * tokens * heads * width / 1e9, max(stored(u) for u in outputs) / 1e9, moved.bytes / 1e9, n_bytes / 1e9]
        numbers.append(2 * tokens * heads * width * (d + readers) / 1e12)
        lines.append([name, *(f"{number:.2g}" if number < 0.1 else f"{number:.2f}" for number in numbers), str(len(launches))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def moved_by(arguments: dict[str, Any]) -> int:
    """Bytes of the tensors of a launch; of a matrix whose rows are gathered, of one row for each entry."""
    entries = arguments.get("place_ptr", arguments.get("feature_ptr"))
    n_bytes = 0
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        is_gathered = name in ("matrix_ptr", "right_ptr") and entries is not None
        n_bytes += len(entries) * tensor.shape[1] * tensor.element_size() if is_gathered else stored(tensor)
    return n_bytes


def updated(rows: dict[str, dict[str, Any]] | None = None) -> str:
    """The page with its tables as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in (("roofline", table(counted() if rows is None else rows)), ("sparse", sparse_table()), ("edges", edge_table())):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, after = text.split(begin)
        text = f"{before}{begin}\n{lines}\n{end}{after.split(end)[1]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(updated(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
