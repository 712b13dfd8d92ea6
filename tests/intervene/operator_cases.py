"""Every operator with its formula in fp64, written in another way than in the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.circuits.operators.ablate_components import AblateComponents
from steer.circuits.operators.gate_components import GateComponents
from steer.features import Encoder, InMemory, Origin
from steer.features.activation import Activation
from steer.features.activations.gated import Gated
from steer.features.activations.jumprelu import JumpReLU
from steer.features.activations.relu import ReLU
from steer.features.activations.topk import TopK
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.intervene import (
    Ablate,
    AblateFeatures,
    AblateThenAdd,
    Ace,
    Add,
    AddDecoder,
    Bound,
    Clamp,
    ClampFeatures,
    Erase,
    FeatureAdapter,
    FeatureGains,
    HeadShift,
    KeepOnlyFeatures,
    KSteering,
    LoReFT,
    Mirror,
    ReftR1,
    Replace,
    Rotate,
    Scale,
    TargetProjection,
)
from steer.intervene.operator import Operator, tensors_of_rows


class Draw:
    """Random tensors of a case, the same whenever they are asked for.

    Args:
        seeds: one for each row slot; a single one gives tensors without slots.
        width: of the activation.
        spoil: number of the tensor that gets a NaN.
    """

    def __init__(self, seeds: Sequence[int] = (0,), width: int = 32, spoil: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.seeds, self.width, self.spoil, self.dtype = seeds, width, spoil, dtype
        self.drawn: set[int] = set()

    def __call__(self, number: int, *shape: int, shared: bool = False) -> Tensor:
        """shared: all row slots have the same."""
        self.drawn.add(number)
        seeds = [0] if shared else self.seeds
        per_slot = [torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + number)) for seed in seeds]
        tensor = per_slot[0] if len(per_slot) == 1 else torch.stack(per_slot)
        if number == self.spoil:
            tensor.view(-1)[0] = float("nan")
        return tensor.to(self.dtype)


def bounded(h: Tensor, s: float, d: Draw, margin: float = 0.1) -> Tensor:
    """Each number by itself: what lies beyond an end comes back to it but for a part that levels off at the margin."""

    def of_number(x: float, low: float) -> float:
        end = min(max(x, low), low + 0.5)
        return x + s * (end + margin * math.tanh((x - end) / margin) - x)

    low = (d(0, d.width) - 1).expand_as(h)
    return torch.tensor(
        [of_number(*pair) for pair in zip(h.flatten().tolist(), low.flatten().tolist(), strict=True)], dtype=h.dtype
    ).view_as(h)


@dataclass(frozen=True)
class Case:
    """build makes the operator of a draw; formula takes h [batch, tokens, width] and a draw, both fp64 and of one slot, and a strength."""

    build: Callable[[Draw], Operator]
    formula: Callable[[Tensor, float, Draw], Tensor]

    def make(self, seeds: Sequence[int] = (0,), width: int = 32, spoil: int | None = None) -> Operator:
        return self.build(Draw(seeds, width, spoil))

    def expected(self, h: Tensor, strength: float = 1.0, seed: int = 0) -> Tensor:
        """The operator's result in fp64."""
        return self.formula(h.double(), strength, Draw([seed], h.shape[-1], dtype=torch.float64))

    def numbers(self, width: int = 32) -> set[int]:
        """Indices of the tensors that the case draws."""
        draw = Draw(width=width)
        self.build(draw)
        return draw.drawn


def applied(operator: Operator, h: Tensor, strength: float | Sequence[float] = 1.0, mask: Tensor | None = None, rows=None) -> Tensor:
    strengths = torch.as_tensor(strength, dtype=torch.float32).reshape(-1)
    rows = None if rows is None else torch.tensor(rows)
    strengths = strengths if rows is None or len(strengths) == 1 else strengths[rows]
    return operator.apply(h, strengths.view(-1, 1, 1), mask, tensors_of_rows(operator.tensors, rows))


def projection(h: Tensor, v: Tensor) -> Tensor:
    return h @ torch.outer(v, v) / (v @ v)


def reach(h: Tensor, v: Tensor) -> Tensor:
    """Projection as a number, [batch, tokens, 1]."""
    return (h @ v / v.norm()).unsqueeze(-1)


