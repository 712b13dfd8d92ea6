"""Sparse patterns: which features are on at which tokens, in the order that each product over them needs, and the products in PyTorch."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

with warnings.catch_warnings():  # torch says once in a process that this layout is in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1.0]), (1, 1), check_invariants=False)


SPARSE = 8  # where fewer than 1 / SPARSE of all features are on, products over them are faster than dense ones


class SparsePattern:
    """A sparse matrix [tokens, features] without its values.

    Attributes:
        token, feature: [n] row and column of each entry, int64; tokens growing. Where an entry is there twice, its values add up.
        shape: (tokens, features).
    """

    def __init__(self, token: Tensor, feature: Tensor, tokens: int, features: int) -> None:
        self.token, self.feature, self.shape = token, feature, (tokens, features)

    @classmethod
    def of_rows(cls, indices: Tensor, features: int) -> Self:
        """From the features of each token, [tokens, k]."""
        tokens, k = indices.shape
        return cls(torch.arange(tokens, device=indices.device).repeat_interleave(k), indices.reshape(-1).long(), tokens, features)

    @classmethod
    def of_dense(cls, f: Tensor) -> tuple[Self, Tensor]:
        """From features [tokens, features], with the values [n] of those that are not 0."""
        index = f.flatten().nonzero()[:, 0]  # a search in one dimension is several times faster than in two
        token = index.div(f.shape[1], rounding_mode="floor")
        return cls(token, index - token * f.shape[1], *f.shape), f.flatten()[index]

    def __len__(self) -> int:
        return len(self.token)

    @cached_property
    def token_starts(self) -> Tensor:
        """[tokens + 1] where the entries of each token begin."""
        return _starts(self.token, self.shape[0])

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """([n] entries sorted by feature, those of one feature by token; [features + 1] where those of each feature begin)."""
        order = torch.argsort(self.feature, stable=True)
        return order, _starts(self.feature[order], self.shape[1])


def times_reference(pattern: SparsePattern, values: Tensor, matrix: Tensor) -> Tensor:
    """values @ matrix: [tokens, features] @ [features, width] -> [tokens, width]"""
    return _csr(pattern.token_starts, pattern.feature, values, pattern.shape) @ matrix


def transposed_times_reference(pattern: SparsePattern, values: Tensor, matrix: Tensor) -> Tensor:
    """values.T @ matrix: [features, tokens] @ [tokens, width] -> [features, width]"""
    order, starts = pattern.by_feature
    return _csr(starts, pattern.token[order], values[order], (pattern.shape[1], pattern.shape[0])) @ matrix


def entries_reference(pattern: SparsePattern, left: Tensor, right: Tensor) -> Tensor:
    """[n] entries of left @ right.T, [tokens, width] and [features, width], at the places of the pattern alone."""
    nothing = _csr(pattern.token_starts, pattern.feature, left.new_zeros(len(pattern)), pattern.shape)
    return torch.sparse.sampled_addmm(nothing, left, right.mT, beta=0.0).values()


def _starts(growing: Tensor, size: int) -> Tensor:
    """[size + 1] where each row of a sparse matrix begins; unlike a count it does not make the host wait for a GPU."""
    return torch.searchsorted(growing, torch.arange(size + 1, device=growing.device))


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
