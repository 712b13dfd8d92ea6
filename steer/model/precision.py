"""Precision of matrix products, by Lightning's names: `32-true`, or `bf16-mixed`, products in bfloat16 and all else in float32."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch.nn.functional import linear

from steer.checks import one_of
from steer.model.restoring import restoring

FLOAT32, BF16, AUTO = PRECISIONS = ("32-true", "bf16-mixed", "auto")
_FASTER = 1.5  # times as fast as float32, to be worth the rounding
_TRIALS = 5


def settled_precision(precision: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> str:
    """What `auto` means on a device: `bf16-mixed` where it multiplies bfloat16 faster, `32-true` elsewhere.

    A processor without instructions for bfloat16 takes several times as long as with float32, one with them half as long; a product is
    timed, since torch does not say which it is (of CUDA devices it does). A model that is not float32 is left as it is.

    Args:
        precision: one of `PRECISIONS`; the others are given back.
        dtype: of the weights. device: where the model computes.

    Raises:
        ConfigError: another precision.

    Example:
        >>> settled_precision("32-true")
        '32-true'
    """
    one_of(precision, PRECISIONS, "the precision")
    if precision != AUTO:
        return precision
    return BF16 if dtype == torch.float32 and _multiplies_bf16(torch.device(device)) else FLOAT32


def products_in(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to bfloat16 for `bf16-mixed`, nothing for `32-true`.

    Weights that change within it may be used as they were: torch keeps their casts.
    """
    return torch.autocast(device.type, torch.bfloat16) if precision == BF16 else nullcontext()


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _speed_of_bf16() >= _FASTER


@torch.no_grad()
def _speed_of_bf16() -> float:
    """How many times as fast as in float32 a product is in bfloat16 on the CPU, by the best of some trials in turns.

    In CPU time of one thread, which hangs little on what else the machine does.
    """
    x, weight = torch.ones(512, 576), torch.ones(1536, 576)
    operands = {dtype: (x.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(operands, float("inf"))
    with restoring(partial(torch.set_num_threads, torch.get_num_threads())):
        torch.set_num_threads(1)
        for _ in range(1 + _TRIALS):  # the first of each is slower than those that follow, and never the best
            for dtype, (left, right) in operands.items():
                began = time.thread_time()
                linear(left, right)
                best[dtype] = min(best[dtype], time.thread_time() - began)
    return best[torch.float32] / max(best[torch.bfloat16], 1e-9)
