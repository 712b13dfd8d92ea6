"""Inference-time intervention, ITI: a shift of chosen attention heads (Li et al. 2023, arXiv 2306.03341, equation 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steer.checks import integer, of_type, whole_number
from steer.errors import ConfigError, SiteError
from steer.intervene.operator import OPERATORS, RowTensors, slotted
from steer.intervene.operators.add import Add
from steer.model.anatomy import Anatomy
from steer.model.site import Site


@OPERATORS.register("head_shift")
class HeadShift(Add):
    """z_i + strength * v_i on chosen heads i, at `layers.<n>.attn.z`: shifts what attention heads put out (inference-time intervention).

    The paper's v_i is sigma_i theta_i: a direction of length 1 times the standard deviation of the activations along it; alpha is the
    strength. When the shifts are learned, the other heads stay alone.

    Args:
        directions: [chosen, head_dim] or [slots, chosen, head_dim] v.
        heads: which heads, in the order of `directions`, counted from 0.
        n_heads: number of query heads of the model.

    Raises:
        ConfigError: a head that does not exist or is named twice, another number of heads than directions, or than the model has.
        SiteError: an intervention with it at another site.

    Example:
        >>> anatomy = steer.Anatomy.find(model)
        >>> shift = steer.HeadShift(torch.ones(2, anatomy.head_dim), heads=[1, 7], n_heads=anatomy.n_heads)
        >>> plan = steer.Plan(steer.Intervention(shift, "layers.12.attn.z"))
    """

    settings = ("heads", "n_heads")

    def __init__(self, directions: Tensor, heads: Sequence[int], n_heads: int) -> None:
        rows = slotted(directions, 3, "directions of heads")
        whole_number(n_heads, "number of heads", least=1)
        of_type(heads, (list, tuple), "the heads of 'head_shift'", "list their numbers, e.g. [0, 3]")
        for head in (heads := [integer(head) for head in heads]):
            whole_number(head, "a head of 'head_shift'")
        if len(set(heads)) != rows.shape[1] or len(heads) != rows.shape[1] or not all(0 <= head < n_heads for head in heads):
            raise ConfigError(
                "heads and directions do not fit",
                expected=f"{rows.shape[1]} different heads from 0 to {n_heads - 1}",
                found=heads,
                remedy="name the head of each direction once",
            )
        vector = rows.new_zeros(rows.shape[0], n_heads, rows.shape[2])
        vector[:, heads] = rows
        self.heads, self.n_heads = heads, n_heads
        super().__init__(vector.flatten(1))

    def check_site(self, site: Site) -> None:
        if site.module is None and site.part != "attn.z":
            raise SiteError(
                f"'{site}' has no heads to shift",
                expected="the input of an output projection, where heads lie side by side",
                found=str(site),
                remedy=f"use 'layers.{site.layer or 0}.attn.z'",
            )

    def check_model(self, anatomy: Anatomy) -> None:
        if self.n_heads != anatomy.n_heads:
            raise ConfigError(
                "'head_shift' was made for another number of heads",
                expected=f"{anatomy.n_heads} heads of {anatomy.head_dim} channels, as this model has",
                found=f"{self.n_heads} heads of {self.width // self.n_heads}",
                remedy="give n_heads the number of query heads of the model, and directions as wide as one head",
            )

    def delta(self, h: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        vector = per_row["vector"]
        if isinstance(self.tensors["vector"], nn.Parameter):  # no gradient beside the chosen heads
            blocks = vector.unflatten(-1, (self.n_heads, -1)).unbind(1)
            vector = torch.cat([block if head in self.heads else block.detach() for head, block in enumerate(blocks)], dim=-1)
        return (strength * vector.unsqueeze(1)).to(h.dtype)

    def fused(self, h: Tensor, strength: Tensor, mask: Tensor | None, rows: Tensor | None, preserve_norm: bool) -> Tensor | None:
        learned = isinstance(self.tensors["vector"], nn.Parameter)  # of which a kernel would change the other heads too
        return None if learned else super().fused(h, strength, mask, rows, preserve_norm)

    def describe(self) -> str:
        return f"shift heads {', '.join(map(str, self.heads))} of {self.n_heads}"
