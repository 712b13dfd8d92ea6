"""Compiles Triton kernels for GPUs that are not there, exactly as they would be launched, and reads what came out.

The arguments of a launch are recorded on the meta device; from them follow the signature, the constants and the alignments that Triton's
own launcher would give to the compiler. Only the Triton wheel is needed: it brings LLVM, ptxas and cuobjdump.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from steer.kernels.lazy_triton import LazyKernel

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # of sm_86 for sm_80, which is the smaller one of its family
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass
class Launch:
    """A recorded launch: its arguments and Triton's own options, both by name."""

    kernel: LazyKernel
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.name


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside are noted and not run."""
    launches: list[Launch] = []

    def record(self: LazyKernel, grid: tuple[int, ...], **arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
        launches.append(Launch(self, grid, arguments, options))

    with mock.patch.object(LazyKernel, "launch", record):
        yield launches


def launches_of(run: Callable[[], Any]) -> list[Launch]:
    with recorded() as launches:
        run()
    return launches


@dataclass
class Compiled:
    """Compiled code of a launch for one target.

    Attributes:
        registers: of a thread. spilled: bytes of a thread (NVIDIA) or registers (AMD) that did not find room.
        shared: bytes of a program. reads, writes: instructions that move 128 bits.
        products: the instruction of matrix products, or an empty string.
        ttir: Triton's own code, before any target.
    """

    registers: int
    spilled: int
    shared: int
    reads: int
    writes: int
    products: str
    ttir: str


@dataclass
class Specialization:
    """What Triton compiles a kernel for: types, constants and alignments of its arguments."""

    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], Any]


def specialization(launch: Launch) -> Specialization:
    """The one that Triton's launcher would choose."""
    function = launch.kernel.jit_function()
    assert {parameter.name for parameter in function.params} == set(launch.arguments), "a launch names every argument, and no other"
    special = Specialization({}, {}, {})
    for i, parameter in enumerate(function.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            special.signature[parameter.name] = "constexpr"
            special.constants[(i,)] = value
        elif isinstance(value, Tensor):
            special.signature[parameter.name] = f"*{TYPES[value.dtype]}"
            special.attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            special.signature[parameter.name] = "fp32"
        else:
            special.signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                special.attributes[(i,)] = [["tt.divisibility", 16]]
    return special


def compilations(launches: Iterable[Launch]) -> set[str]:
    """What would be compiled for some launches, once for each kernel, specialization and set of options."""
    return {repr((launch.name, specialization(launch), sorted(launch.options.items()))) for launch in launches}


def compiled(launch: Launch, target: str) -> Compiled:
    """Compiles the kernel of a launch for one of TARGETS."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    special = specialization(launch)
    source = ASTSource(launch.kernel.jit_function(), special.signature, constexprs=special.constants, attrs=special.attributes)
    options = {**launch.options, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    text = binary.asm["ptx" if "ptx" in binary.asm else "amdgcn"]
    if "ptx" in binary.asm:
        registers, spilled = _of_cubin(binary.asm["cubin"], Path(triton.__file__).parent)
        reads = r"(?:ld\.global[^\n;]*\.v4\.b32)|(?:cp\.async\.c[ag]\.shared\.global [^\n;]*, 0x10,)"
        patterns = (reads, r"st\.global[^\n;]*\.v4\.b32")
        products = next((instruction for instruction in ("wgmma", "mma.sync") if instruction in text), "")
    else:
        registers, spilled = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
        patterns = (r"(?:global|buffer)_load_(?:dwordx4|b128)", r"(?:global|buffer)_store_(?:dwordx4|b128)")
        products = "v_mfma" if "v_mfma" in text else ""
    counts = [len(re.findall(pattern, text)) for pattern in patterns]
    return Compiled(registers, spilled, binary.metadata.shared, *counts, products, str(binary.asm["ttir"]))


def _of_cubin(cubin: bytes, triton: Path) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton / "backends" / "nvidia" / "bin" / "cuobjdump", "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert usage, report
    return int(usage[1]), int(usage[2]) + int(usage[3])
