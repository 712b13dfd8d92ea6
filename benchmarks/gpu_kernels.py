"""The kernels alone: against float64, beside PyTorch operations and Inductor, and beside the kernels of others."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_clock import Sizes, milliseconds
from torch import Tensor

from steer.intervene import Ablate, Add
from steer.intervene.low_rank import widened, with_norm_of
from steer.kernels import drift_stats, edge_scores, edit, edit_scalar, force, steer_add, writer_outputs

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """One use of a kernel.

    Attributes:
        run: of an activation; everything else is fixed.
        passes: reads and writes of the activation that cannot be avoided, forward; `backward`, in both directions together.
        learned: tensors that get a gradient too.
        compiled: worth the seconds that Inductor needs.
        kink: how far each token is from where the formula jumps or bends, in fp64; nearer than 1e-4 either side is right.
    """

    name: str
    run: Run
    passes: int
    backward: int = 0
    learned: tuple[Tensor, ...] = ()
    compiled: bool = True
    kink: Callable[[Tensor], Tensor] | None = None


def tasks(sizes: Sizes, dtype: torch.dtype = torch.float32) -> list[Task]:
    """dtype: of vectors and numbers; fp64 for the reference, which gets the same ones."""
    (batch, tokens, width), random = sizes.shape, sizes.random
    drawn = (
        random(8, width, seed=1) / 8,
        torch.linspace(0.5, 2, batch, device=sizes.device).view(-1, 1, 1),
        (torch.arange(batch * tokens, device=sizes.device).view(batch, tokens, 1) % 7 > 0).float(),
        torch.nn.functional.normalize(random(1, width, seed=2), dim=-1),
        torch.linalg.qr(random(width, 4, seed=3))[0].mT.contiguous(),
        random(16, width, seed=4) / width**0.5,
        random(16, width, seed=5) / 8,
        0.2 * random(16, seed=6),
        random(64, width, seed=7) / width**0.5,
        random(64, width, seed=8) / 8,
    )
    bank, strength, mask, unit, span, read, write, low, many, back = (tensor.to(dtype) for tensor in drawn)
    slots, high = torch.arange(batch, device=sizes.device) % 9 - 1, low[:1] + 0.1

    def to(u: Tensor, *places: Tensor | float) -> Callable[[Tensor], Tensor]:
        """Distance of the nearest projection from the nearest of some numbers."""
        return lambda h: torch.stack([(h @ u.double().mT - place).abs().amin(-1) for place in places]).amin(0)

    def to_cosine(h: Tensor) -> Tensor:
        return ((h @ unit.double().mT) - 0.01 * h.norm(dim=-1, keepdim=True)).abs().amin(-1)

    return [
        Task("add, rows", lambda h: steer_add(h, bank, strength, mask, slots), 2, 2),
        Task("add, rows, norm kept", lambda h: steer_add(h, bank, strength, mask, slots, True), 2, 5),
        Task("add, learned vectors", lambda h: steer_add(h, bank, strength, mask, slots), 2, 3, (bank,), False),
        Task("ablate rank 1", lambda h: edit(h, unit, scale=0.0, strength=strength, mask=mask), 2, 4),
        Task("ablate rank 4", lambda h: edit(h, span, scale=0.0), 2, 4),
        Task("clamp, norm kept", lambda h: edit(h, unit, low=low[:1], high=high, preserve_norm=True), 2, 5, kink=to(unit, low[:1], high)),
        Task(
            "gate by cosine",
            lambda h: edit(h, unit, write[:1], threshold=0.01, relative=True, gated=True, shift=low[:1]),
            2,
            4,
            kink=to_cosine,
        ),
        Task("set 16 features", lambda h: edit(h, read, write, threshold=low, scale=0.0, shift=low), 2, 4, kink=to(read, low)),
        Task("set 64 features", lambda h: edit(h, many, back, threshold=0.1, scale=0.0, shift=0.5), 2, 4, (), False, to(many, 0.1)),
        Task("learned subspace of 4", lambda h: edit(h, span, write[:4], bias=low[:4], scale=2.0), 2, 5, (span,), False),
        Task("drift: moments, norms", lambda h: _numbers(drift_stats(h, None, mask)), 1),
        Task("drift: and 8 projections", lambda h: _numbers(drift_stats(h, read[:8], mask, bins=64, low=-4.0, high=4.0)), 1),
        Task("drift: 16 projections alone", lambda h: _numbers(drift_stats(h, read, mask, channels=False, norms=False)), 1),
    ]


def _numbers(stats: Any) -> Tensor:
    """All that was read but the histogram, as one tensor."""
    return torch.cat([result.flatten().double() for result in stats[:5] if result is not None])


# ---- right


def check(sizes: Sizes) -> list[dict[str, Any]]:
    """Every task against float64, in bf16 at full size and in all dtypes at an odd one; the error beside the one rounding of a result that
    no kernel can avoid."""
    odd = Sizes(**{**vars(sizes), "shape": (3, 37, 1021 if sizes.on_gpu else 33)})
    rows = []
    for place, dtype in ((sizes, torch.bfloat16), (odd, torch.bfloat16), (odd, torch.float16), (odd, torch.float32)):
        pairs = zip(tasks(place), tasks(place, torch.float64), strict=True)
        for ours, exact in pairs:
            h, pull = place.states(dtype), place.states(dtype, seed=9)
            result, expected = _values(ours, h, pull), _values(exact, h.double(), pull.double(), path="aten")
            again = _values(ours, h, pull)
            if exact.kink is not None:
                clear = exact.kink(h.detach().double()) > 1e-4
                result, expected, again = ([x[clear] for x in values] for values in (result, expected, again))
            errors = [_error(a, b) for a, b in zip(result, expected, strict=True)]
            room = [_error(b.to(a.dtype), b) for a, b in zip(result, expected, strict=True)]
            worst = max(error / (1.5 * least + 2e-6) for error, least in zip(errors, room, strict=True))
            same = all(torch.equal(a, b) for a, b in zip(result, again, strict=True))
            row = {"task": ours.name, "dtype": str(dtype)[6:], "width": place.width, "error": max(errors), "of what is allowed": worst}
            rows.append({**row, "twice the same": same, "right": bool(worst <= 1 and same)})
    rows += [_far_apart(sizes), *(_edges_right(sizes, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32))]
    return sorted(rows, key=lambda row: -row["of what is allowed"])


def _values(task: Task, h: Tensor, pull: Tensor, path: str = "auto") -> list[Tensor]:
    with force(path):
        if not task.backward:
            return [task.run(h).detach()]
        inputs = [h.requires_grad_(), *(tensor.requires_grad_() for tensor in task.learned)]
        out = task.run(h)
        return [out.detach(), *torch.autograd.grad(out, inputs, pull)]


def _error(result: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((result.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def _far_apart(sizes: Sizes) -> dict[str, Any]:
    """Rows more than 2^31 numbers apart."""
    apart = (1 << 30) + 8 if sizes.on_gpu else 4096
    wide = torch.zeros(2 * apart + sizes.width, dtype=torch.float16, device=sizes.device)
    h = wide.as_strided((3, 1, sizes.width), (apart, sizes.width, 1))
    h.copy_(sizes.random(3, 1, sizes.width))
    v = sizes.random(1, sizes.width, seed=1)
    errors = [
        _error(steer_add(h, v), h.double() + v.double()),
        _error(edit(h, v, shift=1.0), h.double() + v.double()),
        _error(drift_stats(h, v).projections.float(), h.double() @ v[0].double()[:, None]),
    ]
    row = {"task": "rows 2^30 numbers apart", "dtype": "float16", "width": sizes.width, "error": max(errors)}
    return {**row, "of what is allowed": max(errors) / 1e-3, "twice the same": True, "right": max(errors) <= 1e-3}


def _pair(sizes: Sizes, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's heads, their projection, and 3 readers for every 2 heads: a layer of 8B shape has 32 heads, q of all and 8 of k and v."""
    d = min(128, sizes.width // 4)
    heads = sizes.width // d
    drawn = (
        sizes.random(tokens, heads, d, seed=1),
        sizes.random(sizes.width, heads * d, seed=2) / sizes.width**0.5,
        sizes.random(tokens, heads * 3 // 2, sizes.width, seed=3),
    )
    dz, w_o, r = (tensor.to(dtype) for tensor in drawn)
    return dz, w_o, r


def _edges_right(sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """Edge scores of an odd number of tokens in three chunks, against float64."""
    pair, room = _pair(sizes, dtype, 301), 128 * 4 * sizes.width * (sizes.width // min(128, sizes.width // 4))
    with force("aten"):
        exact = edge_scores(*(tensor.double() for tensor in pair))
    result, again = edge_scores(*pair, max_bytes=room), edge_scores(*pair, max_bytes=room)
    error, allowed = _error(result, exact), 3e-5  # sums of random signs, of which most cancels
    same = torch.equal(result, again)
    row = {"task": "edge scores", "dtype": str(dtype)[6:], "width": sizes.width, "error": error, "of what is allowed": error / allowed}
    return {**row, "twice the same": same, "right": error <= allowed and same}


# ---- fast


def kernels(sizes: Sizes, bandwidth: float) -> list[dict[str, Any]]:
    """Times every task, in microseconds. fraction: share of a copy's bandwidth that moving only the unavoidable bytes would reach."""
    rows = []
    inputs = [sizes.states(seed=seed) for seed in range(4)]  # together more than the L2 cache holds
    turn = itertools.cycle(inputs)
    one_pass = inputs[0].numel() * inputs[0].element_size()

    def row(name: str, passes: int, run: Run, compiled: Run | None) -> dict[str, Any]:
        ours = milliseconds(lambda: run(next(turn)), sizes)
        with force("aten"):
            eager = milliseconds(lambda: run(next(turn)), sizes)
        columns = {"task": name, "passes": passes, "us": ours * 1e3, "fraction": passes * one_pass / ours / 1e9 / bandwidth}
        columns |= {"eager us": eager * 1e3, "eager / ours": eager / ours}
        if compiled is not None and sizes.on_gpu:
            inductor = milliseconds(lambda: compiled(next(turn)), sizes)
            columns |= {"Inductor us": inductor * 1e3, "Inductor / ours": inductor / ours}
        return columns

    for task in tasks(sizes):
        with torch.no_grad():
            rows.append(row(task.name, task.passes, task.run, torch.compile(task.run) if task.compiled else None))
    pull = sizes.states(seed=9)
    for task in tasks(sizes):
        if task.backward:
            learned = [tensor.requires_grad_() for tensor in task.learned]

            def both(h: Tensor, task: Task = task, learned: list[Tensor] = learned) -> Tensor:
                h = h.detach().requires_grad_()
                return torch.autograd.grad(task.run(h), [h, *learned], pull)[0]

            rows.append(row(f"{task.name}, and backward", task.backward, both, None))
    return rows


def features(sizes: Sizes) -> list[dict[str, Any]]:
    """Clamping m features of a dictionary by either kernel, and running the dictionary instead."""
    rows: list[dict[str, Any]] = []
    h, width = sizes.states(), sizes.width
    encoder = (sizes.random(sizes.features, width, seed=1) / width**0.5).to(torch.bfloat16)
    decoder = (sizes.random(sizes.features, width, seed=2) / 8).to(torch.bfloat16)
    threshold = torch.full((sizes.features,), 0.1, device=sizes.device)
    cached = edit_scalar.CACHED_DIRECTIONS
    for m in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for path, limit in (("chosen", cached), ("scalar", edit_scalar.MAX_DIRECTIONS), ("tiles", 0)):
            if path == "scalar" and m > edit_scalar.MAX_DIRECTIONS:
                continue
            edit_scalar.CACHED_DIRECTIONS = limit
            with torch.no_grad():
                task = {"threshold": threshold[:m], "scale": 0.0, "shift": threshold[:m]}
                ms = milliseconds(lambda m=m, task=task: edit(h, encoder[:m], decoder[:m], **task), sizes)  # type: ignore[misc]
            rows.append({"path": path, "features": m, "ms": ms})
    edit_scalar.CACHED_DIRECTIONS = cached
    of_one_feature = next(row["ms"] for row in rows if row["path"] == "chosen")
    for row in rows:
        row["against 1"] = row["ms"] / of_one_feature

    def dictionary() -> Tensor:
        z = torch.relu(h @ encoder.mT)
        new = z.clone()
        new[..., :16] = 0.1
        return h + (new - z) @ decoder

    with torch.no_grad():
        rows.append({"path": "whole dictionary", "features": sizes.features, "ms": milliseconds(dictionary, sizes)})
        rows[-1]["against 1"] = rows[-1]["ms"] / of_one_feature
    return rows


def edges(sizes: Sizes, bandwidth: float) -> list[dict[str, Any]]:
    """Edge scores of a pair of layers, and the library's share of them: what a kernel that forms the outputs of heads itself could save."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (256, 2048) if sizes.on_gpu else (8,):
            dz, w_o, r = _pair(sizes, dtype, tokens)
            ours = milliseconds(lambda dz=dz, w_o=w_o, r=r: edge_scores(dz, w_o, r), sizes)  # type: ignore[misc]
            u = writer_outputs(dz, w_o)
            contraction = milliseconds(lambda u=u, r=r: edge_scores(u, None, r), sizes)  # type: ignore[misc]
            with force("aten"):
                eager = milliseconds(lambda dz=dz, w_o=w_o, r=r: edge_scores(dz, w_o, r), sizes)  # type: ignore[misc]
            n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (u, r))
            row = {"dtype": str(dtype)[6:], "tokens": tokens, "heads": dz.shape[1], "readers": r.shape[1], "us": ours * 1e3}
            row |= {"contraction us": contraction * 1e3, "contraction, fraction": n_bytes / contraction / 1e9 / bandwidth}
            rows.append({**row, "eager us": eager * 1e3, "eager / ours": eager / ours})
    return rows


def small(sizes: Sizes) -> list[dict[str, Any]]:
    """Compares an operator's own operations with a kernel on few tokens, where the host takes the time; see `wanted` in dispatch.py."""
    rows, v, strength = [], sizes.random(sizes.width, seed=1), torch.ones(1, 1, 1, device=sizes.device)
    for tokens in (1, 16, 64, 256, 1024):
        h = sizes.random(1, tokens, sizes.width).to(torch.bfloat16)
        for operator, norm in ((Ablate(v), False), (Add(v), True)):
            operator = operator.on(h.device)
            tensors = operator.tensors

            def own(h: Tensor, apply: Any = operator.apply, tensors: Any = tensors, norm: bool = norm) -> Tensor:
                wide = widened(h) if norm else h
                edited = apply(wide, strength, None, tensors)
                return with_norm_of(wide, edited).to(h.dtype) if norm else edited

            with torch.no_grad():
                row = {"operator": f"{operator.name}{', norm kept' * norm}", "tokens": tokens, "numbers": h.numel()}
                row["operations us"] = 1e3 * milliseconds(lambda h=h, own=own: own(h), sizes)  # type: ignore[misc]
                fused = operator.fused
                row["kernel us"] = 1e3 * milliseconds(
                    lambda h=h, fused=fused, norm=norm: fused(h, strength, None, None, norm),  # type: ignore[misc]
                    sizes,
                )
            rows.append(row)
    return rows


# ---- others


def peers(sizes: Sizes) -> list[dict[str, Any]]:
    """The kernels of other packages, where they are installed, on the same inputs as ours."""
    return [row for row in (_hotwire(sizes), _sparsify(sizes)) if row is not None] if sizes.on_gpu else []


def _hotwire(sizes: Sizes) -> dict[str, Any] | None:
    """Its steering kernel, in place and without gradients; its package registers itself with vLLM, so the one file is loaded."""
    spec = importlib.util.find_spec("hotwire")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(next(iter(spec.submodule_search_locations))) / "_kernel.py"
    own = importlib.util.spec_from_file_location("hotwire_kernel", file)
    assert own is not None and own.loader is not None
    module = importlib.util.module_from_spec(own)
    own.loader.exec_module(module)
    h = sizes.states().flatten(0, 1)
    bank, scales = sizes.random(16, sizes.width, seed=1).to(h.dtype), torch.ones(16, device=h.device)
    slots = (torch.arange(len(h), device=h.device) % 16).to(torch.int32)
    theirs = milliseconds(lambda: module.steer(h, bank, slots, scales), sizes)
    h = sizes.states().flatten(0, 1)
    with torch.no_grad():
        ours = milliseconds(lambda: steer_add(h[:, None], bank, 1.0, None, slots), sizes)
    return {"task": "add, slots of tokens", "peer": "hotwire", "peer ms": theirs, "ours ms": ours, "times ours": theirs / ours}


def _sparsify(sizes: Sizes) -> dict[str, Any] | None:
    """Its encoder and decoder around a change of 16 features, which is what steering with it takes."""
    try:
        from sparsify.fused_encoder import fused_encoder
        from sparsify.utils import decoder_impl
    except ImportError:
        return None
    h, width = sizes.states().flatten(0, 1), sizes.width
    encoder = (sizes.random(sizes.features, width, seed=1) / width**0.5).to(h.dtype)
    decoder, bias = sizes.random(sizes.features, width, seed=2).to(h.dtype), torch.zeros(sizes.features, device=h.device, dtype=h.dtype)

    def theirs() -> Tensor:
        values, places, _ = fused_encoder(h, encoder, bias, 64, "topk")
        edited = torch.where(places < 16, 0.1, values)
        return h + decoder_impl(places, edited, decoder) - decoder_impl(places, values, decoder)

    with torch.no_grad():
        slow = milliseconds(theirs, sizes)
        ours = milliseconds(lambda: edit(h, encoder[:16], decoder[:16], threshold=0.0, gated=True, scale=0.0, shift=0.1), sizes)
    return {"task": "set 16 features", "peer": "sparsify", "peer ms": slow, "ours ms": ours, "times ours": slow / ours}
