"""Matrices of a block's projections, by head: what a head writes with, and what a reader reads with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of
from steer.model.site import Site


def linear_rows(module: nn.Module) -> Tensor:
    """[out, in] of a linear map without its bias.

    Where that is no plain matrix (adapters, quantised weights) the map is read off by calling it with every unit vector.
    """
    if type(module) is nn.Linear:
        return module.weight.detach()
    if type(module) is Conv1D:
        return module.weight.detach().T
    width = int(getattr(module, "in_features", None) or module.nx)  # type: ignore[arg-type]
    like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    with torch.no_grad():
        units = torch.eye(width, device=like.device, dtype=like.dtype)
        return (module(units) - module(torch.zeros_like(units[:1]))).T


def output_matrix(anatomy: Anatomy, layer: int) -> Tensor:
    """[heads, head_dim, width] fp32, what each head's z is multiplied by."""
    heads = heads_of(anatomy, layer)
    rows = linear_rows(anatomy.point(Site("attn.z", layer)).module).float()  # [width, heads * head_dim]
    return rows.T.unflatten(0, (heads.n_heads, heads.head_dim))  # a view: transposed factors cost a product nothing


def reading_matrix(anatomy: Anatomy, layer: int, part: str) -> Tensor:
    """[heads or groups, head_dim, width] fp32, by which the normed stream becomes `q`, `k` or `v`."""
    heads = heads_of(anatomy, layer, f"attn.{part}")
    point = anatomy.point(Site(f"attn.{part}", layer))
    rows = linear_rows(point.module)
    columns = point.columns
    if columns is not None:
        rows = rows[columns.to(rows.device) if isinstance(columns, Tensor) else columns]
    return rows.float().unflatten(0, (-1, heads.head_dim))
