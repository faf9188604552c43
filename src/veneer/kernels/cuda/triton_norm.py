"""Root-mean-square norms on CUDA, each way in one pass: y = weight * (x / sqrt(mean(x^2) +
epsilon)).

As native/layers/fused.c: float32 inside, rounded where models round. One program a row, which stays
in registers. Shapes: M rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.cuda.triton_numbers import DeviceKernel, as_rounded, rounded, warps_of


@DeviceKernel
@triton.jit
def _forward(x, weight, out, scale, width, epsilon, size: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, size)
    inside, place = column < width, row.to(tl.int64) * width + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value) / width + epsilon)
    tl.store(scale + row, inverse)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    found = as_rounded(value * inverse, x.dtype.element_ty) * factor
    tl.store(out + place, rounded(found, x.dtype.element_ty), mask=inside)


@DeviceKernel
@triton.jit
def _backward(x, weight, grad, scale, out, width, size: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, size)
    inside, place = column < width, row.to(tl.int64) * width + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    inner = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * factor
    inverse = tl.load(scale + row)
    mean = tl.sum(inner * value) / width * inverse * inverse
    found = inverse * (inner - value * mean)
    tl.store(out + place, rounded(found, x.dtype.element_ty), mask=inside)


def norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x (M, D), weight (D) -> y, and the float32 that each row was multiplied by (M)."""
    width = x.shape[-1]
    rows, size = x.numel() // width, triton.next_power_of_2(width)
    out, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    shape = {"size": size, "num_warps": warps_of(size), "enable_fp_fusion": False}
    _forward[(rows,)](x, weight, out, scale, width, epsilon, **shape)
    return out, scale


def norm_backward(x: Tensor, weight: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x."""
    width = x.shape[-1]
    out, size = torch.empty_like(x), triton.next_power_of_2(width)
    shape = {"size": size, "num_warps": warps_of(size), "enable_fp_fusion": False}
    _backward[(scale.numel(),)](x, weight, grad, scale, out, width, **shape)
    return out
