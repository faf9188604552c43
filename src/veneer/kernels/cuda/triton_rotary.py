"""Rotations of heads on CUDA, in one pass: the bits of native/layers/fused.c and of plain torch,
which round each product.

    y = x cos + turned(x) sin    (a, b) -> (-b, a), a and b the halves of a head

Shapes: M rows, H heads, D size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.cuda.triton_numbers import DeviceKernel, as_rounded, rounded, warps_of


@DeviceKernel
@triton.jit
def _rotate(
    x, cos, sin, out, heads, half, back: tl.constexpr, padded: tl.constexpr, size: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, padded), tl.arange(0, size)
    dtype = x.dtype.element_ty
    there, turn = column < half, row * 2 * half + column
    first_cos = tl.load(cos + turn, mask=there, other=0.0).to(tl.float32)
    second_cos = tl.load(cos + turn + half, mask=there, other=0.0).to(tl.float32)
    first_sin = tl.load(sin + turn, mask=there, other=0.0).to(tl.float32)
    second_sin = tl.load(sin + turn + half, mask=there, other=0.0).to(tl.float32)
    if back:
        first_sin, second_sin = -second_sin, -first_sin
    place = (row * heads + head[:, None]) * 2 * half + column[None, :]
    inside = (head[:, None] < heads) & there[None, :]
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + half, mask=inside, other=0.0).to(tl.float32)
    to_first = as_rounded(first * first_cos[None, :], dtype) - as_rounded(
        second * first_sin[None, :], dtype
    )
    to_second = as_rounded(second * second_cos[None, :], dtype) + as_rounded(
        first * second_sin[None, :], dtype
    )
    tl.store(out + place, rounded(to_first, dtype), mask=inside)
    tl.store(out + place + half, rounded(to_second, dtype), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x (M, H, D), cos and sin (M, D), all contiguous and of one type. back: the gradient's way."""
    (rows, heads, size), out = x.shape, torch.empty_like(x)
    padded, half = triton.next_power_of_2(heads), triton.next_power_of_2(size // 2)
    _rotate[(rows,)](
        x,
        cos,
        sin,
        out,
        heads,
        size // 2,
        back=back,
        padded=padded,
        size=half,
        num_warps=warps_of(padded * half),
        enable_fp_fusion=False,
    )
    return out
