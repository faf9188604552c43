"""What the kernels in Triton share: how a value is rounded, and how they are launched.

All are compiled with enable_fp_fusion=False: which products and sums are one operation would be the
compiler's choice.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BY_HAND = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter cuts off what does not fit into bf16; a GPU rounds."""


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 to `dtype`, ties to even."""
    if _BY_HAND and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def as_rounded(value, dtype: tl.constexpr):
    """float32 as it is after a model has rounded it to `dtype` between two operations."""
    return rounded(value, dtype).to(tl.float32)


@triton.jit
def multiplied(left, right, sums):
    """sums + left right, the sums in float32; the interpreter multiplies bf16 in float32 alone."""
    if _BY_HAND:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


class DeviceKernel:
    """A kernel, on the device of its first argument: a launch goes to the current one, whichever
    holds the tensors. While a step is planned, on tensors without storage, nothing is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(first: Tensor, *others: Any, **options: Any) -> None:
            if first.is_meta:
                return
            with torch.cuda.device_of(first):
                self.kernel[grid](first, *others, **options)

        return launch


def warps_of(values: int) -> int:
    """Threads by the 32 for a block of so many values."""
    return min(max(values // 512, 4), 16)
