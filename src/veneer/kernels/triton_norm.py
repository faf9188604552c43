"""Root-mean-square norms on CUDA, each way in one pass, with the sum of the residual stream that stands before one.

    h = x + beside    y = weight * (h / sqrt(mean(h^2) + epsilon))

As native/fused.c: float32 inside, rounded where models round. One program a row, which stays in registers.
Shapes: M rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.triton_numbers import Launched, as_rounded, rounded, warps_of


@Launched
@triton.jit
def _forward(x, beside, weight, total, out, scale, width, epsilon, adds: tl.constexpr, size: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, size)
    inside, place = column < width, row.to(tl.int64) * width + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if adds:
        more = tl.load(beside + place, mask=inside, other=0.0).to(tl.float32)
        value = as_rounded(value + more, x.dtype.element_ty)
        tl.store(total + place, value.to(x.dtype.element_ty), mask=inside)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value) / width + epsilon)
    tl.store(scale + row, inverse)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    found = as_rounded(value * inverse, x.dtype.element_ty) * factor
    tl.store(out + place, rounded(found, x.dtype.element_ty), mask=inside)


@Launched
@triton.jit
def _backward(x, weight, grad, scale, beside, out, width, adds: tl.constexpr, size: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, size)
    inside, place = column < width, row.to(tl.int64) * width + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    inner = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * factor
    inverse = tl.load(scale + row)
    mean = tl.sum(inner * value) / width * inverse * inverse
    found = inverse * (inner - value * mean)
    if adds:
        more = tl.load(beside + place, mask=inside, other=0.0).to(tl.float32)
        found = as_rounded(found, x.dtype.element_ty) + more
    tl.store(out + place, rounded(found, x.dtype.element_ty), mask=inside)


def norm_forward(
    x: Tensor, weight: Tensor, epsilon: float, beside: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, D) and beside, or None; weight (D) -> y, the float32 that each row was multiplied by (M), and h, or x."""
    width = x.shape[-1]
    rows, size = x.numel() // width, triton.next_power_of_2(width)
    out, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    total = x if beside is None else torch.empty_like(x)
    given = x if beside is None else beside
    adds, warps = beside is not None, warps_of(size)
    _forward[(rows,)](
        x,
        given,
        weight,
        total,
        out,
        scale,
        width,
        epsilon,
        adds=adds,
        size=size,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return out, scale, total


def norm_backward(x: Tensor, weight: Tensor, grad: Tensor, scale: Tensor, beside: Tensor | None = None) -> Tensor:
    """x: what was normalised, h. The gradient of x; beside: what h has of its other uses, added to it."""
    width = x.shape[-1]
    out, size = torch.empty_like(x), triton.next_power_of_2(width)
    given, adds, warps = x if beside is None else beside, beside is not None, warps_of(size)
    _backward[(scale.numel(),)](
        x, weight, grad, scale, given, out, width, adds=adds, size=size, num_warps=warps, enable_fp_fusion=False
    )
    return out
