"""Rounding and launching, shared by our kernels in Triton.

All kernels are compiled with enable_fp_fusion=False. Otherwise the compiler would choose which
products and sums become one operation.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter truncates to bf16, while a GPU rounds."""


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """Rounds float32 to `dtype`, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def multiplied(left, right, sums):
    """Returns sums + left @ right, with float32 sums.

    The interpreter multiplies bf16 only as float32.
    """
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


class DeviceKernel:
    """A kernel that is launched on the device of its first argument.

    Triton launches on the current device, whatever device holds the tensors. While a step is
    planned tensors have no storage, and nothing is launched.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(first: Tensor, *arguments: Any, **options: Any) -> None:
            if first.is_meta:
                return
            with torch.cuda.device_of(first):
                self.kernel[grid](first, *arguments, **options)

        return launch
