"""Weight edits: the edit of an activation moved into the weights of the map that gives or takes it.

Edits of what a linear map gives or takes become part of that map: (I + L^T R)(W x + b) + c is again linear. An edit of the residual stream
is another thing. A constant that is added to it goes into the bias of the last map that wrote to it. A projection of it changes what
*earlier* maps wrote for *later* readers only, which no weight can do; it can be left out just where it has nothing left to do, because
everything that writes to the stream (embedding, every attention and MLP output) is projected itself (Arditi et al. 2024, arXiv 2406.11717,
section 4.1, is that case). `steer.intervene.deploy.placement` finds the map of each edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steer.intervene.affine import Affine


class WeightChange(NamedTuple):
    """The change of a map: B A of its weight, and that of its bias; fp32, or fp64 for weights in fp64.

    Attributes:
        a: [rank, in], or [experts, rank, in] for experts.
        b: [out, rank].
        bias: [out]; an embedding has it in every row.
    """

    a: Tensor
    b: Tensor
    bias: Tensor

    @property
    def shifts(self) -> bool:
        """The bias changes."""
        return bool((self.bias != 0).any())


@dataclass(eq=False)
class WeightEdit:
    """A map of a model, and the edits that go into its weights.

    Attributes:
        path, module: of the map in the model.
        kind: `linear`; `embedding`, whose rows are what it gives; `experts`, the stacked down projections of a mixture.
        of_input, of_output: edits of what the map takes and of what it gives; None for none.
    """

    path: str
    module: nn.Module
    kind: str
    of_input: Affine | None = None
    of_output: Affine | None = None

    def add_to_input(self, edit: Affine) -> None:
        """Edits what the map takes, after the edits that are there."""
        self.of_input = edit if self.of_input is None else self.of_input.then(edit)

    def add_to_output(self, edit: Affine) -> None:
        """Edits what the map gives, after the edits that are there."""
        self.of_output = edit if self.of_output is None else self.of_output.then(edit)

    @property
    def weight_name(self) -> str:
        """The attribute of the module that holds its weight."""
        return "down_proj" if self.kind == "experts" else "weight"

    @property
    def parameter(self) -> nn.Parameter:
        """Its weight, as the module holds it."""
        return getattr(self.module, self.weight_name)

    @property
    def transposed(self) -> bool:
        """The module holds [in, out]."""
        return self.kind == "embedding" or is_conv1d(self.module)

    @property
    def weight(self) -> Tensor:
        """[out, in], or [experts, out, in]."""
        return self.parameter.data.mT if self.transposed else self.parameter.data

    @property
    def bias(self) -> nn.Parameter | None:
        return getattr(self.module, "bias", None) if self.kind == "linear" else None

    @property
    def changes_bias_only(self) -> bool:
        return self.kind == "linear" and self.of_input is None and self.of_output is not None and self.of_output.rank == 0

    def change(self) -> WeightChange:
        """What the edits change in the map as it is now.

        W becomes (I + L2^T R2) W (I + L1^T R1), with the right rows R1, R2 and the left rows L1, L2 of the edits of input and output. So
        the change of W has at most the rank of both.
        """
        weight = self.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        out = weight.shape[-2]
        a = weight.new_empty(*weight.shape[:-2], 0, weight.shape[-1], dtype=dtype)  # [..., 0, in]
        b = weight.new_empty(out, 0, dtype=dtype)
        old_bias = b.new_zeros(out) if self.bias is None else self.bias.data.to(dtype)
        bias = old_bias
        wide = a if self.changes_bias_only else weight.to(dtype)  # a large matrix is widened only where it is needed
        if self.of_input is not None:
            right, left, shift = (part.to(wide) for part in (self.of_input.right, self.of_input.left, self.of_input.shift))
            a = right
            b = wide @ left.mT  # [out, rank]
            bias = bias + wide @ shift
        if self.of_output is not None:
            right, left, shift = (part.to(wide) for part in (self.of_output.right, self.of_output.left, self.of_output.shift))
            if self.of_output.rank:
                b = b + left.mT @ (right @ b)
                a = torch.cat([a, right @ wide], dim=-2)  # [..., rank of both, in]
                b = torch.cat([b, left.mT], dim=-1)  # [out, rank of both]
                bias = bias + (right @ bias) @ left
            bias = bias + shift
        return WeightChange(a, b, bias - old_bias)

    def changed_weight(self, change: WeightChange) -> Tensor:
        """The new weight, in the dtype of the change and in the layout of the module."""
        weight = self.weight.to(change.a) + change.b @ change.a  # [..., out, in]
        if self.kind == "embedding":
            weight += change.bias[:, None]
        return weight.mT if self.transposed else weight


def is_conv1d(module: nn.Module | None) -> bool:
    """GPT-2's linear map, whose weight is [in, out]; told by its name, since transformers takes seconds to import."""
    return type(module).__name__ == "Conv1D"


def is_dense(weight: Any) -> bool:
    """The weight is held here as it is used: neither quantised nor sharded, offloaded or computed from something else."""
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or weight.is_meta:
        return False
    return weight.is_floating_point() and weight.element_size() > 1 and weight.numel() > 0