def gram_schmidt(rows: Tensor) -> Tensor:
    orthonormal: list[Tensor] = []
    for row in rows:
        for earlier in orthonormal:
            row = row - (row @ earlier) * earlier
        orthonormal.append(row / row.norm())
    return torch.stack(orthonormal)


def set_reach(h: Tensor, v: Tensor, strength: float, where: Callable[[float], float]) -> Tensor:
    """Token by token: the projection p becomes where(p) at strength 1."""
    new, u = h.clone(), v / v.norm()
    for row in range(h.shape[0]):
        for token in range(h.shape[1]):
            p = float(h[row, token] @ u)
            new[row, token] += strength * (where(p) - p) * u
    return new


def ace(h: Tensor, strength: float, d: Draw) -> Tensor:
    r, reference, share = d(0, d.width), d(1, d.width), min(abs(strength), 1)
    return h - share * projection(h, r) + share * projection(reference, r) + strength * 0.4 * r


def ablate_then_add(h: Tensor, strength: float, d: Draw) -> Tensor:
    v = d(0, d.width)
    return h - min(abs(strength), 1) * projection(h, v) + strength * v


def erase(h: Tensor, strength: float, d: Draw) -> Tensor:
    removed = d(0, 2, d.width).T @ d(1, 2, d.width)
    return h - strength * (h - d(2, d.width)) @ removed.T


