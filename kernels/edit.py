"""The unified edit: along each of M directions, read a number from the activation, change it, and write the change back.

Mathematics, for a token h with weight w = strength x mask and the directions of its slot:

    p_j = h.U_j + b_j                                       read
    on_j = p_j > theta_j       (or theta_j |h|)             always on without a threshold
    z_j = p_j on_j                                          JumpReLU
    phi_j = min(max((s_j - 1) z_j + c_j, low_j - z_j), high_j - z_j)      = clamp(s_j z_j + c_j, low_j, high_j) - z_j
    phi_j = phi_j on_j         when gated
    y = h + w sum_j phi_j W_j                               write
    o = y |h| / |y|            with norm preservation

so that (s scale, c shift, everything else absent unless it is named)

    add c W                              s = 1, c            ablate span(U), U = W orthonormal     s = 0
    clamp to [low, high]                 low, high           scale a projection                    s
    set a JumpReLU feature to c          theta, s = 0, c     scale a JumpReLU feature              theta, s
    add c W where cos(h, U) > theta      theta, relative, gated, c (U of length 1)

Backward, with phi' = d phi / d p (s - 1 inside the bounds, -1 outside, 0 where off; the threshold has no derivative):

    dy = g, or s_n g - k y with norm preservation (s_n = |h| / |y|, k = s_n (g.y) / |y|^2)
    q_j = dy.W_j           dh = dy + w sum_j phi'_j q_j U_j   [+ (g.y) / (|h| |y|) h with norm preservation]
    dw = sum_j phi_j q_j, dW_j = sum over tokens of w phi_j dy, dU_j = sum of w phi'_j q_j h, and from w q_j those of b, s, c, low, high

Shapes: h [batch, tokens, D] (fp32, bf16 or fp16; any row strides, any D; offsets in int64), U and W [1 or slots, M, D], the numbers of
the directions [1 or slots, M] fp32, w [batch or 1, tokens or 1], slots [batch, 1 or tokens].

Bytes per token in bf16: forward and backward 4 D each (6 D backward with norm preservation), the directions coming from the caches. Saved
for backward: p, 4 M, and |h|, 4, where the threshold is relative; nothing of the size of h unless the norm is kept or U learns.

Two pairs of kernels: `edit_scalar` keeps a token in registers and goes through the directions one by one, M <= 16; `edit_tiles` takes 16 to
64 tokens and all directions at once through the tensor cores, M <= 256. What neither takes (more directions; more than 16 with norm
preservation, or with slots of tokens) runs in PyTorch operations. Deterministic.

Files: `edit_task` (arguments), `edit_reference` (PyTorch), `edit_scalar` and `edit_tiles` (kernels and launchers), `edit_autograd` (choice
of the kernel, gradients), `edit_operator` (for compiled code), and this one.

Sources: Arditi et al. 2024, arXiv 2406.11717 (ablation); Lee et al. 2024, arXiv 2409.05907, CAST (gate); Rajamanoharan et al. 2024, arXiv
2407.14435 (JumpReLU); Templeton et al. 2024, "Scaling Monosemanticity" (clamping features; the change along decoder rows alone equals a
splice with the error term, since h + (decode(z') - decode(z)) = h + sum_j (z'_j - z_j) W_j).
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.errors import ConfigError
from steer.kernels import edit_operator  # noqa: F401  (registers torch.ops.steer.edit)
from steer.kernels.available import KERNELS
from steer.kernels.dispatch import choose_path
from steer.kernels.edit_autograd import Edit, has_kernel
from steer.kernels.edit_reference import MAX_FUSED, edit_reference
from steer.kernels.edit_task import EditNumbers, EditOptions, EditTask
from steer.kernels.layout import as_3d, bank_with_slots, slots_as_2d, token_weights


@KERNELS.register("edit")
def edit(
    h: Tensor,
    read: Tensor,
    write: Tensor | None = None,
    *,
    bias: Tensor | float | None = None,
    scale: Tensor | float | None = None,
    shift: Tensor | float | None = None,
    low: Tensor | float | None = None,
    high: Tensor | float | None = None,
    threshold: Tensor | float | None = None,
    relative: bool = False,
    gated: bool = False,
    strength: Tensor | float = 1.0,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
    preserve_norm: bool = False,
) -> Tensor:
    """h + strength * mask * sum_j phi_j(h.U_j) W_j: ablates, scales, clamps, sets or gates along directions in one pass over memory.

    Gives [..., width] in the dtype of h.

    Args:
        h: [..., width] activation; the first dimension is the batch.
        read: U, [M, width] or [slots, M, width].
        write: W, of the shape of `read`; None for the same vectors.
        bias, scale, shift, low, high, threshold: numbers of the directions, one for all, [M] or [slots, M]; see the top of this file.
            `scale` is a factor, the others are in the units of the projection h.U_j.
        relative: the threshold is in units of |h|. gated: where a direction is not over its threshold, nothing is written along it.
        strength, mask: what broadcasts to [..., 1]; 0 leaves a token exactly as it is.
        slots: [batch], or one for each token; -1 leaves it alone. None gives every token the first slot.
        preserve_norm: each token keeps the norm that it had.

    Raises:
        WidthError, ConfigError: shapes that do not fit.

    Example:
        >>> clamped = edit(torch.randn(2, 7, 32), torch.randn(5, 32), low=-1.0, high=1.0)
    """
    read = bank_with_slots(read, 3, h, "directions to read")
    write = read if write is None else bank_with_slots(write, 3, h, "directions to write")
    if write.shape != read.shape:
        raise _pairs_error(read, write)
    numbers = EditNumbers(
        bias=_per_direction(bias, read, "bias"),
        scale=_per_direction(scale, read, "scale") if isinstance(scale, Tensor) else None,
        shift=_per_direction(shift, read, "shift"),
        low=_per_direction(low, read, "low"),
        high=_per_direction(high, read, "high"),
        threshold=_per_direction(threshold, read, "threshold"),
    )
    scale_minus_1 = 0.0 if scale is None or isinstance(scale, Tensor) else float(scale) - 1
    options = EditOptions(scale_minus_1, relative, gated, preserve_norm)
    x = as_3d(h)  # [batch, tokens, width]
    weight = token_weights(h, strength, mask)
    slots = slots_as_2d(slots, h)
    path = choose_path(h, opaque=read.shape[1] > MAX_FUSED) if has_kernel(read, slots, preserve_norm) else "aten"
    if path == "triton":
        edited = Edit.apply(x, read, write, weight, slots, *numbers, *options)
    elif path == "op":
        edited = torch.ops.steer.edit(x, read, write, weight, slots, *numbers, *options)[0]
    else:
        edited = edit_reference(x, EditTask(read, write, weight, slots, numbers, options))[0]
    return edited.view(h.shape)


def _per_direction(value: Tensor | float | None, read: Tensor, what: str) -> Tensor | None:
    """A number of the directions as [1 or slots, M]."""
    if value is None:
        return None
    m = read.shape[1]
    if not isinstance(value, Tensor):
        return torch.full((1, m), float(value), dtype=torch.float32, device=read.device)
    value = value.view(1, -1) if value.dim() < 2 else value
    if value.dim() != 2 or value.shape[1] not in (1, m) or 0 in value.shape or value.device != read.device:
        raise _number_error(value, read, what)
    return value.expand(-1, m)


# ---- errors


def _pairs_error(read: Tensor, write: Tensor) -> ConfigError:
    return ConfigError(
        "directions to read and to write do not pair up",
        expected=f"two banks of the shape {list(read.shape)}",
        found=f"{list(write.shape)} to write",
        remedy="give one direction to write for each that is read",
    )


def _number_error(value: Tensor, read: Tensor, what: str) -> ConfigError:
    m = read.shape[1]
    return ConfigError(
        f"'{what}' does not fit the directions",
        expected=f"a number, [{m}] or [slots, {m}], on {read.device}",
        found=f"{list(value.shape)} on {value.device}",
        remedy="give one number for all directions, or one for each",
    )
