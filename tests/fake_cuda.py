"""Inductor's code for a GPU that is not there: kernels launched and bytes moved by compiled code, on any machine.

Fake tensors are traced on the CPU and moved to a device `cuda` whose properties (those of a H200) are invented here; nothing runs. All of
this is private to torch, hence VERSION: the torch that it was written for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface as interfaces
from torch import Tensor
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._triton import has_triton

VERSION = "2.13"
CARD = SimpleNamespace(
    multi_processor_count=132,
    major=9,
    minor=0,
    name="NVIDIA H200",
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=141 << 30,
    shared_memory_per_block_optin=232448,
    L2_cache_size=60 << 20,
    gcnArchName="",
)


class Worker:
    get_device_properties = staticmethod(lambda device=None: CARD)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)


class FakeCuda(interfaces.CudaInterface):
    Worker = Worker  # type: ignore[assignment]
    is_available = staticmethod(lambda: True)  # type: ignore[assignment]
    get_compute_capability = staticmethod(lambda device=None: 90)  # type: ignore[assignment]
    get_device_properties = staticmethod(lambda device=None: CARD)  # type: ignore[assignment]
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)  # type: ignore[assignment]
    current_device = staticmethod(lambda: 0)  # type: ignore[assignment]
    synchronize = staticmethod(lambda device=None: None)  # type: ignore[assignment]
    is_triton_capable = staticmethod(lambda device=None: True)  # type: ignore[assignment]
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)  # type: ignore[assignment]


class FakeDriver:
    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class Code:
    """Generated code: its text, the Triton kernels that it launches, the calls out of it (products, operators), the bytes that it moves."""

    def __init__(self, text: str, moved: int) -> None:
        body = text[text.index("def call(") :]
        self.text, self.moved = text, moved
        self.kernels = len(re.findall(r"\.run\(", body))
        self.calls = len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.\w+\.\w+[.\w]*\(", body))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cpu")


def generated(function: Callable[..., Any], inputs: Callable[[], Sequence[Tensor]]) -> Code:
    """What Inductor makes of a function. inputs: makes its arguments, called under a fake tensor mode."""
    import triton

    mode = FakeTensorMode()
    with mode, torch.no_grad(), mock.patch("torch.compiler.is_compiling", lambda: True):
        cpu_inputs = inputs()
        graph = make_fx(function, tracing_mode="real")(*cpu_inputs)
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            if node.target is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
                node.target = torch.ops.aten._scaled_dot_product_flash_attention.default
                node.kwargs, node.args = {}, (*node.args[:3], 0.0, True)
            if node.op == "get_attr":
                constant = getattr(graph, node.target)
                delattr(graph, node.target)
                setattr(graph, node.target, torch.empty(constant.shape, dtype=constant.dtype, device="cuda"))
        graph.recompile()
        cuda_inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in cpu_inputs]
        graph = make_fx(
            lambda *arguments: torch.fx.Interpreter(graph).run(*arguments), decomposition_table=select_decomp_table(), tracing_mode="real"
        )(*cuda_inputs)
        graph.graph.eliminate_dead_code()
        graph.recompile()
    interfaces.init_device_reg()
    card = mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        get_device_properties=lambda device=None: CARD,
        get_device_capability=lambda device=None: (9, 0),
        current_device=lambda: 0,
    )
    known = mock.patch.dict(interfaces.device_interfaces, {"cuda": FakeCuda, "cuda:0": FakeCuda})
    driver = triton.runtime.driver
    before = getattr(driver, "_active", None)
    driver.set_active(FakeDriver())
    has_triton.cache_clear()  # a test before this one may have asked without the card
    lowering = GraphLowering(graph, example_inputs=cuda_inputs, is_inference=True)
    try:
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()), V.set_graph_handler(lowering), card, known:
            lowering.run(*cuda_inputs)
            code, _ = lowering.codegen()
            return Code(getattr(code, "value", code), int(lowering.count_bytes()[0]))
    finally:
        driver._active = before
        has_triton.cache_clear()