def head_shift(h: Tensor, strength: float, d: Draw) -> Tensor:
    z = h.clone().unflatten(-1, (4, -1))
    first, second = d(0, 2, d.width // 4)
    z[:, :, 2] += strength * first
    z[:, :, 0] += strength * second
    return z.flatten(2)


def climbed(h: Tensor, strength: float, logits: Callable[[Tensor], Tensor], weights: Tensor, steps: int, decay: float) -> Tensor:
    with torch.enable_grad():
        for step in range(steps):
            here = h.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad((logits(here) @ weights).sum(), here)
            h = h + strength * decay**step * slope
    return h


def k_steering(h: Tensor, strength: float, d: Draw) -> Tensor:
    w1, b1, w2 = d(0, 5, d.width, shared=True), d(1, 5, shared=True), d(2, 3, 5, shared=True)
    return climbed(h, strength, lambda x: torch.relu(x @ w1.T + b1) @ w2.T, torch.tensor([1.0, 0, -1]).double(), 1, 1.0)


def k_steering_deep(h: Tensor, strength: float, d: Draw) -> Tensor:
    w1, w2, w3 = d(0, 5, d.width, shared=True), d(1, 4, 5, shared=True), d(2, 3, 4, shared=True)
    b1, b2 = d(3, 5, shared=True), d(4, 4, shared=True)

    def logits(x: Tensor) -> Tensor:
        return torch.relu(torch.relu(x @ w1.T + b1) @ w2.T + b2) @ w3.T

    return climbed(h, strength, logits, torch.tensor([0.5, 0, 0.5]).double(), 3, 0.5)


def loreft(h: Tensor, strength: float, d: Draw) -> Tensor:
    r = gram_schmidt(d(0, 3, d.width))
    return h + strength * (h @ d(1, 3, d.width).T + d(2, 3) - h @ r.T) @ r


def reft_r1(h: Tensor, strength: float, d: Draw) -> Tensor:
    w = d(0, d.width) / d(0, d.width).norm()
    new = h.clone()
    for row in range(h.shape[0]):
        largest = sorted((max(float(token @ w), 0.0) for token in h[row]), reverse=True)[:2]
        new[row] += strength * sum(largest) / len(largest) * w
    return new


def rotate(h: Tensor, strength: float, d: Draw) -> Tensor:
    first, second = gram_schmidt(d(0, 2, d.width))
    turn = torch.matrix_exp(strength * 1.2 * (torch.outer(second, first) - torch.outer(first, second)))
    return h @ turn.T


def rotate_towards(h: Tensor, strength: float, d: Draw) -> Tensor:
    first, second = gram_schmidt(d(0, 2, d.width))
    inside = torch.complex(h @ first, h @ second)
    way = torch.angle(torch.polar(torch.ones_like(inside.real), 2.0 - inside.angle()))
    turned = torch.polar(inside.abs(), inside.angle() + strength * way)
    rest = h - torch.outer(inside.real.flatten(), first).view_as(h) - torch.outer(inside.imag.flatten(), second).view_as(h)
    return rest + turned.real.unsqueeze(-1) * first + turned.imag.unsqueeze(-1) * second


def everywhere(operator: Operator) -> Operator:
    """A dictionary is of one site, and the tests put every operator at any of theirs."""
    parts = ("input", "output", "attn.output", "mlp.output", "attn.z", "mlp.input")
    operator.origin["reads"] = operator.origin["writes"] = [
        "embed",
        "final_norm",
        *(f"layers.{layer}.{part}" for layer in range(4) for part in parts),
    ]
    return operator


def dictionary(d: Draw, activation: Callable[[Draw], Activation], norm: str = "none") -> SparseAutoencoder:
    """Of 12 features, the matrices of which all row slots share."""
    encoder = Encoder(
        InMemory(d(0, 12, d.width, shared=True)), d(1, 12, shared=True), activation(d), shift=d(2, d.width, shared=True), norm=norm
    )
    site = Origin(("layers.1.output",), ("layers.1.output",))
    return SparseAutoencoder(encoder, InMemory(d(3, 12, d.width, shared=True)), torch.zeros(d.width), site)


def jump(d: Draw) -> Activation:
    return JumpReLU(d(4, 12, shared=True).abs())


def spliced(activation: Callable[[Tensor, Draw], Tensor], edit: Callable[[Tensor, Draw], None], norm: bool = False) -> Callable:
    """The whole dictionary in place of h, with other features, and its error added: what a clamp is by definition."""

    def formula(h: Tensor, strength: float, d: Draw) -> Tensor:
        mean, deviation = (h.mean(-1, keepdim=True), h.std(-1, keepdim=True)) if norm else (0.0, 1.0)
        x = (h - mean) / (deviation + 1e-5 if norm else 1.0) - d(2, d.width, shared=True)
        f = activation(torch.einsum("btw,nw->btn", x, d(0, 12, d.width, shared=True)) + d(1, 12, shared=True), d)
        other = f.clone()
        edit(other, d)

        def decoded(f: Tensor) -> Tensor:
            return torch.einsum("btn,nw->btw", f, d(3, 12, d.width, shared=True)) * deviation + mean

        return h + strength * (decoded(other) + (h - decoded(f)) - h)

    return formula


def jumped(pre: Tensor, d: Draw) -> Tensor:
    return torch.where(pre > d(4, 12, shared=True).abs(), pre, 0.0)


def gated(pre: Tensor, d: Draw) -> Tensor:
    gate, magnitude = pre + d(4, 12, shared=True), pre * d(6, 12, shared=True).exp() + d(7, 12, shared=True)
    return torch.where(gate > 0, magnitude.clamp_min(0), 0.0)


def largest(pre: Tensor, d: Draw) -> Tensor:
    return torch.where(pre >= pre.sort(-1, descending=True).values[..., 2:3], pre.clamp_min(0), 0.0)


def put(f: Tensor, d: Draw) -> None:
    f[..., 7], f[..., 2] = d(5, 2)


def put_others(f: Tensor, d: Draw) -> None:
    f[..., 7], f[..., 2] = d(6, 2)


def kept_between(f: Tensor, d: Draw) -> None:
    f[..., [7, 2]] = f[..., [7, 2]].clamp(0.5, 2.0)


def scaled(f: Tensor, d: Draw) -> None:
    f[..., [7, 2]] *= d(5, 2)


def raised(f: Tensor, d: Draw) -> None:
    f[..., [7, 2]] += d(5, 2)


def regained(f: Tensor, d: Draw) -> None:
    f[..., [7, 2]] = f[..., [7, 2]] * d(5, 2) + d(8, 2)


def without(f: Tensor, d: Draw) -> None:
    f[..., [7, 2]] = 0.0


def only(f: Tensor, d: Draw) -> None:
    f[..., [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]] = 0.0


def feature_gates(d: Draw) -> Activation:
    return Gated(d(4, 12, shared=True), d(7, 12, shared=True), d(6, 12, shared=True))


ALL = [7, 2, 11, 0, 4, 9, 5, 8, 10, 3, 1, 6]  # some of them are on wherever a test puts the operator


def adapted_gains(h: Tensor, strength: float, d: Draw) -> Tensor:
    """Gains are 1 + a linear map of the token at the length sqrt(width)."""

    def edit(f: Tensor, d: Draw) -> None:
        x = h * d.width**0.5 / h.square().sum(-1, keepdim=True).sqrt()
        f[..., ALL] *= 1 + torch.einsum("btw,nw->btn", x, 0.2 * d(5, 12, d.width)) + d(8, 12)

    return spliced(lambda pre, _: pre.clamp_min(0), edit)(h, strength, d)


def adapted_offsets(h: Tensor, strength: float, d: Draw) -> Tensor:
    """Offsets of what a layer norm leaves, at that length, in the unit of the norm."""
    deviation = h.std(-1, keepdim=True)
    x = (h - h.mean(-1, keepdim=True)) / (deviation + 1e-5)
    x = x * d.width**0.5 / x.square().sum(-1, keepdim=True).sqrt()
    offsets = torch.einsum("btw,nw->btn", x, 0.2 * d(5, 2, d.width)) + d(8, 2)
    return h + strength * deviation * torch.einsum("btn,nw->btw", offsets, d(3, 12, d.width, shared=True)[[7, 2]])


CASES: dict[str, Case] = {
    "ablate_components": Case(
        lambda d: AblateComponents(d(0, d.width), d(1, d.width)), lambda h, s, d: h + s * d(0, d.width) * (d(1, d.width) - h)
    ),
    "gate_components": Case(
        lambda d: GateComponents(d(0, 3), torch.arange(d.width) % 4, d(1, d.width)),
        lambda h, s, d: h + s * torch.cat([torch.zeros(1), d(0, 3).sigmoid()]).repeat(d.width // 4) * (d(1, d.width) - h),
    ),
    "gate_components, alone": Case(
        lambda d: GateComponents(d(0, 3), torch.arange(d.width) % 4, d(1, d.width), alone=True),
        lambda h, s, d: h + s * torch.cat([torch.zeros(1), (-d(0, 3)).sigmoid()]).repeat(d.width // 4) * (d(1, d.width) - h),
    ),
    "add": Case(lambda d: Add(d(0, d.width)), lambda h, s, d: h + s * d(0, d.width)),
    "ablate": Case(lambda d: Ablate(d(0, 1, d.width)), lambda h, s, d: h - s * projection(h, d(0, 1, d.width)[0])),
    "ablate a span": Case(
        lambda d: Ablate(d(0, 3, d.width)),
        lambda h, s, d: h - s * h @ torch.linalg.pinv(d(0, 3, d.width)) @ d(0, 3, d.width),
    ),
    "ablate_then_add": Case(lambda d: AblateThenAdd(d(0, d.width)), ablate_then_add),
    "ace": Case(lambda d: Ace(d(0, d.width), d(1, d.width), 0.4), ace),
    "bound": Case(lambda d: Bound(d(0, d.width) - 1, d(0, d.width) - 0.5, 0.2), bounded),
    "bound hard": Case(lambda d: Bound(d(0, d.width) - 1, d(0, d.width) - 0.5, 0.0), lambda h, s, d: bounded(h, s, d, margin=1e-9)),
    "clamp to a value": Case(lambda d: Clamp(d(0, d.width), 0.5), lambda h, s, d: set_reach(h, d(0, d.width), s, lambda p: 0.5)),
    "clamp to a range": Case(
        lambda d: Clamp(d(0, d.width), low=-0.5, high=0.25),
        lambda h, s, d: set_reach(h, d(0, d.width), s, lambda p: max(min(p, 0.25), -0.5)),
    ),
    "clamp from below": Case(
        lambda d: Clamp(d(0, d.width), low=0.2), lambda h, s, d: set_reach(h, d(0, d.width), s, lambda p: max(p, 0.2))
    ),
    "erase": Case(lambda d: Erase(d(0, 2, d.width), d(1, 2, d.width), d(2, d.width)), erase),
    "head_shift": Case(lambda d: HeadShift(d(0, 2, d.width // 4), [2, 0], 4), head_shift),
    "k_steering": Case(
        lambda d: KSteering(
            [d(0, 5, d.width, shared=True), d(2, 3, 5, shared=True)], [d(1, 5, shared=True)], [[0]] * len(d.seeds), [[2]] * len(d.seeds)
        ),
        k_steering,
    ),
    "k_steering, deep": Case(
        lambda d: KSteering(
            [d(0, 5, d.width, shared=True), d(1, 4, 5, shared=True), d(2, 3, 4, shared=True)],
            [d(3, 5, shared=True), d(4, 4, shared=True)],
            [0, 2],
            steps=3,
            decay=0.5,
        ),
        k_steering_deep,
    ),
    "loreft": Case(lambda d: LoReFT(d(0, 3, d.width), d(1, 3, d.width), d(2, 3)), loreft),
    "mirror": Case(
        lambda d: Mirror(d(0, d.width), -0.2, threshold=0.3),
        lambda h, s, d: set_reach(h, d(0, d.width), s, lambda p: -0.4 - p if p < 0.3 else p),
    ),
    "reft_r1": Case(lambda d: ReftR1(d(0, d.width), k=2), reft_r1),
    "reft_r1 with a level": Case(
        lambda d: ReftR1(d(0, d.width), level=1.5), lambda h, s, d: h + s * 1.5 * d(0, d.width) / d(0, d.width).norm()
    ),
    "replace": Case(
        lambda d: Replace(d(0, d.width), d(1, d.width)),
        lambda h, s, d: (
            h + s * torch.einsum("btw,w,v->btv", h, d(0, d.width) / d(0, d.width).square().sum(), d(1, d.width) - d(0, d.width))
        ),
    ),
    "rotate": Case(lambda d: Rotate(d(0, 2, d.width), 1.2), rotate),
    "rotate towards": Case(lambda d: Rotate(d(0, 2, d.width), 2.0, towards=True), rotate_towards),
    "scale": Case(lambda d: Scale(d(0, d.width), 2.5), lambda h, s, d: h + s * 1.5 * projection(h, d(0, d.width))),
    "target_projection": Case(
        lambda d: TargetProjection(d(0, d.width), 0.6, threshold=0.1),
        lambda h, s, d: set_reach(h, d(0, d.width), s, lambda p: 0.6 if p < 0.1 else p),
    ),
    "clamp_features to a value": Case(lambda d: everywhere(ClampFeatures(dictionary(d, jump), [7, 2], to=d(5, 2))), spliced(jumped, put)),
    "clamp_features to a range, gated": Case(
        lambda d: everywhere(ClampFeatures(dictionary(d, feature_gates), [7, 2], low=0.5, high=2.0)), spliced(gated, kept_between)
    ),
    "clamp_features by a factor, top-k": Case(
        lambda d: everywhere(ClampFeatures(dictionary(d, lambda _: TopK(3)), [7, 2], scale=d(5, 2))), spliced(largest, scaled)
    ),
    "clamp_features by an amount, layer norm": Case(
        lambda d: everywhere(ClampFeatures(dictionary(d, jump, "layer_norm"), [7, 2], add=d(5, 2))), spliced(jumped, raised, norm=True)
    ),
    "clamp_features, layer norm": Case(
        lambda d: everywhere(ClampFeatures(dictionary(d, jump, "layer_norm"), [7, 2], to=d(6, 2))), spliced(jumped, put_others, norm=True)
    ),
    "feature_gains": Case(lambda d: everywhere(FeatureGains(dictionary(d, jump), [7, 2], d(5, 2), d(8, 2))), spliced(jumped, regained)),
    "feature_adapter": Case(
        lambda d: everywhere(FeatureAdapter(dictionary(d, lambda _: ReLU()), ALL, adapter=0.2 * d(5, 12, d.width), bias=d(8, 12))),
        adapted_gains,
    ),
    "feature_adapter of offsets, layer norm": Case(
        lambda d: everywhere(
            FeatureAdapter(dictionary(d, jump, "layer_norm"), [7, 2], "offset", adapter=0.2 * d(5, 2, d.width), bias=d(8, 2))
        ),
        adapted_offsets,
    ),
    "ablate_features": Case(lambda d: everywhere(AblateFeatures(dictionary(d, jump), [7, 2])), spliced(jumped, without)),
    "keep_only_features": Case(lambda d: everywhere(KeepOnlyFeatures(dictionary(d, jump), [7, 2])), spliced(jumped, only)),
    "add_decoder": Case(lambda d: everywhere(AddDecoder(dictionary(d, jump), [7, 2], d(5, 2))), spliced(jumped, raised)),
}
