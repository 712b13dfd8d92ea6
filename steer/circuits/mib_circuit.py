"""A circuit as EAP-IG and the MIB leaderboard hold it: a key and a value reader for each query head, in matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steer.errors import ConfigError, NonFiniteError

MAX_EDGES = 1 << 28  # entries of a matrix; the edges of Llama 3 70B take 80 million


@dataclass(frozen=True)
class MibShape:
    """The `cfg` of a file.

    Attributes:
        n_heads: query heads of each block. d_model: width of the residual stream.
        parallel: MLPs read what attention reads, so that no head of a block writes to its MLP (`parallel_attn_mlp`).
    """

    n_layers: int
    n_heads: int
    d_model: int
    parallel: bool = False

    def __post_init__(self) -> None:
        sizes = (self.n_layers, self.n_heads, self.d_model)
        if any(type(size) is not int or size < 1 for size in sizes) or type(self.parallel) is not bool:
            raise _no_shape(self)
        if self.n_writers * max(self.n_readers, self.d_model) > MAX_EDGES:
            raise _too_many_edges(self)

    @property
    def n_writers(self) -> int:
        return 1 + self.n_layers * (self.n_heads + 1)

    @property
    def n_readers(self) -> int:
        return self.n_layers * (3 * self.n_heads + 1) + 1

    def writers(self) -> list[str]:
        """Names in the order of rows: `input`, then of each block its heads `a0.h0`, ... and its MLP `m0`."""
        blocks = ([*(f"a{layer}.h{head}" for head in range(self.n_heads)), f"m{layer}"] for layer in range(self.n_layers))
        return ["input", *(name for block in blocks for name in block)]

    def readers(self) -> list[str]:
        """Names in the order of columns: of each block q, k, v of all heads, `a0.h0<q>`, ..., and its MLP; then `logits`."""
        names = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}<{part}>" for part in "qkv" for head in range(self.n_heads)] + [f"m{layer}"]
        return [*names, "logits"]

    def possible(self) -> Tensor:
        """[writers, readers] bool: the writer comes before the reader."""
        edges = torch.zeros(self.n_writers, self.n_readers, dtype=torch.bool)
        for layer in range(self.n_layers):
            before, start = 1 + layer * (self.n_heads + 1), layer * (3 * self.n_heads + 1)
            edges[:before, start : start + 3 * self.n_heads] = True
            edges[: before if self.parallel else before + self.n_heads, start + 3 * self.n_heads] = True
        edges[:, -1] = True
        return edges


@dataclass(frozen=True, eq=False)
class MibCircuit:
    """What a file holds. Rows are `shape.writers()`, columns `shape.readers()`; impossible edges have score 0 and are not in the circuit.

    Attributes:
        scores: [writers, readers] fp32. edges, nodes: [writers, readers] and [writers] bool, what is in the circuit.
        node_scores: [writers] fp32, NaN where a node was not scored; None where none was.
        neurons, neuron_scores: [writers, d_model] bool and fp32, of the channels of what a node writes; None where they are not told apart.
    """

    shape: MibShape
    scores: Tensor
    edges: Tensor
    nodes: Tensor
    node_scores: Tensor | None = None
    neurons: Tensor | None = None
    neuron_scores: Tensor | None = None

    def __post_init__(self) -> None:
        possible, writers = self.shape.possible(), self.shape.n_writers
        shapes = {"scores": possible.shape, "edges": possible.shape, "nodes": (writers,), "node_scores": (writers,)}
        for name, tensor in self.tensors().items():
            expected = tuple(shapes.get(name, (writers, self.shape.d_model)))
            is_score, plain = name.endswith("scores"), tensor.detach().cpu()
            if tuple(plain.shape) != expected or is_score != plain.is_floating_point() or not (is_score or plain.dtype is torch.bool):
                raise _does_not_fit(name, expected, tensor)
            plain = plain.float() if is_score else plain
            plain = torch.where(possible, plain, 0) if name in ("scores", "edges") else plain
            if is_score and bool((plain.isinf() | (plain.isnan() & (name == "scores"))).any()):
                raise _not_finite(name)
            object.__setattr__(self, name, plain.to(torch.float32 if is_score else torch.bool))

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        names = ("scores", "edges", "nodes", "node_scores", "neurons", "neuron_scores")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


# ---- errors


def _no_shape(shape: MibShape) -> ConfigError:
    return ConfigError(
        "the configuration of a circuit file",
        expected="n_layers, n_heads and d_model of 1 or more, parallel_attn_mlp true or false",
        found=f"{shape!r:.200}",
        remedy="take them from the configuration of the model",
    )


def _too_many_edges(shape: MibShape) -> ConfigError:
    return ConfigError(
        "a circuit file of a model this large is not read",
        expected=f"at most {MAX_EDGES} pairs of a writer and a reader, or of a writer and a channel",
        found=f"{shape.n_layers} layers of {shape.n_heads} heads, width {shape.d_model}",
        remedy="check n_layers, n_heads and d_model",
    )


def _does_not_fit(name: str, expected: tuple[object, ...], found: Tensor) -> ConfigError:
    return ConfigError(
        f"`{name}` of a circuit do not fit its configuration",
        expected=f"{list(expected)}, {'floating point' if name.endswith('scores') else 'bool'}",
        found=f"{list(found.shape)} {found.dtype}",
        remedy="rows are writers and columns readers, in the order of MibShape.writers() and .readers()",
    )


def _not_finite(name: str) -> NonFiniteError:
    allowed = "finite numbers" if name == "scores" else "finite numbers, or NaN where nothing was scored"
    return NonFiniteError(f"`{name}` of a circuit", expected=allowed, found="NaN or infinity", remedy="compute the scores again in fp32")
