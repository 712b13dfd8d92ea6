"""Matrices of a block's projections, by head: what a head writes with, and what a reader reads with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of
from steer.model.restoring import restoring_all
from steer.model.site import Site


def linear_rows(module: nn.Module) -> Tensor:
    """[out, in] of a linear map without its bias.

    Where that is no plain matrix (adapters, quantised weights) the map is read off by calling it with every unit vector.
    """
    with torch.no_grad():
        return live_rows(module).detach()


def live_rows(module: nn.Module) -> Tensor:
    """The same, through which gradients reach the weights."""
    if type(module) is nn.Linear:
        return module.weight
    if type(module) is Conv1D:
        return module.get_parameter("weight").T
    like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    return without_bias(module, torch.eye(in_features(module), device=like.device, dtype=like.dtype)).T


def is_plain(module: nn.Module) -> bool:
    """Its matrix is one of its parameters."""
    return type(module) in (nn.Linear, Conv1D)


def in_features(module: nn.Module) -> int:
    return int(getattr(module, "in_features", None) or module.nx)  # type: ignore[arg-type]


def without_bias(module: nn.Module, x: Tensor) -> Tensor:
    """[..., out] what a linear map makes of x, without its bias."""
    with _without_dropout(module):
        return module.forward(x) - module.forward(torch.zeros_like(x[..., :1, :]))


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """A dropout of an adapter would take entries out of the unit vectors."""
    with restoring_all() as stack:
        for part in module.modules():
            if isinstance(part, nn.Dropout) and part.training:
                stack.callback(part.train)
                part.eval()
        yield


def output_matrix(anatomy: Anatomy, layer: int) -> Tensor:
    """[heads, head_dim, width] fp32, what each head's z is multiplied by."""
    return by_writing_head(anatomy, layer, linear_rows(anatomy.point(Site("attn.z", layer)).module).float())


def by_writing_head(anatomy: Anatomy, layer: int, rows: Tensor) -> Tensor:
    """[heads, head_dim, width] of the output projection [width, heads * head_dim]."""
    heads = heads_of(anatomy, layer)
    return rows.T.unflatten(0, (heads.n_heads, heads.head_dim))  # a view: transposed factors cost a product nothing


def reading_matrix(anatomy: Anatomy, layer: int, part: str) -> Tensor:
    """[heads or groups, head_dim, width] fp32, by which the normed stream becomes `q`, `k` or `v`."""
    return by_reading_head(anatomy, layer, part, linear_rows(anatomy.point(Site(f"attn.{part}", layer)).module).float())


def by_reading_head(anatomy: Anatomy, layer: int, part: str, rows: Tensor) -> Tensor:
    """[heads or groups, head_dim, ...] of what the projection has for each output of its own, where it may be fused with others."""
    columns = anatomy.point(Site(f"attn.{part}", layer)).columns
    if columns is not None:
        rows = rows[columns.to(rows.device) if isinstance(columns, Tensor) else columns]
    return rows.unflatten(0, (-1, heads_of(anatomy, layer, f"attn.{part}").head_dim))
