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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from fake_cuda import Code, empty, generated  # noqa: E402
from gpu_targets import launches_of  # noqa: E402

from steer.kernels import drift_stats, edit, force, steer_add  # noqa: E402
from steer.kernels.drift_stats import launch as launch_drift  # noqa: E402
from steer.kernels.edit_autograd import Edit  # noqa: E402
from steer.kernels.edit_task import EditNumbers  # noqa: E402
from steer.kernels.steer_add import SteerAdd  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "kernels.md", ROOT / "benchmarks" / "results"
BATCH, TOKENS, WIDTH = 4, 2048, 4096
PASS = BATCH * TOKENS * WIDTH * 2  # bytes of one read or write of a bf16 activation
BF16, FP32, LONG = torch.bfloat16, torch.float32, torch.long
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


def updated(rows: dict[str, dict[str, Any]] | None = None) -> str:
    """The page with its table as it should be."""
    text, begin, end = PAGE.read_text(encoding="utf-8"), "<!-- roofline:begin -->", "<!-- roofline:end -->"
    before, after = text.split(begin)
    return f"{before}{begin}\n{table(counted() if rows is None else rows)}\n{end}{after.split(end)[1]}"


if __name__ == "__main__":
    PAGE.write_text(updated(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
