"""Functions that several kernels call: phi of the unified edit, and a product that keeps fp32 directions exact."""

# Triton functions have no types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from steer.kernels.lazy_triton import tl, triton


@triton.jit
def evaluate_phi(
    p, offsets, mask, length, scale_ptr, shift_ptr, low_ptr, high_ptr, threshold_ptr, scale_minus_1,
    GATED: tl.constexpr,
):  # fmt: skip
    """(phi, d phi / d p) of the projections p, see `edit.py`. The numbers of their directions are at `offsets`, `length` is |h| or 1."""
    slope = tl.zeros_like(p) + scale_minus_1
    if scale_ptr is not None:
        slope += tl.load(scale_ptr + offsets, mask=mask) - 1.0
    z = p
    if threshold_ptr is not None:
        is_on = p > tl.load(threshold_ptr + offsets, mask=mask) * length
        z = tl.where(is_on, p, 0.0)
    phi = slope * z
    if shift_ptr is not None:
        phi += tl.load(shift_ptr + offsets, mask=mask)
    if low_ptr is not None:
        least = tl.load(low_ptr + offsets, mask=mask) - z
        slope = tl.where(phi < least, -1.0, slope)
        phi = tl.where(phi < least, least, phi)
    if high_ptr is not None:
        most = tl.load(high_ptr + offsets, mask=mask) - z
        slope = tl.where(phi > most, -1.0, slope)
        phi = tl.where(phi > most, most, phi)
    if threshold_ptr is not None:
        slope = tl.where(is_on, slope, 0.0)
        if GATED:
            phi = tl.where(is_on, phi, 0.0)
    return phi, slope


@triton.jit
def dot_exact(a, b, total):
    """total + a b, for a in the dtype of the activation. What an fp32 b loses when it is rounded to that dtype is a second product."""
    if a.dtype == tl.float32:
        total = tl.dot(a, b.to(tl.float32), total, input_precision="ieee")
    else:
        rounded = b.to(a.dtype)
        total = tl.dot(a, rounded, total)
        if b.dtype == tl.float32:
            total = tl.dot(a, (b - rounded.to(tl.float32)).to(a.dtype), total)
    return total
